"""Time models without W_Q against their original on one GPU: prefill and decoding, next to what bytes allow.

    python benchmarks/inference_gpu.py
    python benchmarks/inference_gpu.py --shape gpt2 llama-2-7b --compile --json speed.json
    python benchmarks/inference_gpu.py --shape gpt2 --set n_layer=2 --device cpu --dtype float32 --rounds 2

Speed does not depend on what the weights are: every model has a named shape and random weights, drawn on the device,
so nothing is downloaded or fitted. `--checkpoint FOLDER` takes the shape of a config.json. Each map is measured as
`qectomy bench` does, in turn with the original, in eager mode and with --compile also in compiled steps (a minute a
model and batch, so only at --compile-batch). The table comes last.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from setting import print_table

from qectomy.errors import QectomyError
from qectomy.eval.inference_cost import BenchSettings, compare
from qectomy.models.architectures import FAMILIES

LLAMA = dict(model_type="llama", rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": dict(model_type="gpt2"),
    "smollm2-135m": LLAMA
    | dict(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "tinyllama-1b": LLAMA
    | dict(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    ),
    "llama-2-7b": LLAMA | dict(max_position_embeddings=4096),  # what LlamaConfig is by default
}


@torch.no_grad()
def make(out: Path, fields: dict[str, Any], query: str | None, dtype: str, device: str) -> Path:
    """Save a model of this shape with random weights, its W_Q replaced by `query` in every layer; None: stock."""
    family = FAMILIES[fields["model_type"]]
    config = family.config_class(reduced=query is not None)(**{k: v for k, v in fields.items() if k != "model_type"})
    if query is not None:
        config.query_maps = [query] * config.num_hidden_layers
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = family.causal_class(reduced=query is not None)(config)
    finally:
        torch.set_default_dtype(before)
    for name, buffer in model.named_buffers():
        if name.endswith("query.index"):  # by default the channels in order, which are quicker to gather
            buffer.copy_(torch.randint(config.hidden_size, buffer.shape, device=buffer.device))
    model.save_pretrained(out)
    return out


def measure(options: argparse.Namespace, name: str, fields: dict[str, Any], root: Path) -> list[dict[str, Any]]:
    """Return a result of bench, or the reason that there is none, for each map and mode."""
    original = make(root / name, fields, None, options.dtype, options.device)
    rows = []
    for query in options.query:
        reduced = make(root / f"{name}-{query}", fields, query, options.dtype, options.device)
        for compiled in (False, True) if options.compile else (False,):
            settings = BenchSettings(
                batches=tuple(options.compile_batch if compiled else options.batch),
                rounds=options.rounds,
                starts=0 if compiled else options.starts,
                prompt_tokens=options.prompt_tokens,
                new_tokens=options.new_tokens,
                device=options.device,
                dtype=options.dtype,
                compile=compiled,
            )
            begun, row = time.perf_counter(), {"shape": name, "query": query, "compiled": compiled}
            try:
                row["result"] = compare(str(original), str(reduced), settings, progress(f"{name} {query}")).as_dict()
            except (QectomyError, RuntimeError) as error:  # the other maps and modes are worth having
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
            rows.append({**row, "seconds": time.perf_counter() - begun})
            gc.collect()
            if options.device.startswith("cuda"):
                torch.cuda.empty_cache()
    return rows


def progress(name: str) -> Any:
    return lambda done, total, note: print(f"{name} {done}/{total} {note}", file=sys.stderr, flush=True)


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print one line a map, mode and batch."""
    where = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "cpu"
    print(
        f"\n{where}, {options.dtype}, torch {torch.__version__}; prompt {options.prompt_tokens}, {options.new_tokens} "
        f"new tokens, {options.rounds} rounds in turn; ratios above 1 favour the model without W_Q, in brackets their "
        "95 % interval; operations: of a step of decoding in eager mode, each a kernel to launch\n"
    )
    table = []
    for row in rows:
        names = (row["shape"], row["query"], "compiled" if row["compiled"] else "eager")
        if "error" in row:
            print(f"{' '.join(names)}: {row['error']}\n")
            continue
        (a, b), ratios = row["result"]["models"], row["result"]["ratios"]
        for i, decode in enumerate(ratios["decode"]):
            steps = [model["decode"][i] for model in (a, b)]
            fill = a["prefill"][i]["tokens_per_second"]["median"]
            table.append(
                (
                    *names,
                    decode["batch"],
                    f"{fill:,.0f}",
                    spread(ratios["prefill"][i]["ratio"]),
                    f"{steps[0]['tokens_per_second']['median']:,.1f}",
                    f"{steps[0]['bytes_per_second'] / 1e9:,.0f}",
                    spread(decode["ratio"]),
                    f"{decode['byte_limit']:.3f}",
                    f"{decode['share_of_limit']:.1%}",
                    f"{steps[0]['operations_per_step']} / {steps[1]['operations_per_step']}",
                )
            )
    header = ("shape", "map", "mode", "batch", "prefill t/s", "ratio", "decode t/s", "GB/s", "ratio", "limit")
    print_table((*header, "reached", "operations"), table)


def spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["smollm2-135m"])
    parser.add_argument("--checkpoint", type=Path, help="a folder whose config.json gives the shape instead")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="overrides of the config")
    parser.add_argument("--query", nargs="+", default=["identity", "select", "key-shared"], metavar="MAP")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--starts", type=int, default=0, help="fresh processes a map, for load time and memory")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--compile-batch", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    fields = {name: json.loads(value) for name, value in (part.split("=", 1) for part in options.set)}
    shapes = {name: SHAPES[name] | fields for name in options.shape}
    if options.checkpoint:
        config = json.loads((options.checkpoint / "config.json").read_text(encoding="utf-8"))
        shapes = {options.checkpoint.name: {**config, **fields}}
    rows = []
    for name, shape in shapes.items():
        with tempfile.TemporaryDirectory(prefix="qectomy-bench-") as scratch:
            rows += measure(options, name, shape, Path(scratch))
        if options.json:  # what is measured is kept if the next shape does not fit
            options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    show(rows, options)
    return 0 if all("result" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
