"""The sections on what the model lost on average: perplexity, loss by position, error by layer."""

import math
from collections.abc import Sequence
from typing import Any

from qectomy.models.query_maps import ranges
from qectomy.record.evaluation import Evaluated
from qectomy.report.moved_words import moved_meaning, moved_table
from qectomy.report.page import numbers
from qectomy.report.page.best import SAVED, best_report
from qectomy.report.page.blocks import Block, Chart, Facts, Prose, Section, Table
from qectomy.report.page.charts import layer_chart, perplexity_chart, position_chart
from qectomy.report.page.reading import Folder
from qectomy.report.page.verdict import heldout_ratio
from qectomy.report.text_words import read_as_words, text_doubt

CONDITIONS = ("W_Q_condition", "basis_condition", "pivot_condition")
FOREIGN = "{file} in this folder was measured on other checkpoints than this one, and is not shown."
NOT_FITTED = "A dense layer was not fitted: it has no ratio, and is off by what the layers before it left."
SAME_MEASURE = ("name", "text_sha256", "context", "stride", "bos", "scored_tokens", "dtype")


def perplexity_section(folder: Folder, key: str) -> Section | None:
    """Perplexity of original, fitted and healed model, and what `qectomy eval` measured besides."""
    report, blocks = folder.report, list[Block]()
    found = report.get("perplexity")
    if found:
        blocks += _perplexity(report, found, key)
    if folder.results and not folder.owns(folder.results):
        blocks.append(Prose(text=FOREIGN.format(file="evaluation.json")))
    elif folder.results:
        blocks += _evaluation(folder.results, found.get("protocol", {}) if found else {})
        if best_report(folder).get("perplexity", {}).get("file") == SAVED:
            blocks.append(Prose(text="The verdict goes by this measurement, the best there is."))
    return Section(key=f"{key}-perplexity", title="Perplexity", blocks=blocks) if blocks else None


def _perplexity(report: dict[str, Any], found: dict[str, Any], key: str) -> list[Block]:
    healed = report.get("healing", {}).get("perplexity", {})
    last, exact = "healed" if healed else "reduced", report.get("method") == "exact"
    rows: list[tuple[str, float, Any, float | None, Any]]
    rows = [("original", found["before"], found.get("before_95"), None, None)]
    if "fitted" in healed and "fitted_ratio" in healed:
        bounds = healed.get("fitted_95"), healed.get("fitted_ratio_95")
        rows.append(("fitted", healed["fitted"], bounds[0], healed["fitted_ratio"], bounds[1]))
    rows.append((last, found["after"], found.get("after_95"), found["ratio"], found.get("ratio_95")))
    chart = perplexity_chart(
        f"{key}-ppl",
        [(name, value, bar) for name, value, bar, _, _ in rows],
        [(name, ratio, bar) for name, _, _, ratio, bar in rows if ratio is not None],
    )
    table = Table(
        caption="Perplexity, lower is better",
        columns=("model", "perplexity", "95 % interval", "ratio", "95 % interval of the ratio"),
        rows=[
            (
                name,
                numbers.plain(value),
                numbers.between(bar),
                numbers.ratio(ratio or 1.0),
                numbers.between(spread, "ratio"),
            )
            for name, value, bar, ratio, spread in rows
        ],
        note="The interval of the ratio pairs both models on the same windows and is the one to judge by: those of "
        "each model alone are wide because windows differ, and they overlap even where the difference is certain."
        if "ratio_95" in found
        else ""
        if exact
        else "There are too few windows for intervals, or the report was made by an older version.",
    )
    caption = "Perplexity and its ratio to the original; bars are 95 % intervals where the report holds them."
    return [
        Chart(picture=chart, caption=caption),
        table,
        Facts(rows=_other_measures(report)),
        Prose(text=protocol_words(found.get("protocol", {}), report)),
    ]


