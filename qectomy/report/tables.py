"""What the commands print for people: compact tables on stdout, plain where it is no terminal."""

import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from qectomy.errors import clean
from qectomy.models.query_maps import ranges
from qectomy.record.healing import Healing
from qectomy.record.reduced import Exact, Fitted, FoldPlan, Plan, Totals
from qectomy.report.moved_words import moved_summary
from qectomy.report.query_share import query_share
from qectomy.report.text_words import text_doubt

console = Console(highlight=False, soft_wrap=False, emoji=False)
FATES = {
    "exact": "goes whole, without loss",
    "gauge": "stays but for a block of each head, which goes without loss",
    "least squares": "does not go without loss",
    "refused": "stays",
    "kept": "stays",
}


def show_plan(plan: Plan) -> None:
    """Print the plan of a dry run."""
    console.print(", ".join(f"{i}={name}" for i, name in enumerate(plan.plan)), markup=False)
    _show_sizes(plan)
    show_needs(plan.needs)
    console.print("dry run: nothing was written, and the texts were not read")


def show_conversion(report: Fitted) -> None:
    """Print the outcome of a conversion."""
    perplexity, bits = report.perplexity, report.bits_per_byte
    _show_sizes(report)
    console.print(
        f"perplexity {perplexity.before:.3f} -> {perplexity.after:.3f} (x {perplexity.ratio:.4f}; 95 %: "
        f"{between(perplexity.ratio_95, 4)}), bits per byte {bits.before:.4f} -> {bits.after:.4f}, "
        f"KL {report.kl:.4f}, top-1 agreement {report.top1_agreement:.1%}"
    )
    console.print(f"moved, ‖W' - W‖ / ‖W‖: {'; '.join(moved_summary(report))}", markup=False)
    show_doubt(report)
    seconds, forward = report.seconds["total"], report.forward_pass_seconds
    times = f", as long as the original takes to read the same tokens {seconds / forward:.1f} times" if forward else ""
    console.print(f"{seconds:.0f} s{times}; peak memory {size(report.peak_memory_bytes)}")


def show_healing(report: Fitted, healing: Healing) -> None:
    """Print what healing came to."""
    protocol, found, kl, agreement = report.perplexity.protocol, healing.perplexity, healing.kl, healing.top1_agreement
    table = Table("model", "perplexity", "ratio", "95 %", "KL", "top-1 agreement")
    table.add_row("original", f"{found.original:.3f}", "1", "", "", "")
    for kind, perplexity, ratio, interval, nats, same in (
        ("fitted", found.fitted, found.fitted_ratio, found.fitted_ratio_95, kl.fitted, agreement.fitted),
        ("healed", found.healed, found.healed_ratio, found.healed_ratio_95, kl.healed, agreement.healed),
    ):
        table.add_row(kind, f"{perplexity:.3f}", f"{ratio:.4f}", between(interval, 4), f"{nats:.4f}", f"{same:.1%}")
    console.print(table)
    fitted_on = ", which the reduced model was fitted on" if protocol.fitted_on else ""
    console.print(
        f"measured on {protocol.scored_tokens:,} tokens of {protocol.text} in windows of {protocol.context}, "
        f"not trained on{fitted_on}",
        markup=False,
    )
    show_doubt(report)
    if not healing.teacher_is_source:
        console.print("the teacher is not the checkpoint that the reduced one was made from, by its qectomy.json")
    seconds, early = healing.seconds.training, healing.steps < healing.planned_steps
    stopped = f", of {healing.planned_steps} planned (--patience, --minutes)" if early else ""
    best = f"step {healing.best_step} was best on the validation windows and is kept"
    if not healing.best_step:
        best = "no step was better on the validation windows than the start, whose weights are kept: try a lower --lr"
    console.print(
        f"{healing.tokens:,} tokens in {healing.steps} steps{stopped}, {seconds:.0f} s "
        f"({healing.tokens / max(seconds, 1e-9):,.0f} tokens/s); {best}"
    )


def show_doubt(report: Fitted) -> None:
    """Print whether the measured text stands in what was fitted or trained on."""
    if doubt := text_doubt(report.perplexity.protocol, report):
        console.print(("" if doubt[0] else "! ") + doubt[1], markup=False)


