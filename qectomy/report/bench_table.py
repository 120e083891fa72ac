"""The table of `qectomy bench`: one row a cost, both models, their ratio and what bytes allow."""

from rich.markup import escape
from rich.table import Table

from qectomy.record.bench import Bench, Decode, Prefill, Spread
from qectomy.report.tables import console, size

FEWEST_ROUNDS = 6  # of which an interval of 95 % can be made


def show_bench(result: Bench) -> None:
    """Print what two checkpoints cost, and in small print how it was measured."""
    a, b = result.models
    ratios, settings = result.ratios, result.settings
    enough = settings.rounds >= FEWEST_ROUNDS
    table = Table("cost", "original", "reduced", "ratio", "95 %" if enough else "range", "limit", "reached")
    millions = [f"{model.parameters / 1e6:.2f} M" for model in (a, b)]
    table.add_row("parameters", *millions, f"{ratios.parameters:.3f}")
    for name, ours, theirs in (
        ("on disk", a.bytes_on_disk, b.bytes_on_disk),
        ("in memory", a.bytes, b.bytes),
        ("KV a token", a.kv_cache_bytes_per_token, b.kv_cache_bytes_per_token),
        ("peak", a.peak_memory_bytes, b.peak_memory_bytes),
    ):
        if ours and theirs:
            table.add_row(name, size(ours), size(theirs), f"{ours / theirs:.3f}")
    if ratios.load is not None:
        loads = [f"{model.load_seconds.median:.2f} s" for model in (a, b) if model.load_seconds]
        table.add_row("load", *loads, *interval(ratios.load))
    for one, other, filling in zip(a.prefill, b.prefill, ratios.prefill, strict=True):
        table.add_row(f"prefill {filling.batch}", rate(one), rate(other), *interval(filling.ratio))
    for step, their_step, row in zip(a.decode, b.decode, ratios.decode, strict=True):
        bounds = (f"{row.byte_limit:.3f}", f"{row.share_of_limit:.1%}")
        table.add_row(f"decode {row.batch}", rate(step), rate(their_step), *interval(row.ratio), *bounds)
    steps = [model.decode[0].operations_per_step for model in (a, b)]
    table.add_row("operations", *map(str, steps), f"{steps[0] / steps[1]:.3f}")
    console.print(table)
    console.print(f"original: {escape(a.checkpoint)}; reduced: {escape(b.checkpoint)}")
    where = result.device_name or f"{result.device}, {result.threads} threads"
    console.print(
        f"{where}, {result.dtype}; prompt {settings.prompt_tokens}, {settings.new_tokens} new tokens"
        f"{', compiled steps' if settings.compile else ''}; {settings.rounds} rounds in turn, medians; "
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
    for line in result.notes:
        console.print(f"note: {line}", markup=False)
    for line in result.warnings:
        console.print(f"warning: {line}", markup=False)


def rate(row: Prefill | Decode) -> str:
    """Write tokens a second."""
    speed = row.tokens_per_second.median
    return f"{speed:,.0f} t/s" if speed >= 100 else f"{speed:.1f} t/s"


def interval(ratio: Spread) -> tuple[str, str]:
    """Write a ratio, and its interval."""
    median, low, high = (f"{end:.3f}" if end < 100 else f"{end:.4g}" for end in (ratio.median, ratio.low, ratio.high))
    return median, f"{low}-{high}"