def _other_measures(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, words, digits in (("bits_per_byte", "Bits per byte", 4), ("word_perplexity", "Word perplexity", 2)):
        if name in report:
            before, after = (numbers.plain(report[name][when], digits) for when in ("before", "after"))
            rows.append((words, f"{before} → {after}"))
    if "difference_95" in report["perplexity"]:
        rows.append(("Perplexity lost, 95 %", numbers.between(report["perplexity"]["difference_95"], "signed")))
    if "kl" in report:
        rows.append(("Mean KL to the original", f"{numbers.short(max(report['kl'], 0))} nats a token"))
    if "top1_agreement" in report:
        rows.append(("Same most likely token", numbers.percent(report["top1_agreement"], 2)))
    return rows


def protocol_words(protocol: dict[str, Any], report: dict[str, Any]) -> str:
    """Say how the perplexity was measured, as far as the report tells."""
    if not protocol:
        return "How it was measured is not recorded."
    words = f"By {protocol['name']}: measured on " if "name" in protocol else "Measured on "
    if "only_first_tokens" in protocol:
        words += f"no more than the first {protocol['only_first_tokens']:,} tokens, "
    words += f"{protocol['scored_tokens']:,} scored tokens of " if "scored_tokens" in protocol else ""
    words += protocol.get("text", "a text")
    words += f" (sha256 {protocol['text_sha256'][:16]})" if "text_sha256" in protocol else ""
    words += f", {read_as}" if (read_as := read_as_words(protocol)) else ""
    if "in_words" in protocol:
        words += f"; {protocol['in_words']}"
    elif "context" in protocol:
        words += f", in windows of {protocol['context']:,} tokens"
        stride = protocol.get("stride", protocol["context"])
        apart = "side by side" if stride == protocol["context"] else f"{stride:,} tokens apart, each scoring its last"
        words += f", {apart}"
    for name, say in (("bos", "BOS token: {}"), ("dtype", "computed in {}"), ("tail", "{}")):
        words += f"; {say.format(protocol[name])}" if name in protocol else ""
    told = text_doubt(report, protocol) if "overlap" in protocol else None
    words += f"; {told[1]}" if told else ""
    return words + ". Perplexity on other text differs."


def _evaluation(results: Sequence[Evaluated], known: dict[str, Any]) -> list[Block]:
    rows = [
        (
            result.checkpoint,
            numbers.plain(result.perplexity),
            numbers.between(result.perplexity_95),
            numbers.ratio(result.paired.ratio if result.paired else None),
            numbers.between(result.paired.ratio_95 if result.paired else None, "ratio"),
            numbers.plain(result.bits_per_byte, 4),
            numbers.short(result.kl),
            numbers.percent(result.top1_agreement, 2),
        )
        for result in results
    ]
    columns = ("checkpoint", "perplexity", "95 %", "ratio", "95 %", "bits/byte", "KL", "same top token")
    table = Table(caption="Measured again by qectomy eval", columns=columns, rows=rows)
    protocol = results[0].protocol.as_dict()
    same = all(protocol.get(name) == known.get(name) for name in SAME_MEASURE)
    told = [(row.checkpoint, text_doubt({}, {"overlap": row.overlap.as_dict()})) for row in results if row.overlap]
    doubts = [Prose(text=f"{name}: {doubt[1]}.") for name, doubt in told if doubt]
    return [table, Prose(text="By the protocol above." if same else protocol_words(protocol, {})), *doubts]


def position_section(folder: Folder, key: str) -> Section | None:
    """Mean loss by position in the window."""
    found = folder.report.get("per_position")
    if found is None:
        return None
    edges, count = found["edges"], min(len(found["before"]), len(found["after"]))
    names = [_span(edges[i], edges[i + 1] if i + 1 < len(edges) else None) for i in range(count)]
    before, after = ([math.nan if v is None else v for v in found[when][:count]] for when in ("before", "after"))
    if not any(math.isfinite(a + b) for a, b in zip(before, after, strict=True)):
        return None
    rows = [
        (name, *(numbers.DASH if math.isnan(value) else write(value) for value, write in values))
        for name, *values in (
            (name, (old, numbers.plain), (new, numbers.plain), (new - old, lambda v: numbers.signed(v, 4)))
            for name, old, new in zip(names, before, after, strict=True)
        )
    ]
    caption = "Where in its window a token stands, and what predicting it costs. A difference that grows to the right "
    caption += "means that long attention suffers most."
    blocks = (
        Chart(picture=position_chart(f"{key}-pos", names, before, after), caption=caption),
        Table(caption="Loss by position, nats", columns=("positions", "original", "reduced", "difference"), rows=rows),
    )
    return Section(key=f"{key}-position", title="Loss by position in the window", blocks=blocks)


def _span(start: int, stop: int | None) -> str:
    if stop is None:
        return f"{start}+"
    return str(start) if stop == start + 1 else f"{start}–{stop - 1}"


def layer_section(folder: Folder, key: str) -> Section | None:
    """How far each layer's attention is from the original's, or what exact folding made of each layer."""
    layers = folder.report["layers"]
    fits = [(layer, layer["attention_kl"]) for layer in layers if layer.get("attention_kl")]
    if fits:
        rows = [(layer["index"], kl.get("fitted"), kl.get("heldout")) for layer, kl in fits if layer["map"] != "dense"]
        rows = rows or [(layer["index"], kl.get("fitted"), kl.get("heldout")) for layer, kl in fits]
        caption = (
            "How far each layer’s attention is from the original’s: open circles on the windows it was fitted on, "
        )
        caption += "diamonds on held-out ones. The distance between them is what the fit only learnt by heart."
        caption += " Measured when it was fitted, before healing." if "healing" in folder.report else ""
        table = Table(
            caption="Attention KL by layer, nats, averaged over heads and positions",
            columns=("layer", "map", "fitted on", "held out", "held out ÷ fitted", "time"),
            words=(0, 1),
            rows=[_layer_row(layer) for layer in layers],
            note=NOT_FITTED if any(layer["map"] == "dense" for layer in layers) else "",
        )
        blocks: tuple[Block, ...] = (Chart(picture=layer_chart(f"{key}-kl", rows), caption=caption), table)
        return Section(key=f"{key}-layers", title="Error by layer", blocks=blocks)
    if folder.report.get("method") != "exact":
        return None
    table = Table(
        caption="What became of each layer’s projections",
        columns=("layers", "W_Q", "W_V", "W_O", "condition", "why"),
        words=(0, 1, 2, 3, 5),
        rows=_exact_rows(layers),
        note="gauge: a block of each head is the identity and not stored. identity: the whole W_Q is. Condition: the "
        "worst of the matrices inverted, by which rounding errors may grow.",
    )
    return Section(key=f"{key}-layers", title="What went, layer by layer", blocks=(table,))


def moved_section(folder: Folder, key: str) -> Section | None:
    """What the fit changed beside W_Q, layer by layer, where the report says so."""
    heads, rows = moved_table(folder.report)
    if not rows:
        return None
    table = Table(
        caption="Change of each matrix, as a share of its norm",
        columns=heads,
        words=(0, 1, 6),
        rows=rows,
        note=moved_meaning(folder.report),
    )
    return Section(key=f"{key}-moved", title="What moved beside W_Q", blocks=(table,))


def _layer_row(layer: dict[str, Any]) -> tuple[str, ...]:
    kl = layer.get("attention_kl", {})
    values = numbers.short(kl.get("fitted")), numbers.short(kl.get("heldout")), numbers.plain(heldout_ratio(layer), 2)
    return (str(layer["index"]), layer["map"], *values, numbers.seconds(layer.get("seconds")))


def _exact_rows(layers: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row for all layers of the same fate."""
    fates: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for layer in layers:
        maps = layer["map"], layer.get("value_map", "dense"), layer.get("output_map", "dense")
        fates.setdefault((*maps, layer.get("reason", numbers.DASH)), []).append(layer)
    rows: list[tuple[str, ...]] = []
    for (*names, reason), same in fates.items():
        worst = [layer[name] for layer in same for name in CONDITIONS if name in layer]
        shown = numbers.short(max(worst, default=None))
        rows.append((ranges([layer["index"] for layer in same]), *names, shown, reason))
    return rows