def show_exact(report: Exact | FoldPlan) -> None:
    """Print the outcome of an exact conversion, or of its dry run."""
    table = Table("layers", "W_Q", "W_V", "W_O", "cond W_Q", "cond Θ", "cond pivots")
    records = [layer.model_dump() for layer in report.layers]
    for layers, row in _runs(records, "map", "value_map", "output_map"):
        conditions = (_worst(row[name]) for name in ("W_Q_condition", "basis_condition", "pivot_condition"))
        table.add_row(layers, row["map"], row["value_map"], row["output_map"], *conditions)
    console.print(table)
    console.print(
        "gauge: a block of each head is the identity, not stored; conditions, the layers' worst: of W_Q where it could "
        "go, of the change of basis that takes it out, of the pivots of a gauge",
        markup=False,
    )
    show_verdicts(records)
    for layers, row in _runs([layer for layer in records if layer["value_reason"]], "value_reason"):
        console.print(f"heads of {layers_of(layers)} without a gauge: {row['value_reason']}", markup=False)
    _show_sizes(report)
    if report.tie != "none":
        what = "stay tied" if report.tie == "kept" else "are no longer tied; what the head adds is counted"
        console.print(f"embedding and head {what}")
    if isinstance(report, FoldPlan):
        if report.needs:
            show_needs(report.needs, "an exact")
        console.print("dry run: nothing was written")
        return
    on, error = report.logit_error_on, report.logit_error
    console.print(f"largest difference of a logit in float64, on {on}: {error:.1e} of the largest logit")
    if found := report.perplexity:
        console.print(
            f"perplexity {found.before:.4f} -> {found.after:.4f} (x {found.ratio:.6f}), "
            f"KL {max(report.kl or 0, 0):.1e}, top-1 agreement {report.top1_agreement:.2%}"
        )
    console.print(f"{report.seconds['total']:.0f} s; peak memory {size(report.peak_memory_bytes)}")


def show_verdicts(layers: list[dict[str, Any]]) -> None:
    """Print once what becomes of the W_Q of layers that share a reason, where nothing is fitted."""
    for numbers, row in _runs(layers, "how", "reason"):
        console.print(f"W_Q of {layers_of(numbers)} {FATES[row['how']]}: {row['reason']}", markup=False)


def _runs(records: list[dict[str, Any]], *fields: str) -> list[tuple[str, dict[str, Any]]]:
    """Gather layers of the same `fields`: [("0-4, 6", those fields, and lists of the layers' condition numbers)]."""
    numbers = ("W_Q_condition", "basis_condition", "pivot_condition")
    runs: dict[tuple[Any, ...], tuple[list[int], dict[str, Any]]] = {}
    for record in records:
        fate = {name: record[name] for name in fields}
        layers, row = runs.setdefault(tuple(fate.values()), ([], {**fate, **{name: [] for name in numbers}}))
        layers.append(record["index"])
        for name in numbers:
            row[name].append(record.get(name))
    return [(ranges(layers), row) for layers, row in runs.values()]


def layers_of(numbers: str) -> str:
    return f"layer {numbers}" if numbers.isdigit() else f"layers {numbers}"


def _worst(numbers: list[float | None]) -> str:
    found = [number for number in numbers if number is not None]
    return f"{max(found):.3g}" if found else "-"


