"""Conversions of tiny checkpoints, quick enough to make dozens: few steps, and the reload check in this process."""

import gc
import hashlib
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM

from qectomy.calibrate import preconditioning, refine
from qectomy.calibrate.maps import key_shared
from qectomy.checkpoint.checkpoint import open_checkpoint, sha256
from qectomy.conversion.fitted import convert
from qectomy.conversion.settings import ConvertSettings
from qectomy.errors import QectomyError
from qectomy.eval import reload
from qectomy.models.query_maps import parse_recipe
from qectomy.report import record

gc.freeze()  # a conversion collects garbage after every layer: what the imports made need not be walked each time
QUICK: dict[str, Any] = dict(tokens=320, context=32, eval_tokens=160)


def few_steps(patch: pytest.MonkeyPatch, steps: int = 8) -> None:
    """Let every Adam of a conversion take only a few steps."""

    def adam(*arguments: Any, **options: Any) -> None:
        preconditioning.adam(*arguments, **{**options, "steps": min(steps, options["steps"])})

    patch.setattr(refine, "adam", adam)
    patch.setattr(key_shared, "adam", adam)


def reload_here(patch: pytest.MonkeyPatch) -> None:
    """Let the reload check load the folder in this process: a fresh one takes seconds to import torch."""

    others = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if not any("qectomy.eval.reload" in part for part in command):  # matplotlib asks for the fonts
            return others(command, **options)
        try:
            return subprocess.CompletedProcess(
                command, 0, f"{reload._reload(Path(command[-1])).model_dump_json()}\n", ""
            )
        except (QectomyError, SafetensorError) as error:
            return subprocess.CompletedProcess(command, reload.REFUSED, "", f"{type(error).__name__}: {error}")
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")

    patch.setattr(reload.subprocess, "run", run)
    patch.setattr(record, "write_page", lambda folder, report: None)  # it takes half a second; its own tests draw it


def convert_tiny(
    source: Path,
    out: Path,
    query: str,
    text: Path,
    fresh_process: bool = False,
    resume: bool = False,
    clean: bool = False,
    progress: Any = None,
    processes: Any = None,
    **settings: Any,
) -> Any:
    """Convert with QUICK settings; return what users read in qectomy.json, None in all but the first process."""
    checkpoint = open_checkpoint(source)
    recipe = tuple(parse_recipe(query, checkpoint.dims))
    with pytest.MonkeyPatch.context() as patch:
        few_steps(patch)
        if not fresh_process:
            reload_here(patch)
        told = ConvertSettings(**{"texts": (str(text),), **QUICK, **settings})
        report = convert(checkpoint, out, recipe, told, progress, resume=resume, clean=clean, processes=processes)
        return report.as_dict() if report else None


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of each tensor's bytes in model.safetensors, by the library that reads it whole."""
    tensors = load_file(folder / "model.safetensors")
    return {
        name: hashlib.sha256(bytes(tensor.view(torch.uint8).flatten())).hexdigest() for name, tensor in tensors.items()
    }


def window_nll(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Loss of every token of the windows (n, T) but the first, float64, one window at a time."""
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none"))
    return torch.cat(losses)


def measured(folder: Path, text: Path, tokens: int = 160, context: int = 32) -> float:
    """Perplexity by the stock class of transformers and a loop of our own."""
    ids = torch.tensor(tiny_tokenizer()(text.read_text())["input_ids"][:tokens])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return math.exp(window_nll(model, ids.view(-1, context)).mean())
