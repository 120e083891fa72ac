"""Whether a checkpoint's numbers fit the type that they are to be written in, before hours are spent on them."""

import torch

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.headers import FLOAT_BYTES, TORCH_NAMES
from qectomy.errors import NonFiniteError


def check_range(source: Checkpoint, dtype: str | None) -> None:
    """Raise NonFiniteError naming the first tensor with a number beyond `dtype` (safetensors' name; None: its own).

    Only tensors stored in a type of wider range are read, one at a time: to float16, most; to bfloat16, few.
    """
    if dtype is None:
        return
    most = torch.finfo(getattr(torch, TORCH_NAMES[dtype])).max
    for name, info in source.tensors.items():
        if info.dtype not in FLOAT_BYTES or torch.finfo(getattr(torch, TORCH_NAMES[info.dtype])).max <= most:
            continue
        if (largest := float(source.read(name).abs().max())) > most:
            raise NonFiniteError(
                f"{info.file}: tensor {name} holds {largest:.3g}, and {TORCH_NAMES[dtype]} ends at {most:.3g}: it "
                "would be written as Inf. Use --dtype bfloat16 or float32, or none to keep the types"
            )
