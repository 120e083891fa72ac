"""Healing of tiny checkpoints: a few steps, and the reload check in this process."""

import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401  # starts a process to list fonts, where tests take starting one over
import pytest
import torch
from conversions import reload_here
from torch import Tensor

from qectomy.healing import curve
from qectomy.healing.heal import heal
from qectomy.healing.settings import HealSettings

STEP = 128  # tokens
STEPS = 8
QUICK_HEAL: dict[str, Any] = dict(
    tokens=STEPS * STEP,
    context=32,
    batch_tokens=STEP,
    validation_tokens=160,
    eval_tokens=160,
    evaluations=4,
    lr=3e-3,
    dtype="float32",
)


@dataclass(frozen=True)
class Pair:
    """An original checkpoint and the reduced one that was fitted to it."""

    original: Path
    reduced: Path


def told(text: Path, **settings: Any) -> HealSettings:
    """Return quick settings, changed as given."""
    return HealSettings(**{"texts": (str(text),), **QUICK_HEAL, **settings})


def options(text: Path, **settings: Any) -> list[str]:
    """Return the same as arguments of the command line."""
    found = ["--text", str(text)]
    for name, value in {**QUICK_HEAL, **settings}.items():
        found += [f"--{name.replace('_', '-')}", str(value)]
    return found


def heal_tiny(
    pair: Pair,
    out: Path,
    text: Path,
    *,
    resume: bool = False,
    progress: Any = None,
    draw: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Heal with quick settings, without the picture; return what users read in qectomy.json."""
    with pytest.MonkeyPatch.context() as patch:
        reload_here(patch)
        if not draw:  # half the time of a run
            patch.setattr(curve, "_draw", lambda path, *_: path.write_bytes(b""))
        report = heal(
            str(pair.reduced), str(pair.original), out, told(text, **settings), resume=resume, progress=progress
        )
    assert report is not None
    return report.as_dict()


def trained_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], steps: int) -> bool:
    """Whether two runs that differ in rounding alone may have ended in these weights, after so many quick steps.

    A step of AdamW is the learning rate times a gradient's mean over its size. Rounding, a millionth of the gradients,
    turns that only where the gradient is nearly 0. To get 1e-5 apart, a 300th of a step, it has to be below about a
    3000th of the others: one weight in a hundred is far more than do. Such a weight may go anywhere that steps lead.
    """
    assert ours.keys() == theirs.keys()
    apart = torch.cat([(ours[name].double() - theirs[name].double()).abs().flatten() for name in theirs])
    few = (apart > 1e-5).double().mean() < 0.01
    return bool(few and apart.max() <= 2 * steps * QUICK_HEAL["lr"])


def killed(act: Callable[[], object]) -> None:
    """Run `act` in a process of its own, which must be killed in the middle of it (see `kill`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, none of which holds a lock here
        child = os.fork()
    if not child:
        try:
            act()
        finally:
            os._exit(3)  # it was not killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the process ended by itself: {os.waitstatus_to_exitcode(status)}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def kill(*_: Any, **__: Any) -> None:
    """Kill this process as a machine that loses its power would."""
    os.kill(os.getpid(), signal.SIGKILL)
