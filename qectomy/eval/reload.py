"""Reload a written checkpoint in a fresh process and compare its logits with those the conversion computed."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qectomy.errors import CheckpointError, NonFiniteError, OutputError
from qectomy.eval.peak_memory import peak_memory_bytes
from qectomy.eval.perplexity import load_model
from qectomy.eval.scores import SLICE
from qectomy.surgery.checkpoint import Checkpoint, open_checkpoint
from qectomy.surgery.finite import all_finite

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
        raise CheckpointError(
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
    checkpoint = open_checkpoint(folder, reduced=True)
    states = _last_states(checkpoint, expected["tokens"], len(wanted))
    head = checkpoint.family.embedding if checkpoint.dims.tied else checkpoint.family.head
    for start in range(0, wanted.shape[1], SLICE):
        rows = checkpoint.read_rows(head, start, min(start + SLICE, wanted.shape[1]), torch.float32)
        logits = nn.functional.linear(states, rows)
        if not all_finite(logits):
            raise NonFiniteError("the written checkpoint gives NaN or Inf in a fresh process")
        error = max(error, float((logits - wanted[:, start : start + SLICE]).abs().max()))
    return Reload(error / float(wanted.abs().max()), peak_memory_bytes())


def _last_states(checkpoint: Checkpoint, tokens: torch.Tensor, last: int) -> torch.Tensor:
    """Return what the head reads (last, D) at the last positions, by the forward of the model that transformers loads.

    The model is loaded without its weights, which shows whether every tensor has its place. A layer's weights are
    read when the forward comes to it and let go after it: the model need not fit in memory.
    """
    family = checkpoint.family
    model, _, _ = load_model(str(checkpoint.folder), "float32", "meta")
    for layer in range(checkpoint.dims.n_layers):
        module = model.get_submodule(family.prefix(layer).rstrip("."))
        module.register_forward_pre_hook(partial(_fill, checkpoint, layer))
        module.register_forward_hook(_empty)
    outside = [family.final_norm] + ([family.positions.rpartition(".")[0]] if family.positions else [])
    for name in outside:
        model.get_submodule(name).load_state_dict(checkpoint.read_module(name, torch.float32), assign=True)
    if family.rotary_module is not None:
        model.set_submodule(family.rotary_module, family.rotary(model.config))  # its buffers are in no file
    rows = [checkpoint.read_rows(family.embedding, i, i + 1, torch.float32) for i in tokens[0].tolist()]
    out = model.base_model(inputs_embeds=torch.cat(rows)[None], use_cache=False)
    return out.last_hidden_state[0, -last:]


def _fill(checkpoint: Checkpoint, layer: int, module: nn.Module, arguments: Any) -> None:
    module.load_state_dict(checkpoint.read_layer(layer, torch.float32), strict=True, assign=True)


def _empty(module: nn.Module, arguments: Any, output: Any) -> None:
    module.to("meta")


def _main(folder: str) -> None:
    print(json.dumps(asdict(_reload(Path(folder)))))
