"""Let a model's projections lie in memory as they are stored, and compute in a wider type one projection at a time.

A layer of 1 GB in bfloat16 is 4 GB in float64; its largest matrix alone is a third of that.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def projections(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the dense projections inside a module, which hold nearly all of its weights, by name."""
    yield from ((name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear | Conv1D))


def cast_on_use(module: nn.Module, dtype: torch.dtype) -> None:
    """Let each projection inside a module hold its weights in `dtype` only while it runs."""
    for _, part in projections(module):
        held: dict[str, nn.Parameter] = {}

        def widen(part: nn.Module, arguments: Any, held: dict[str, nn.Parameter] = held) -> None:
            held.update(part.named_parameters(recurse=False))
            for name, parameter in held.items():
                setattr(part, name, nn.Parameter(parameter.to(dtype), requires_grad=False))

        def restore(part: nn.Module, arguments: Any, out: Any, held: dict[str, nn.Parameter] = held) -> None:
            for name, parameter in held.items():
                setattr(part, name, parameter)
            held.clear()

        part.register_forward_pre_hook(widen)
        part.register_forward_hook(restore, always_call=True)
