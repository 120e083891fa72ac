"""What healing should know of a device: what it can do, and how Trainer takes it."""

import os

import torch

from qectomy.distributed.launch import launch
from qectomy.errors import QectomyError


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device multiplies matrices of bfloat16 faster than of float32: GPUs that can, CPUs with AMX."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    asked = getattr(torch.cpu, "get_capabilities", None)  # torch before 2.11 cannot be asked
    return kind == "cpu" and asked is not None and bool(asked().get("amx_bf16"))


def only_visible(name: str) -> str:
    """Return `cuda` for `cuda:2`, the GPU being made the only one that this process sees: Trainer takes the first.

    Raises QectomyError where that is not possible, and for what is no device. Of several processes each has its own.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise QectomyError(f"--device {name}: not usable here ({str(error).splitlines()[0][:120]})") from error
    if device.type != "cuda" or not device.index or launch().count > 1:
        return name
    if torch.cuda.is_initialized():
        raise QectomyError(f"--device {name}: start again with CUDA_VISIBLE_DEVICES={device.index} and --device cuda")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else [str(index) for index in range(device.index + 1)]
    if device.index >= len(names):
        raise QectomyError(f"--device {name}: only {len(names)} GPUs are visible (CUDA_VISIBLE_DEVICES={visible})")
    os.environ["CUDA_VISIBLE_DEVICES"] = names[device.index]
    return "cuda"
