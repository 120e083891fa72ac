"""The table of `qectomy bench`: one row a cost, both models, their ratio and what bytes allow."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from qectomy.report.tables import console, size

FEWEST_ROUNDS = 6  # of which an interval of 95 % can be made
ENDS = ("median", "low", "high")


def show_bench(result: dict[str, Any]) -> None:
    """Print what two checkpoints cost, and in small print how it was measured."""
    a, b = result["models"]
    ratios, settings = result["ratios"], result["settings"]
    enough = settings["rounds"] >= FEWEST_ROUNDS
    table = Table("cost", "original", "reduced", "ratio", "95 %" if enough else "range", "limit", "reached")
    millions = [f"{model['parameters'] / 1e6:.2f} M" for model in (a, b)]
    table.add_row("parameters", *millions, f"{ratios['parameters']:.3f}")
    sizes = {
        "on disk": "bytes_on_disk",
        "in memory": "bytes",
        "KV a token": "kv_cache_bytes_per_token",
        "peak": "peak_memory_bytes",
    }
    for name, key in sizes.items():
        if a[key] is not None:
            table.add_row(name, size(a[key]), size(b[key]), f"{a[key] / b[key]:.3f}")
    if ratios["load"] is not None:
        loads = [f"{model['load_seconds']['median']:.2f} s" for model in (a, b)]
        table.add_row("load", *loads, *interval(ratios["load"]))
    for i, row in enumerate(ratios["prefill"]):
        speeds = [rate(model["prefill"][i]) for model in (a, b)]
        table.add_row(f"prefill {row['batch']}", *speeds, *interval(row["ratio"]))
    for i, row in enumerate(ratios["decode"]):
        speeds = [rate(model["decode"][i]) for model in (a, b)]
        bounds = (f"{row['byte_limit']:.3f}", f"{row['share_of_limit']:.1%}")
        table.add_row(f"decode {row['batch']}", *speeds, *interval(row["ratio"]), *bounds)
    steps = [model["decode"][0]["operations_per_step"] for model in (a, b)]
    table.add_row("operations", *map(str, steps), f"{steps[0] / steps[1]:.3f}")
    console.print(table)
    console.print(f"original: {escape(a['checkpoint'])}; reduced: {escape(b['checkpoint'])}")
    where = result["device_name"] or f"{result['device']}, {result['threads']} threads"
    console.print(
        f"{where}, {result['dtype']}; prompt {settings['prompt_tokens']}, {settings['new_tokens']} new tokens"
        f"{', compiled steps' if settings['compile'] else ''}; {settings['rounds']} rounds in turn, medians; "
        "ratios are the original's cost over the reduced one's in the same round, with "
        f"{'their 95 % interval' if enough else 'their range (an interval takes six rounds)'}: above 1 favours "
        "the reduced",
        markup=False,
    )
    console.print(
        "prefill, decode: tokens a second at that batch; limit: the ratio of the bytes that a step of decoding reads, "
        "weights and cache; reached: the ratio as a share of it; peak: memory of loading, a prefill and a few steps; "
        "operations: what is computed or copied in a step of decoding, in eager mode",
        markup=False,
    )
    for line in result["notes"]:
        console.print(f"note: {line}", markup=False)
    for line in result["warnings"]:
        console.print(f"warning: {line}", markup=False)


def rate(row: dict[str, Any]) -> str:
    """Write tokens a second."""
    speed = row["tokens_per_second"]["median"]
    return f"{speed:,.0f} t/s" if speed >= 100 else f"{speed:.1f} t/s"


def interval(ratio: dict[str, float]) -> tuple[str, str]:
    """Write a ratio, and its interval."""
    median, low, high = (f"{ratio[end]:.3f}" if ratio[end] < 100 else f"{ratio[end]:.4g}" for end in ENDS)
    return median, f"{low}-{high}"
