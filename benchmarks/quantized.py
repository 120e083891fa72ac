"""Measure what llama.cpp's quantisation costs materialised folders: perplexity over the same folder's in float32.

Each map's folder is made by `qectomy convert` (or found in --work, as MODEL-MAP), written out by `qectomy materialize`,
written as GGUF and quantised. Every folder's float32 perplexity is also checked against transformers'. It wants an
environment of its own, in which llama.cpp comes as a wheel:

    python3.11 -m venv .cache/engines && .cache/engines/bin/pip install -c constraints.txt -e . cyllama==0.2.18
    .cache/engines/bin/python benchmarks/quantized.py samples/llama samples/gpt2 --calibration samples/kjv_train.txt \\
        --evaluation samples/kjv_heldout.txt --context 256 --tokens 4096 --work .cache/quantized
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from llama_cpp import FILE_TYPES, LlamaCpp, perplexity, quantise, write_gguf
from setting import print_table

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.eval.loading import load_model
from qectomy.eval.protocol import Protocol, scoring_windows
from qectomy.text.text import load_tokenizer, read_source

MAPS = {
    "llama": ("key-shared", "select", "identity", "exact"),
    "gpt2": ("key-shared", "low-rank:8", "identity", "exact"),
}
AGREES = 1e-3  # relative, of two float32 perplexities


def qectomy(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "qectomy", *map(str, arguments)], check=True, stdout=sys.stderr)


def stock_folders(original: str, options: argparse.Namespace) -> dict[str, Path]:
    """Return {name: stock folder} of a model and of its maps, made where --work has none."""
    folders, stem = {"original": Path(original)}, Path(original).name
    for query in options.query or MAPS[open_checkpoint(original).family.model_type.replace("mistral", "llama")]:
        reduced = options.work / f"{stem}-{query.replace(':', '')}"
        stock = options.work / f"{reduced.name}-stock"
        if not reduced.is_dir():
            budget = ["--context", options.context, "--tokens", options.tokens, "--eval-tokens", 2048]
            texts = ["--text", options.calibration, "--eval-text", options.evaluation]
            qectomy("convert", original, "--out", reduced, "--query", query, *texts, *budget)
        if not stock.is_dir():
            qectomy("materialize", reduced, "--out", stock)
        folders[query] = stock
    return folders


@torch.no_grad()
def measure(folder: Path, windows: torch.Tensor, work: Path) -> dict[str, Any]:
    """Return a stock folder's perplexities: by transformers, by llama.cpp in float32 and as quantised."""
    model, _, _ = load_model(str(folder), "float32", "cpu")
    context, n_vocab = windows.shape[1], model.config.vocab_size
    result = {"transformers": perplexity(lambda window: model(torch.tensor([window])).logits[0], windows)}
    whole, small = work / "whole.gguf", work / "small.gguf"
    write_gguf(folder, whole)
    result["F32"] = perplexity(LlamaCpp(whole, context, n_vocab).logits, windows)
    if abs(result["F32"] / result["transformers"] - 1) > AGREES:
        raise SystemExit(f"error: {folder}: llama.cpp {result['F32']}, transformers {result['transformers']}")
    for kind in FILE_TYPES:
        quantise(whole, small, kind)
        result[kind] = perplexity(LlamaCpp(small, context, n_vocab).logits, windows)
    whole.unlink()
    small.unlink()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders of original checkpoints")
    parser.add_argument("--calibration", required=True, metavar="FILE", help="text that is fitted on")
    parser.add_argument("--evaluation", required=True, metavar="FILE", help="text that is measured on")
    parser.add_argument("--query", nargs="*", metavar="MAP", help="maps; default: " + str(MAPS).replace("%", "%%"))
    parser.add_argument("--context", type=int, default=256, help="tokens a window; default: 256")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration; default: 4096")
    parser.add_argument("--eval-tokens", type=int, default=16384, help="of evaluation; default: 16384")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where folders are made and found")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for original in options.models:
        source = open_checkpoint(original)
        protocol = Protocol(context=options.context, tokens=options.eval_tokens)
        held = scoring_windows(
            load_tokenizer(source.folder), read_source(options.evaluation), protocol, source.dims.vocab_size
        )
        whole = torch.tensor([held.length(i) == options.context for i in range(len(held.tokens))])
        windows = held.tokens[whole]  # each is scored from its second token on
        for name, folder in stock_folders(original, options).items():
            print(f"measuring {original}, {name}", file=sys.stderr, flush=True)
            results[f"{Path(original).name}, {name}"] = measure(folder, windows, options.work)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    rows = [
        [name, f"{found['F32']:.4f}", *(f"{found[kind] / found['F32']:.4f}" for kind in FILE_TYPES)]
        for name, found in results.items()
    ]
    print_table(["model, map", "perplexity, F32", *FILE_TYPES], rows)


if __name__ == "__main__":
    main()
