"""The sections on what the model lost on average: perplexity, loss by position, error by layer."""

from collections.abc import Sequence

from qectomy.models.query_maps import ranges
from qectomy.record.evaluation import Evaluated
from qectomy.record.reduced import Exact, ExactLayer, Fitted, FittedLayer, Reduced
from qectomy.record.scores import Perplexity
from qectomy.record.texts import TextProtocol
from qectomy.report.moved_words import moved_meaning, moved_table
from qectomy.report.page import numbers
from qectomy.report.page.best import SAVED, best_measurement
from qectomy.report.page.blocks import Block, Chart, Facts, Prose, Section, Table
from qectomy.report.page.charts import layer_chart, perplexity_chart, position_chart
from qectomy.report.page.reading import Folder
from qectomy.report.page.verdict import heldout_ratio
from qectomy.report.text_words import read_as_words, text_doubt

FOREIGN = "{file} in this folder was measured on other checkpoints than this one, and is not shown."
NOT_FITTED = "A dense layer was not fitted: it has no ratio, and is off by what the layers before it left."
Ends = tuple[float, float] | None
SAME_MEASURE = ("name", "text_sha256", "context", "stride", "bos", "scored_tokens", "dtype")


def perplexity_section(folder: Folder, key: str) -> Section | None:
    """Perplexity of original, fitted and healed model, and what `qectomy eval` measured besides."""
    report, blocks = folder.report, list[Block]()
    if found := report.perplexity:
        blocks += _perplexity(report, found, key)
    if folder.results and not folder.owns(folder.results):
        blocks.append(Prose(text=FOREIGN.format(file="evaluation.json")))
    elif folder.results:
        blocks += _evaluation(folder.results, found.protocol if found else None)
        if (best := best_measurement(folder)) and best.file == SAVED:
            blocks.append(Prose(text="The verdict goes by this measurement, the best there is."))
    return Section(key=f"{key}-perplexity", title="Perplexity", blocks=blocks) if blocks else None


def _perplexity(report: Reduced, found: Perplexity, key: str) -> list[Block]:
    healing = report.healing if isinstance(report, Fitted) else None
    rows: list[tuple[str, float, Ends, float | None, Ends]]
    rows = [("original", found.before, found.before_95, None, None)]
    if healing:
        fit = healing.perplexity
        rows.append(("fitted", fit.fitted, fit.fitted_95, fit.fitted_ratio, fit.fitted_ratio_95))
    last = "healed" if healing else "reduced"
    rows.append((last, found.after, found.after_95, found.ratio, found.ratio_95))
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
        if found.ratio_95
        else ""
        if isinstance(report, Exact)
        else "There are too few windows for intervals.",
    )
    caption = "Perplexity and its ratio to the original; bars are 95 % intervals where the report holds them."
    return [
        Chart(picture=chart, caption=caption),
        table,
        Facts(rows=_other_measures(report, found)),
        Prose(text=protocol_words(found.protocol, report)),
    ]


def _other_measures(report: Reduced, found: Perplexity) -> list[tuple[str, str]]:
    rows = []
    for pair, words, digits in (
        (report.bits_per_byte, "Bits per byte", 4),
        (report.word_perplexity, "Word perplexity", 2),
    ):
        if pair:
            rows.append((words, f"{numbers.plain(pair.before, digits)} → {numbers.plain(pair.after, digits)}"))
    if found.difference_95:
        rows.append(("Perplexity lost, 95 %", numbers.between(found.difference_95, "signed")))
    if report.kl is not None:
        rows.append(("Mean KL to the original", f"{numbers.short(max(report.kl, 0))} nats a token"))
    if report.top1_agreement is not None:
        rows.append(("Same most likely token", numbers.percent(report.top1_agreement, 2)))
    return rows


def protocol_words(protocol: TextProtocol, report: Reduced | None = None) -> str:
    """Say how the perplexity was measured."""
    words = f"By {protocol.name}: measured on " if protocol.name else "Measured on "
    if protocol.only_first_tokens is not None:
        words += f"no more than the first {protocol.only_first_tokens:,} tokens, "
    words += f"{protocol.scored_tokens:,} scored tokens of {protocol.text} (sha256 {protocol.text_sha256[:16]})"
    words += f", {read_as}" if (read_as := read_as_words(protocol)) else ""
    words += f"; {protocol.in_words}; BOS token: {protocol.bos}; computed in {protocol.dtype}; {protocol.tail}"
    told = text_doubt(protocol, report) if protocol.overlap else None
    words += f"; {told[1]}" if told else ""
    return words + ". Perplexity on other text differs."


def _evaluation(results: Sequence[Evaluated], known: TextProtocol | None) -> list[Block]:
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
    protocol = results[0].protocol
    same = known is not None and all(getattr(protocol, name) == getattr(known, name) for name in SAME_MEASURE)
    told = [(row.checkpoint, text_doubt(row.own_protocol)) for row in results if row.overlap]
    doubts = [Prose(text=f"{name}: {doubt[1]}.") for name, doubt in told if doubt]
    return [table, Prose(text="By the protocol above." if same else protocol_words(protocol)), *doubts]


