"""Where the fit may compute in bfloat16: on processors and accelerators that multiply it natively."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    native = device.type == "cpu" and (
        torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if native else torch.float32


@contextmanager
def fast_math(device: torch.device) -> Iterator[None]:
    """Run matrix products in `fast_dtype`; the residual stream stays float32."""
    if fast_dtype(device) is torch.float32:
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield
