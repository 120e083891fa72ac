"""Reload a written checkpoint in a fresh process and compare its logits with those the conversion computed."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qectomy.errors import CheckpointError, OutputError

TOLERANCE = 1e-3  # of the largest logit; float32 rounding between two orders of summation stays below 1e-5


def check_reload(folder: Path, tokens: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the largest logit difference, relative to the largest logit, seen by a fresh process.

    `tokens` (1, T), `logits` (n, V) float32: what the model in `folder` must give at the last n positions. Raises
    CheckpointError when the folder does not load there, lacks a tensor, or gives other logits.
    """
    expected = folder / ".expected.safetensors"
    try:
        save_file({"tokens": tokens, "logits": logits}, expected)
    except SafetensorError as error:
        raise OutputError(f"the reload check could not be written: {error}") from error
    try:
        command = [sys.executable, "-m", "qectomy.eval.reload", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    finally:
        expected.unlink()
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"the written checkpoint does not load in a fresh process: {last}")
    error = float(done.stdout.strip().splitlines()[-1])
    if not error <= TOLERANCE:
        raise CheckpointError(
            f"the written checkpoint gives other logits in a fresh process: off by {error:.1e} of the largest, "
            f"more than {TOLERANCE:.0e}"
        )
    return error


def _reload(folder: Path) -> float:
    from qectomy.eval.perplexity import load_model

    expected = load_file(folder / ".expected.safetensors")
    model, _, _ = load_model(str(folder), "float32", "cpu")
    wanted = expected["logits"]
    with torch.no_grad():
        logits = model(input_ids=expected["tokens"], use_cache=False, logits_to_keep=len(wanted)).logits[0]
    return float((logits - wanted).abs().max() / wanted.abs().max())


if __name__ == "__main__":
    print(_reload(Path(sys.argv[1])))
