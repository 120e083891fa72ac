"""Reload a written checkpoint in a fresh process and compare its logits with those the conversion computed."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qectomy.errors import CheckpointError, OutputError
from qectomy.surgery.checkpoint import open_checkpoint

TOLERANCE = 1e-3  # of the largest logit; float32 rounding between two orders of summation stays below 1e-5


# The child must find qectomy and must not find modules in the folder that it happens to run in.
CHILD = "import sys; sys.path[0] = sys.argv[1]; from qectomy.eval.reload import _main; _main(sys.argv[2])"


def check_reload(folder: Path, tokens: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the largest logit difference, relative to the largest logit, seen by a fresh process.

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
        raise CheckpointError(
            f"the process that reloads the written checkpoint was killed (signal {-done.returncode}): most likely out "
            "of memory"
        )
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
    """Load the folder as a user does, its weights left on disk; then run it a layer at a time.

    transformers must find every tensor in its place. A whole model in memory would take more than the conversion did.
    """
    from qectomy.eval.perplexity import load_model

    expected = load_file(folder / ".expected.safetensors")
    wanted = expected["logits"]
    load_model(str(folder), "float32", "meta")
    with torch.no_grad():
        logits = _streamed_logits(folder, expected["tokens"], len(wanted))
    return float((logits - wanted).abs().max() / wanted.abs().max())


def _streamed_logits(folder: Path, tokens: torch.Tensor, last: int) -> torch.Tensor:
    """Return the logits (last, V) of a written checkpoint's last positions, holding one of its layers at a time."""
    from qectomy.calibrate.final_scores import Head
    from qectomy.calibrate.layers import LayerRunner
    from qectomy.calibrate.states import batches
    from qectomy.eval.scores import SLICE

    checkpoint = open_checkpoint(folder, reduced=True)
    runner = LayerRunner(checkpoint, checkpoint.recipe, tokens.shape[1], "cpu")
    rows = [checkpoint.read_rows(checkpoint.family.embedding, i, i + 1, torch.float32) for i in tokens[0].tolist()]
    x = torch.cat(rows)[None]
    for layer in range(checkpoint.dims.n_layers):
        x = runner.forward(runner.build(layer, checkpoint.read_layer(layer, torch.float32), reduced=True), x)
    head = Head(checkpoint, runner.config, runner.device)
    logits = head.logits(x[0, -last:])
    return torch.cat([logits(a, b) for a, b in batches(0, head.vocab_size, SLICE)], dim=-1)


def _main(folder: str) -> None:
    print(_reload(Path(folder)))
