"""Measure what an engine makes of config fields that it may drop: its mean KL from transformers' predictions, in nats.

Each field is set in a copy of a sample model's config.json; `folded` is a reduced copy with that field, materialised.
An engine that reads the field, or needs it no more, is within rounding. The environment is `quantized.py`'s with
`ctranslate2==4.8.5` beside it.

    .cache/engines/bin/python benchmarks/engine_fields.py --evaluation samples/kjv_heldout.txt --work .cache/fields
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llama_cpp import LlamaCpp, write_gguf
from setting import print_table

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.config_files import copy_model_code, reduced_config, write_config
from qectomy.eval.loading import load_model
from qectomy.models.query_maps import QueryMapSpec
from qectomy.surgery.materialize import materialize
from qectomy.text.text import load_tokenizer

FIELDS: dict[str, list[dict[str, Any]]] = {
    "samples/gpt2": [
        {},
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"layer_norm_epsilon": 1e-3},
        {"layer_norm_epsilon": 1e-1},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"activation_function": "silu"},
    ],
    "samples/llama": [
        {},
        {"hidden_act": "gelu"},
        {"hidden_act": "relu"},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64},
    ],
}
CONTEXT = 256
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FIELDS["samples/llama"] += [
    {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": positions}} for positions in (8192, 128)
]


def with_fields(source: Path, out: Path, fields: dict[str, Any]) -> Path:
    """Copy a stock folder with these fields in its config.json."""
    shutil.copytree(source, out)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | fields))
    return out


def materialised(stock: Path, work: Path) -> Path:
    """Materialise a stock folder as a reduced one of dense layers."""
    source, reduced = open_checkpoint(str(stock)), work / "reduced"
    shutil.copytree(stock, reduced)
    write_config(reduced, reduced_config(source, (QueryMapSpec("dense"),) * source.dims.n_layers, source.dtype))
    copy_model_code(source.family, reduced)
    materialize(open_checkpoint(str(reduced), reduced=True), work / "stock")
    return work / "stock"


def llama_cpp_logits(folder: Path, work: Path) -> Callable[[list[int]], torch.Tensor]:
    write_gguf(folder, work / "model.gguf")
    return LlamaCpp(work / "model.gguf", CONTEXT, open_checkpoint(str(folder)).dims.vocab_size).logits


def ctranslate2_logits(folder: Path, work: Path) -> Callable[[list[int]], torch.Tensor]:
    import ctranslate2
    import numpy as np

    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(work / "ct2"))
    generator = ctranslate2.Generator(str(work / "ct2"), device="cpu", intra_threads=1)
    return lambda window: torch.tensor(np.array(generator.forward_batch([window])))[0]


@torch.no_grad()
def divergence(stock: Path, folder: Path, engine: Any, windows: torch.Tensor, work: Path) -> float:
    """Return the mean KL of an engine's predictions on `folder` from transformers' on `stock`; NaN: it gives none."""
    model, _, _ = load_model(str(stock), "float32", "cpu")
    work.mkdir()
    total = 0.0
    try:
        logits = engine(folder, work)
        for window in windows:
            expected = model(window[None]).logits[0].double().log_softmax(-1)
            found = logits(window.tolist()).double().log_softmax(-1)
            total += (expected.exp() * (expected - found)).sum(-1).mean().item()
    except ValueError as error:  # CTranslate2's logits of a text longer than the sliding window cannot be read
        print(f"{folder}: {error}", file=sys.stderr)
        return float("nan")
    return total / len(windows)


def _short(value: Any) -> Any:
    return f"{value['rope_type']} {value['original_max_position_embeddings']}" if isinstance(value, dict) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", type=Path, required=True, metavar="FILE", help="text that is measured on")
    parser.add_argument("--windows", type=int, default=8, help=f"of {CONTEXT} tokens; default: 8")
    parser.add_argument("--sample", nargs="*", default=list(FIELDS), choices=list(FIELDS), help="default: both")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="must not exist")
    options = parser.parse_args()
    engines = {"llama.cpp": llama_cpp_logits, "CTranslate2": ctranslate2_logits}
    rows, place = [], 0
    for sample in options.sample:
        tokenizer = load_tokenizer(Path(sample))
        ids = tokenizer(options.evaluation.read_text(encoding="utf-8"))["input_ids"][: options.windows * CONTEXT]
        windows = torch.tensor(ids).view(-1, CONTEXT)
        for fields in FIELDS[sample]:
            work = options.work / str(place)
            place += 1
            stock = with_fields(Path(sample), work / "original", fields)
            folders = {"as it is": stock, "folded": materialised(stock, work / "materialised")}
            named = ", ".join(f"{name} {_short(value)}" for name, value in fields.items() if name != "architectures")
            row = [f"{sample}, {named or 'unchanged'}"]
            for engine, logits in engines.items():
                for kind, folder in folders.items():
                    row.append(f"{divergence(stock, folder, logits, windows, work / (engine + kind)):.1e}")
            print(row, flush=True)
            rows.append(row)
    print_table(["model, field", *(f"{engine}, {kind}" for engine in engines for kind in ("as it is", "folded"))], rows)


if __name__ == "__main__":
    main()
