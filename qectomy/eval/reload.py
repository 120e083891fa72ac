"""Reload a written checkpoint in a fresh process: compare its logits with the conversion's, let it write.

A few tokens also come one at a time, from the key/value cache: a model whose layers do not find their cache is right in
one pass over a text and writes gibberish.
"""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.checkpoint.finite import all_finite
from qectomy.errors import CheckpointError, NonFiniteError, OutputError, QectomyError, Stopped
from qectomy.eval.at_once import SLICE
from qectomy.eval.layerwise_model import StreamedModel, relative_logit_error
from qectomy.eval.peak_memory import peak_memory_bytes
from qectomy.eval.same_tokenizer import check_same_tokenizer
from qectomy.eval.samples import generation_of
from qectomy.record.base import Amount, Count, Record
from qectomy.record.reduced import Generation, ReloadCheck

CACHED_STEPS = 4  # tokens that come one at a time, from the cache ...
PROMPT = 12  # ... after so many at once; short, since some kinds of RoPE depend on the length of a long text
REFUSED = 3  # exit code of the process that finds the checkpoint unusable; others are its own troubles
TOLERANCE = 1e-3  # of the largest logit; float32 rounding between two orders of summation stays below 1e-5


# The child must find qectomy and must not find modules in the folder that it happens to run in.
CHILD = "import sys; sys.path[0] = sys.argv[1]; from qectomy.eval.reload import _main; _main(*sys.argv[2:])"


class Reload(Record):
    """What a fresh process found: the largest logit difference, relative to the largest logit, and its peak memory.

    `error`: in one pass over a text; `cached_error`: in decoding from the key/value cache.
    """

    error: Amount
    cached_error: Amount
    peak_memory_bytes: Count
    generation: Generation | None = None  # what original and written model write, if that was asked for

    @property
    def check(self) -> ReloadCheck:
        """What a report says of it."""
        return ReloadCheck(
            largest_relative_logit_error=self.error,
            largest_relative_logit_error_cached=self.cached_error,
            peak_memory_bytes=self.peak_memory_bytes,
        )


def check_reload(
    folder: Path, tokens: torch.Tensor, logits: torch.Tensor, original: Path, writes: bool = True
) -> Reload:
    """Return what a fresh process finds that loads `folder` and runs the model.

    `tokens` (1, T), `logits` (n, V) float32: what the model in `folder` must give at the last n positions, in one pass.
    `original`: of the model whose tokenizer it must have, and, with `writes`, with which it is to write side by side.
    Raises CheckpointError when the folder does not load there, lacks a tensor, gives other logits or, from its cache,
    others than in one pass, or has another tokenizer.
    """
    expected = folder / ".expected.safetensors"
    try:
        save_file({"tokens": tokens, "logits": logits}, expected)
    except SafetensorError as full:
        raise OutputError(f"the reload check could not be written: {full}") from full
    try:
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parents[2])]
        command += [str(original), "writes" if writes else "", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    finally:
        expected.unlink()
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if told:  # the check was through, whatever became of the process afterwards
        return _passed(Reload.model_validate_json(told[-1]), done.returncode if len(told) == 1 and writes else 0)
    if done.returncode < 0:
        raise Stopped(
            f"the process that reloads the written checkpoint was killed (signal {-done.returncode}): most likely out "
            "of memory"
        )
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    message = f"the written checkpoint does not load in a fresh process: {last}"
    raise CheckpointError(message) if done.returncode == REFUSED else Stopped(message)


def _passed(found: Reload, ended: int) -> Reload:
    """Return what the process found, if it is as it should be; `ended`: how it died after that, if it did."""
    if not found.error <= TOLERANCE:
        raise CheckpointError(
            f"the written checkpoint gives other logits in a fresh process: off by {found.error:.1e} of the largest, "
            f"more than {TOLERANCE:.0e}"
        )
    if not found.cached_error <= TOLERANCE:
        raise CheckpointError(
            f"with transformers {version('transformers')} the written checkpoint would write gibberish: token by "
            f"token, from its key/value cache, its logits are off by {found.cached_error:.1e} of the largest from "
            f"those of one pass (at most {TOLERANCE:.0e} is rounding). Install the version that constraints.txt "
            "names, go on with --resume, and report this"
        )
    if ended:
        found.generation = Generation(skipped=f"the process that let both models write ended ({ended})")
    return found


@torch.no_grad()
def _reload(folder: Path) -> Reload:
    expected = load_file(folder / ".expected.safetensors")
    tokens, wanted, error = expected["tokens"], expected["logits"], 0.0
    checkpoint = open_checkpoint(folder, reduced=True)
    model = StreamedModel(checkpoint)
    states = model.states(tokens)[0, -len(wanted) :]
    for start in range(0, wanted.shape[1], SLICE):
        logits = model.logits(states, start, min(start + SLICE, wanted.shape[1]))
        if not all_finite(logits):
            raise NonFiniteError("the written checkpoint gives NaN or Inf in a fresh process")
        error = max(error, float((logits - wanted[:, start : start + SLICE]).abs().max()))
    cached_error = _cached_error(checkpoint, tokens[:, : PROMPT + CACHED_STEPS])
    return Reload(
        error=error / float(wanted.abs().max()), cached_error=cached_error, peak_memory_bytes=peak_memory_bytes()
    )


def _cached_error(checkpoint: Checkpoint, text: torch.Tensor) -> float:
    """Return how far logits from the key/value cache are off those of one pass over a text (1, T), in float64.

    An ill-conditioned model turns float32's rounding into errors as large as those that a lost cache makes.
    """
    model, n_prompt = StreamedModel(checkpoint, torch.float64), max(1, text.shape[1] - CACHED_STEPS)
    pieces = [text[:, :n_prompt], *text[:, n_prompt:].split(1, dim=1)]
    whole, *cached = (states[0] for states in model.states_of([text], continued=pieces))
    return relative_logit_error(whole, torch.cat(cached), model, model)


def _main(original: str, writes: str, folder: str) -> None:
    try:
        found = _reload(Path(folder))
        check_same_tokenizer(Path(original), Path(folder))
    except (QectomyError, SafetensorError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    print(found.model_dump_json(), flush=True)  # at once: what follows is only to be looked at
    if writes:
        found.generation = generation_of(Path(original), Path(folder))
        print(found.model_dump_json())