def position_section(folder: Folder, key: str) -> Section | None:
    """Mean loss by position in the window."""
    found = folder.report.per_position
    if found is None or not found.before:
        return None
    edges, losses = found.edges, list(zip(found.before, found.after, strict=False))
    names = [_span(edges[i], edges[i + 1] if i + 1 < len(edges) else None) for i in range(len(losses))]
    rows = [
        (name, numbers.plain(before), numbers.plain(after), numbers.signed(after - before, 4))
        for name, (before, after) in zip(names, losses, strict=True)
    ]
    caption = "Where in its window a token stands, and what predicting it costs. A difference that grows to the right "
    caption += "means that long attention suffers most."
    blocks = (
        Chart(picture=position_chart(f"{key}-pos", names, *map(list, zip(*losses, strict=True))), caption=caption),
        Table(caption="Loss by position, nats", columns=("positions", "original", "reduced", "difference"), rows=rows),
    )
    return Section(key=f"{key}-position", title="Loss by position in the window", blocks=blocks)


def _span(start: int, stop: int | None) -> str:
    if stop is None:
        return f"{start}+"
    return str(start) if stop == start + 1 else f"{start}–{stop - 1}"


def layer_section(folder: Folder, key: str) -> Section | None:
    """How far each layer's attention is from the original's, or what exact folding made of each layer."""
    report = folder.report
    if isinstance(report, Exact):
        table = Table(
            caption="What became of each layer’s projections",
            columns=("layers", "W_Q", "W_V", "W_O", "condition", "why"),
            words=(0, 1, 2, 3, 5),
            rows=_exact_rows(report.layers),
            note="gauge: a block of each head is the identity and not stored. identity: the whole W_Q is. Condition: "
            "the worst of the matrices inverted, by which rounding errors may grow.",
        )
        return Section(key=f"{key}-layers", title="What went, layer by layer", blocks=(table,))
    return _fit_section(report, key) if isinstance(report, Fitted) else None


def _fit_section(report: Fitted, key: str) -> Section | None:
    fits = [(layer.map, (layer.index, layer.attention_kl)) for layer in report.layers if layer.attention_kl]
    if not fits:
        return None
    shown = [row for name, row in fits if name != "dense"] or [row for _, row in fits]
    rows = [(index, kl.fitted, kl.heldout) for index, kl in shown]
    caption = "How far each layer’s attention is from the original’s: open circles on the windows it was fitted on, "
    caption += "diamonds on held-out ones. The distance between them is what the fit only learnt by heart."
    caption += " Measured when it was fitted, before healing." if report.healing else ""
    table = Table(
        caption="Attention KL by layer, nats, averaged over heads and positions",
        columns=("layer", "map", "fitted on", "held out", "held out ÷ fitted", "time"),
        words=(0, 1),
        rows=[_layer_row(layer) for layer in report.layers],
        note=NOT_FITTED if "dense" in report.maps else "",
    )
    blocks = (Chart(picture=layer_chart(f"{key}-kl", rows), caption=caption), table)
    return Section(key=f"{key}-layers", title="Error by layer", blocks=blocks)


def moved_section(folder: Folder, key: str) -> Section | None:
    """What the fit changed beside W_Q, layer by layer, where the report says so."""
    heads, rows = moved_table(folder.report)
    if not rows or not isinstance(folder.report, Fitted):
        return None
    table = Table(
        caption="Change of each matrix, as a share of its norm",
        columns=heads,
        words=(0, 1, 6),
        rows=rows,
        note=moved_meaning(folder.report),
    )
    return Section(key=f"{key}-moved", title="What moved beside W_Q", blocks=(table,))


def _layer_row(layer: FittedLayer) -> tuple[str, ...]:
    kl = layer.attention_kl
    fitted, heldout = (kl.fitted, kl.heldout) if kl else (None, None)
    values = numbers.short(fitted), numbers.short(heldout), numbers.plain(heldout_ratio(layer), 2)
    return (str(layer.index), layer.map, *values, numbers.seconds(layer.seconds))


def _exact_rows(layers: Sequence[ExactLayer]) -> list[tuple[str, ...]]:
    """One row for all layers of the same fate."""
    fates: dict[tuple[str, ...], list[ExactLayer]] = {}
    for layer in layers:
        fates.setdefault((layer.map, layer.value_map, layer.output_map, layer.reason), []).append(layer)
    rows: list[tuple[str, ...]] = []
    for (*names, reason), same in fates.items():
        worst = max((found for layer in same for found in layer.conditions), default=None)
        rows.append((ranges([layer.index for layer in same]), *names, numbers.short(worst), reason))
    return rows
