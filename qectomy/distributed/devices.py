"""What a device can do that healing should know."""

import torch


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device multiplies matrices of bfloat16 faster than of float32: GPUs that can, CPUs with AMX."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    asked = getattr(torch.cpu, "get_capabilities", None)  # torch before 2.11 cannot be asked
    return kind == "cpu" and asked is not None and bool(asked().get("amx_bf16"))
