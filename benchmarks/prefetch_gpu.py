"""What it brings that a pass reads the next layer while one computes: streamed scoring, and a conversion.

    python benchmarks/prefetch_gpu.py
    python benchmarks/prefetch_gpu.py --d-model 4096 --d-mlp 14336 --layers 16 --vocab 32000 --cold
    python benchmarks/prefetch_gpu.py --device cpu --d-model 256 --d-mlp 688 --layers 4 --heads 4 --kv-heads 2 \\
        --tokens 2048 --eval-tokens 1024 --context 128 --rounds 1

A Llama of random weights is written to a temporary folder (its default size is 2.0 GB in bfloat16), with a tokenizer of
bytes and a text of random words. Ways to read it, one after the other in each round: each layer when its turn has come
(`as needed`); `ahead`, as qectomy does on this device, which is a thread and a stream of its own on a GPU, and a word
to the system on a processor; there also `by a thread`, which holds two layers. --cold drops the files from the page
cache before every pass. The numbers that come out must be the same in every way. The table comes last: seconds of a
scoring, and of the layers of a conversion; those of them in which the pass waited for a layer; and the peak of the
device's memory. Seconds are medians of the rounds and, in brackets, the least.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from setting import print_table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.checkpoint.prefetch import Layers, LayersAhead, Tensors, read_layers
from qectomy.conversion import layerwise
from qectomy.conversion.fitted import convert
from qectomy.conversion.settings import ConvertSettings
from qectomy.eval import layerwise_model
from qectomy.eval.layerwise_model import StreamedModel, score_streamed
from qectomy.eval.protocol import Protocol, scoring_windows
from qectomy.models.query_maps import parse_recipe
from qectomy.text.text import load_tokenizer, read_source

Reader = Callable[..., Layers]
waited = [0.0]  # seconds for layers, since it was set to 0


class Timed(Layers):
    """Layers that add to `waited` how long each took to come."""

    def __init__(self, layers: Layers):
        self._layers = layers

    def take(self, layer: int) -> Tensors:
        begun = time.perf_counter()
        tensors = self._layers.take(layer)
        waited[0] += time.perf_counter() - begun
        return tensors

    def __enter__(self) -> Layers:
        self._layers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._layers.__exit__(*error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(d_model=2048, d_mlp=5632, layers=22, heads=32, kv_heads=4, vocab=8192).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", help="of the file, and of the scoring")
    parser.add_argument("--tokens", type=int, default=32_768, help="that a conversion is fitted on")
    parser.add_argument("--eval-tokens", type=int, default=32_768, help="that are scored")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--query", default="select", metavar="MAP")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before every pass")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qectomy-prefetch-") as scratch:
        source, text = write_model(options, Path(scratch) / "model"), write_text(options, Path(scratch) / "text.txt")
        score(options, source, text, Path(scratch))  # the first work of a process and of a device takes longer
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for number in range(options.rounds):
            for way, reader in ways(options.device).items():
                layerwise_model.read_layers = layerwise.read_layers = reader
                for what, run in (("scoring", score), ("conversion", fit)):
                    out = Path(scratch) / f"{way}-{number}".replace(" ", "-")
                    result = measured(options, source, lambda run=run, out=out: run(options, source, text, out))
                    found.setdefault((what, way), []).append(result)
                    print(f"round {number + 1}: {what}, {way}: {result['seconds']:.2f} s", file=sys.stderr, flush=True)
    for what in ("scoring", "conversion"):
        numbers = {row["number"] for (kind, _), rows in found.items() if kind == what for row in rows}
        assert len(numbers) == 1, f"{what}: the ways differ: {numbers}"
    show(options, source, found)
    return 0


def ways(device: str) -> dict[str, Reader]:
    """Return how layers can be read, by name."""

    def plain(kind: type[Layers]) -> Reader:
        def reader(checkpoint: Checkpoint, layers: Any, dtype: Any, device: Any, *, on_host: bool = False) -> Layers:
            def read(layer: int) -> Tensors:
                tensors = checkpoint.read_layer(layer, dtype)
                return tensors if on_host else {name: tensor.to(device) for name, tensor in tensors.items()}

            return Timed(kind(layers, read))

        return reader

    def ahead(*told: Any, **named: Any) -> Layers:
        return Timed(read_layers(*told, **named))

    found = {"as needed": plain(Layers), "ahead": ahead}
    return found | ({"by a thread": plain(LayersAhead)} if device == "cpu" else {})


def measured(options: argparse.Namespace, source: Checkpoint, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a pass found, with its seconds and the peak of the device's memory."""
    on_gpu = options.device.startswith("cuda")
    if options.cold:
        drop_from_page_cache(source)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    waited[0] = 0.0
    begun = time.perf_counter()
    result = run()
    if on_gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_reserved() if on_gpu else 0
    return {"seconds": time.perf_counter() - begun, **result, "waited": waited[0], "peak": peak}