def show_certificate(result: dict[str, Any]) -> None:
    """Print a certificate of `qectomy verify`."""
    dtype, merged = result["dtype"], any(row["output_map"] == "merged" for row in result["layers"])
    table = Table("layer", "W_Q", "W_V", *(["W_O"] if merged else []), "κ", "bound", "float64", dtype, "off")
    for row in result["layers"]:
        table.add_row(
            str(row["index"]),
            row["map"],
            row["value_map"],
            *([row["output_map"]] if merged else []),
            "-" if row["condition"] is None else f"{row['condition']:.3g}",
            "-" if row["bound"] is None else f"{row['bound']:.0e}",
            f"{row['error_float64']:.0e}",
            f"{row[f'error_{dtype}']:.0e}",
            "-" if row["roundings"] is None else f"{row['roundings']:.2g}",
        )
    console.print(table)
    console.print(
        f"κ: condition of the layer's bases and pivots; bound: of each product of its weights, by κ; float64, {dtype}: "
        "what its W_down reads, off by as a share of the largest; off: its tensors, in roundings from the exact ones",
        markup=False,
    )
    text = result["text"]
    console.print(f"measured on {text['tokens']:,} tokens of {text['text']}", markup=False)
    for name in dict.fromkeys(("float64", dtype)):
        found = result[name]
        more = f", perplexity x {found['ratio']:.6f}, KL {max(found['kl'], 0):.1e}" if "ratio" in found else ""
        console.print(f"logits in {name}: off by {found['logit_error']:.1e} of the largest{more}")
    for reason in result["reasons"]:
        console.print(f"- {reason}", markup=False)
    if result["bound"] is not None and result["bound"] > 1:
        console.print(f"the layers' bounds add up to more than the logits: in {dtype} only the measure says how close")
    renew = clean(shlex.join(["qectomy", "renew", result["reduced"]]))
    if not result["code_as_shipped"]:
        console.print(
            "not covered: the model code beside the weights, which is missing or not this version's; to put this "
            f"version's there: {renew}",
            markup=False,
            soft_wrap=True,
        )
    if not result["channel_numbers_told"]:
        console.print(
            "not covered: config.json has no index_sha256, so a program that loads the folder does not notice other "
            f"channel numbers than were written (query.index or pivots); to add it: {renew}",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"verdict: {result['verdict']} ({_compared(result)})")


def _compared(result: dict[str, Any]) -> str:
    """Say what the tensors were held against: what exact folding gives, or what a fit wrote."""
    tensors, as_written = result["tensors"], result["tensors_as_written"]
    if result["bound"] is not None:
        return f"{result['tensors_proved']} of {tensors} tensors are what exact folding gives"
    if as_written is None:
        return "fitted, and qectomy.json has no sha256 of what was written"
    return f"fitted; {as_written} of {tensors} tensors are as they were written, by their sha256"


def shown(number: float | None, digits: int) -> str:
    """Write a number, or a dash where there is none."""
    return "-" if number is None else f"{number:.{digits}f}"


def between(edges: Sequence[float] | None, digits: int) -> str:
    """Write an interval, or a dash where there is none."""
    return "-" if edges is None else f"{edges[0]:.{digits}f} to {edges[1]:.{digits}f}"


def size(n_bytes: int | float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"


def _show_sizes(report: Totals) -> None:
    parameters, n_bytes = report.parameters, report.bytes
    console.print(
        f"parameters {parameters.before:,} -> {parameters.after:,} ({parameters.removed:.2%} fewer), "
        f"bytes {size(n_bytes.before)} -> {size(n_bytes.after)}"
    )
    if (queries := query_share(report)) is not None:
        console.print(f"W_Q removed {100 * queries.removed:.1f} %, {queries.words}")


def show_needs(needs: dict[str, Any], which: str = "a fitted") -> None:
    """Print what a conversion is foretold to need; without a probe there is no time."""
    device = f"{size(needs['device_memory_bytes'])} on the device, " if "device_memory_bytes" in needs else ""
    text = f" ({needs['tokens']:,} + {needs['eval_tokens']:,} tokens)" if "tokens" in needs else ""
    console.print(
        f"{which} conversion here{text} needs about {size(needs['peak_memory_bytes'])} of memory, give or take 15 % "
        f"(most in its stage {needs['peak_memory_stage']}), {device}{size(needs['disk_bytes'])} of disk{_time(needs)}"
    )


def _time(needs: dict[str, Any]) -> str:
    """Write the seconds for people, and which three stages take most of them; nothing where they were not foretold."""
    seconds, stages = needs["seconds"], needs["stages"]
    if seconds is None:
        return ""
    longest = sorted(stages, key=lambda stage: -stages[stage])[:3]
    shares = ", ".join(f"{stage} {stages[stage] / seconds:.0%}" for stage in longest)
    return f" and {duration(seconds)} ({shares})"


def duration(seconds: float) -> str:
    """Write a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
