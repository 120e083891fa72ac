"""Reload a written checkpoint in a fresh process and compare its logits with those the conversion computed."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qectomy.errors import CheckpointError, NonFiniteError, OutputError, Stopped
from qectomy.eval.peak_memory import peak_memory_bytes
from qectomy.eval.scores import SLICE
from qectomy.eval.streamed import StreamedModel
from qectomy.surgery.checkpoint import open_checkpoint
from qectomy.surgery.finite import all_finite

RELOAD_TOKENS = 64  # whose logits are compared
TOLERANCE = 1e-3  # of the largest logit; float32 rounding between two orders of summation stays below 1e-5


# The child must find qectomy and must not find modules in the folder that it happens to run in.
CHILD = "import sys; sys.path[0] = sys.argv[1]; from qectomy.eval.reload import _main; _main(sys.argv[2])"


@dataclass(frozen=True)
class Reload:
    """What a fresh process found: the largest logit difference, relative to the largest logit, and its peak memory."""

    error: float
    peak_memory_bytes: int


def check_reload(folder: Path, tokens: torch.Tensor, logits: torch.Tensor) -> Reload:
    """Return what a fresh process finds that loads `folder` and runs the model.

    `tokens` (1, T), `logits` (n, V) float32: what the model in `folder` must give at the last n positions. Raises
    CheckpointError when the folder does not load there, lacks a tensor, or gives other logits.
    """
    expected = folder / ".expected.safetensors"
    try:
        save_file({"tokens": tokens, "logits": logits}, expected)
    except SafetensorError as full:
        raise OutputError(f"the reload check could not be written: {full}") from full
    try:
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parents[2]), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    finally:
        expected.unlink()
    if done.returncode < 0:
        raise Stopped(
            f"the process that reloads the written checkpoint was killed (signal {-done.returncode}): most likely out "
            "of memory"
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"the written checkpoint does not load in a fresh process: {last}")
    found = Reload(**json.loads(done.stdout.strip().splitlines()[-1]))
    if not found.error <= TOLERANCE:
        raise CheckpointError(
            f"the written checkpoint gives other logits in a fresh process: off by {found.error:.1e} of the largest, "
            f"more than {TOLERANCE:.0e}"
        )
    return found


@torch.no_grad()
def _reload(folder: Path) -> Reload:
    expected = load_file(folder / ".expected.safetensors")
    wanted, error = expected["logits"], 0.0
    model = StreamedModel(open_checkpoint(folder, reduced=True))
    states = model.states(expected["tokens"])[0, -len(wanted) :]
    for start in range(0, wanted.shape[1], SLICE):
        logits = model.logits(states, start, min(start + SLICE, wanted.shape[1]))
        if not all_finite(logits):
            raise NonFiniteError("the written checkpoint gives NaN or Inf in a fresh process")
        error = max(error, float((logits - wanted[:, start : start + SLICE]).abs().max()))
    return Reload(error / float(wanted.abs().max()), peak_memory_bytes())


def _main(folder: str) -> None:
    print(json.dumps(asdict(_reload(Path(folder)))))