def drop_from_page_cache(source: Checkpoint) -> None:
    for name in source.files:
        with (source.folder / name).open("rb") as file:
            os.fsync(file.fileno())  # what is not written yet is not dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def score(options: argparse.Namespace, source: Checkpoint, text: Path, out: Path) -> dict[str, Any]:
    """Score the text, one layer at a time."""
    protocol = Protocol(context=options.context, tokens=options.eval_tokens)
    windows = scoring_windows(load_tokenizer(source.folder), read_source(str(text)), protocol, source.dims.vocab_size)
    model = StreamedModel(source, getattr(torch, options.dtype), options.device)
    return {"number": float(score_streamed([model], windows)[0].nll.sum())}


def fit(options: argparse.Namespace, source: Checkpoint, text: Path, out: Path) -> dict[str, Any]:
    """Convert the checkpoint."""
    settings = ConvertSettings(
        texts=(str(text),),
        tokens=options.tokens,
        eval_tokens=options.eval_tokens,
        context=options.context,
        device=options.device,
    )
    report = convert(source, out, tuple(parse_recipe(options.query, source.dims)), settings)
    digests = "".join(report["tensors_sha256"].values())
    return {"number": digests, "seconds": sum(layer["seconds"] for layer in report["layers"])}


def write_model(options: argparse.Namespace, folder: Path) -> Checkpoint:
    config = LlamaConfig(
        hidden_size=options.d_model,
        intermediate_size=options.d_mlp,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocab,
        max_position_embeddings=max(2048, options.context),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, options.dtype))
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return open_checkpoint(folder)


def write_text(options: argparse.Namespace, path: Path) -> Path:
    """Write as many words as are needed; a byte is a token."""
    chance = random.Random(0)
    letters = options.tokens + 2 * options.eval_tokens
    path.write_text(" ".join("".join(chance.choices("etaoinshrdlu", k=5)) for _ in range(letters // 5)))
    return path


def show(options: argparse.Namespace, source: Checkpoint, found: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    on_gpu = options.device.startswith("cuda")
    where = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    size = source.nbytes / source.dims.n_layers / 1e6
    cache = "a cold" if options.cold else "a warm"
    print(f"\n{where}; {source.dims.n_layers} layers, {size:,.0f} MB each in {options.dtype}; {cache} page cache\n")
    rows = []
    for (what, way), runs in sorted(found.items(), key=lambda item: item[0][0], reverse=True):
        seconds = [
            f"{statistics.median(values):.2f} ({min(values):.2f})"
            for values in ([run[name] for run in runs] for name in ("seconds", "waited"))
        ]
        peak = f"{max(run['peak'] for run in runs) / 1e6:,.0f}" if on_gpu else "-"
        rows.append((f"{what}, {way}", *seconds, peak))
    print_table(("pass", "seconds", "waiting", "device MB"), rows)


if __name__ == "__main__":
    sys.exit(main())
