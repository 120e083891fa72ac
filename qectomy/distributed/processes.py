"""The processes of a run: one, or as many as torchrun or `accelerate launch` started."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from qectomy.distributed.launch import launch
from qectomy.errors import QectomyError

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # of the processes that wait while the first one packs or writes text


class Processes:
    """This process among those of the run. Raises QectomyError when there should be more than were found."""

    def __init__(self, device: str):
        try:
            device = _only_visible(device)
        except RuntimeError as error:
            raise QectomyError(f"--device {device}: not usable here ({str(error).splitlines()[0][:120]})") from error
        on_cpu = torch.device(device).type == "cpu"
        if on_cpu:  # without it, processes on CPU take no notice of each other: each would heal alone
            os.environ["ACCELERATE_USE_CPU"] = "true"
        expected = launch().count
        waits = {"timeout": PATIENCE} if expected > 1 else {}
        self._state = PartialState(cpu=on_cpu, **waits)
        self.count, self.is_first = self._state.num_processes, self._state.is_main_process
        if expected != self.count:
            raise QectomyError(f"{expected} processes were started, but {self.count} found each other; use torchrun")
        self.device = str(self._state.device) if self.count > 1 else device

    def first_alone(self, act: Callable[[], T]) -> T:
        """Return what `act` returns in the first process, to all; only that one runs it."""
        found = [act() if self.is_first else None]
        if self.count > 1:
            broadcast_object_list(found)
        return found[0]  # type: ignore[return-value]


def _only_visible(device: str) -> str:
    """Return `cuda` for `cuda:2`, the GPU being made the only one that this process sees: Trainer takes the first."""
    asked = torch.device(device)
    if asked.type != "cuda" or not asked.index:
        return device
    if launch().count > 1:
        raise QectomyError(f"--device {device}: several processes take a GPU each; give --device cuda")
    if torch.cuda.is_initialized():
        raise QectomyError(f"--device {device}: start again with CUDA_VISIBLE_DEVICES={asked.index} and --device cuda")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else [str(index) for index in range(asked.index + 1)]
    if asked.index >= len(names):
        raise QectomyError(f"--device {device}: only {len(names)} GPUs are visible (CUDA_VISIBLE_DEVICES={visible})")
    os.environ["CUDA_VISIBLE_DEVICES"] = names[asked.index]
    return "cuda"
