"""What the processes of a conversion tell each other, kept of one run and held against what they tell in another.

A fit is hundreds of steps of Adam, which divides by what may be nothing but rounding: two fits of one text whose sums
differ in the last bit end far apart, and by how much is chance. So each exchange of the second run is compared with
that of the first, and then takes its value. Rounding is thus compared where it arises, and never grows.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from qectomy import calibrate, conversion
from qectomy.distributed.process_group import ProcessGroup

FITS = [Path(room.__file__).parent for room in (calibrate, conversion)]
ROUNDING = 2**8 * torch.finfo(torch.float32).eps  # 3e-5; see `apart`
DURATIONS = {"layerwise._run_teacher", "final_scores.final_scores"}
FREE = {"refit.__init__"}  # about which point a regression's sums are taken: any near their mean does


@dataclass(frozen=True)
class Exchange:
    """One call of `all_reduce_` or `broadcast_`: who made it, and what came of it."""

    kind: str
    caller: str
    values: list[Tensor]


def keep(processes: ProcessGroup, kept: list[Exchange]) -> ProcessGroup:
    """Return `processes`, which from now on puts every exchange of numbers into `kept`."""
    for kind in ("all_reduce_", "broadcast_"):
        setattr(processes, kind, _keeping(kind, getattr(processes, kind), kept))
    return processes


def hold(processes: ProcessGroup, kept: list[Exchange]) -> None:
    """Let every exchange of numbers be the next one in `kept`, or raise AssertionError, and give what that one gave."""
    coming = iter(kept)
    for kind in ("all_reduce_", "broadcast_"):
        setattr(processes, kind, _holding(kind, getattr(processes, kind), lambda: next(coming)))


def _keeping(kind: str, act: Callable[..., None], kept: list[Exchange]) -> Callable[..., None]:
    def exchange(*tensors: Tensor) -> None:
        act(*tensors)
        kept.append(Exchange(kind, _caller(), [tensor.detach().clone() for tensor in tensors]))

    return exchange


def _holding(kind: str, act: Callable[..., None], coming: Callable[[], Exchange]) -> Callable[..., None]:
    def exchange(*tensors: Tensor) -> None:
        own = [tensor.detach().clone() for tensor in tensors]
        act(*tensors)
        wanted, caller = coming(), _caller()
        assert (kind, caller) == (wanted.kind, wanted.caller)
        for number, (tensor, part, value) in enumerate(zip(tensors, own, wanted.values, strict=True)):
            if caller not in DURATIONS | FREE:
                summed = kind == "all_reduce_"
                off = apart(tensor.detach(), part, value) if summed else float(not torch.equal(part, value))
                assert off <= (ROUNDING if summed else 0), f"{kind} of {caller}, {number}: off by {off:.1e}"
            if caller not in DURATIONS:
                tensor.detach().copy_(value)

    return exchange


def apart(found: Tensor, own: Tensor, wanted: Tensor) -> float:
    """Return by how much a sum is off, relative to the largest number of it or of this process's part of it.

    Summing n float32 numbers in another order moves the sum by about sqrt(n) eps of what their sizes add up to, 18 eps
    for the 320 tokens here, and each number was rounded a few dozen times on its way through a layer. Up to 8 eps were
    seen; ROUNDING allows 256. One window too many or too few of ten moves it by thousands of times that.
    """
    scale = max(float(tensor.double().abs().max()) for tensor in (own, wanted))
    return float((found.double() - wanted.double()).abs().max()) / (scale or 1.0)


def _caller() -> str:
    """Return module.function of the package's that asked for an exchange; the checker of annotations stands between."""
    frame = sys._getframe(2)
    while frame.f_back and Path(frame.f_code.co_filename).parent not in FITS:
        frame = frame.f_back
    return _place(frame)


def _place(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
