"""The sections on sizes, speed, time and provenance."""

from collections.abc import Callable

from qectomy.models.query_maps import ranges
from qectomy.record.bench import BenchModel, Decode, Prefill, Spread
from qectomy.record.reduced import ExactLayer, Fitted, Layer, Reduced
from qectomy.report.page import numbers
from qectomy.report.page.blocks import Block, Cell, Chart, Command, Facts, Prose, Section, Table
from qectomy.report.page.charts import removed_chart, singular_chart
from qectomy.report.page.quality import FOREIGN
from qectomy.report.page.reading import Folder
from qectomy.report.query_share import query_share


def removed_section(folder: Folder, key: str) -> Section:
    """What was removed: of the whole model, of its queries, and layer by layer where the weights could be read."""
    report, layers = folder.report, folder.layers
    blocks: list[Block] = [_totals(report, folder)]
    if layers:
        rows = [(layer.index, float(layer.query_before), float(layer.query_after)) for layer in layers]
        caption = "Outlines: W_Q as it was. Filled: what stands in its place."
        blocks.append(Chart(picture=removed_chart(f"{key}-removed", rows), caption=caption))
        maps = {layer.index: layer.map for layer in report.layers}
        table = Table(
            caption="Numbers stored by each layer",
            columns=("layer", "map", "queries before", "now", "all else before", "now", "bytes now"),
            words=(0, 1),
            rows=[
                (
                    str(layer.index),
                    maps.get(layer.index, numbers.DASH),
                    *map(numbers.whole, (layer.query_before, layer.query_after, layer.rest_before, layer.rest_after)),
                    numbers.bytes_(layer.bytes_after),
                )
                for layer in layers
            ],
            note="All else: keys, values, output, MLP and norms. What went there are biases that the folding made "
            "superfluous and, in an exact fold, blocks of W_V.",
        )
        blocks.append(table)
    else:
        text = f"Query maps: {recipe_words(report)}. The weights were not beside the report, or are of "
        blocks.append(Prose(text=text + "another version, so that there are no sizes of each layer."))
    return Section(key=f"{key}-removed", title="What was removed, and where", blocks=blocks)


def _totals(report: Reduced, folder: Folder) -> Table:
    parts: list[tuple[str, float, float, Callable[[float], str]]] = [
        ("the whole model", report.parameters.before, report.parameters.after, numbers.whole)
    ]
    if (queries := query_share(report)) is not None:
        what = "W_Q of all layers, and what stands in its place"
        parts.append((what, queries.before, queries.after, numbers.whole))
    if folder.layers:
        rest = sum(layer.rest_before for layer in folder.layers), sum(layer.rest_after for layer in folder.layers)
        parts.append(("all else in its layers", *rest, numbers.whole))
    parts.append(("bytes of the weights", report.bytes.before, report.bytes.after, numbers.bytes_))
    return Table(
        caption="Numbers stored, net: all that was added is counted",
        columns=("part", "before", "now", "removed", "share"),
        rows=[
            (name, write(before), write(after), write(before - after), numbers.percent(1 - after / before, 2))
            for name, before, after, write in parts
        ],
    )


def recipe_words(report: Reduced) -> str:
    """Name the maps and the layers that have them: 'key-shared in layers 0-4, dense in layer 5'."""
    found: dict[str, list[int]] = {}
    for layer in report.layers:
        found.setdefault(_map_words(layer), []).append(layer.index)
    if len(found) == 1:
        return f"{next(iter(found))} in every layer"
    return ", ".join(
        f"{name} in layer{'' if len(indices) == 1 else 's'} {ranges(indices)}" for name, indices in found.items()
    )


def _map_words(layer: Layer) -> str:
    """One layer's map; of an exact fold, what became of each projection that changed."""
    if not isinstance(layer, ExactLayer):
        return layer.map
    maps = {"W_Q": layer.map, "W_V": layer.value_map, "W_O": layer.output_map}
    return ", ".join(f"{name} {found}" for name, found in maps.items() if found != "dense") or "as it was"


def singular_section(folder: Folder, key: str) -> Section | None:
    """How W_Q's singular values fall: how far from low rank each one was."""
    layers = folder.report.layers if isinstance(folder.report, Fitted) else ()
    found = [(layer.index, layer.singular_values or []) for layer in layers]
    found = [(index, values) for index, values in found if len(values) > 1 and max(values) == values[0] > 0]
    if not found:
        return None
    rows = []
    for index, values in found:
        half = sum(value >= values[0] / 10 for value in values) / len(values)
        condition = values[0] / values[-1] if values[-1] > 0 else None
        rows.append((str(index), *map(numbers.short, (values[0], values[-1], condition)), numbers.percent(half, 0)))
    caption = "Singular values of the original W_Q of each layer, at equal steps of the index. A line that stays high "
    caption += "means a matrix that no low rank can stand in for."
    blocks = (
        Chart(picture=singular_chart(f"{key}-sv", found), caption=caption),
        Table(
            caption="Singular values of W_Q",
            columns=("layer", "largest", "smallest", "largest ÷ smallest", "above a tenth of the largest"),
            rows=rows,
        ),
    )
    return Section(key=f"{key}-singular", title="Singular values of W_Q", blocks=blocks)


def bench_section(folder: Folder, key: str) -> Section | None:
    """What inference costs: loading, memory, prefill and decoding of each model, and the ratios."""
    bench = folder.bench
    if bench is None:
        return None
    if not folder.owns(bench.models):
        return Section(key=f"{key}-bench", title="Inference", blocks=[Prose(text=FOREIGN.format(file="bench.json"))])
    a, b = bench.models
    rows = _size_rows(a, b, bench.ratios.load)
    for one, other, filling in zip(a.prefill, b.prefill, bench.ratios.prefill, strict=False):
        label = f"Prefill, batch {one.batch}, tokens/s, prompts of {one.tokens:,}"
        rows.append((label, *_speeds(one, other), _spread(filling.ratio, _two), numbers.DASH))
    for step, their_step, ratio in zip(a.decode, b.decode, bench.ratios.decode, strict=False):
        label = f"Decode, batch {step.batch}, tokens/s"
        rows.append((label, *_speeds(step, their_step), _spread(ratio.ratio, _two), _two(ratio.byte_limit)))
    table = Table(
        caption=f"Measured by qectomy bench: {bench.device}, {bench.dtype}, {bench.threads} thread"
        f"{'s' * (bench.threads != 1)}",
        columns=("", a.checkpoint, b.checkpoint, "ratio", "bytes allow"),
        rows=rows,
        note="Median [low, high] of the repetitions. Ratio: the original’s cost over the reduced one’s, so that above "
        "1 favours the reduced; where its interval holds 1 the two cannot be told apart. Bytes allow: the ratio if "
        "only the weights’ bytes, which every decoded token reads, took time.",
    )
    blocks = (table, Command(label="Measure it again", text=bench.command))
    return Section(key=f"{key}-bench", title="Inference", blocks=blocks)


def _size_rows(a: BenchModel, b: BenchModel, load: Spread | None) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for words, ours, theirs, write in (
        ("Parameters", a.parameters, b.parameters, numbers.whole),
        ("Weights", a.bytes, b.bytes, numbers.bytes_),
        ("Peak memory", a.peak_memory_bytes, b.peak_memory_bytes, numbers.bytes_),
        ("Key/value cache a token", a.kv_cache_bytes_per_token, b.kv_cache_bytes_per_token, numbers.bytes_),
    ):
        if ours is not None or theirs is not None:
            share = numbers.ratio(ours / theirs) if ours is not None and theirs else numbers.DASH
            rows.append((words, write(ours), write(theirs), share, ""))
    if a.load_seconds or b.load_seconds:
        cells = (_spread(model.load_seconds, numbers.seconds) for model in (a, b))
        rows.append(("Load", *cells, _spread(load, _two), ""))
    return rows


def _speeds(*rows: Prefill | Decode) -> list[str]:
    return [_spread(row.tokens_per_second, numbers.short) for row in rows]


def _two(value: float | int | None) -> str:
    return numbers.plain(value, 2)


def _spread(found: Spread | None, write: Callable[[float], str]) -> str:
    return numbers.DASH if found is None else f"{write(found.median)} [{write(found.low)}, {write(found.high)}]"


def timing_section(folder: Folder, key: str) -> Section | None:
    """Where the time of the conversion went."""
    report = folder.report
    stages = {name: value for name, value in report.seconds.items() if name != "total"}
    if not stages:
        return None
    total = report.seconds.get("total") or sum(stages.values()) or 1.0
    rows: list[tuple[str | Cell, ...]] = [
        (name, numbers.seconds(value), Cell(text=numbers.percent(value / total, 0), share=min(value / total, 1)))
        for name, value in sorted(stages.items(), key=lambda item: -item[1])
    ]
    rows.append(("total", numbers.seconds(total), ""))
    facts = [("Peak memory", numbers.bytes_(report.peak_memory_bytes))]
    if isinstance(report, Fitted) and report.forward_pass_seconds:
        times = numbers.plain(total / report.forward_pass_seconds, 1)
        facts.insert(0, ("Times as long as the original takes to read the same tokens", times))
    if isinstance(report, Fitted) and report.device:
        facts.append(("Device", report.device))
    table = Table(caption="The conversion, by stage", columns=("stage", "time", "share"), rows=rows)
    return Section(key=f"{key}-time", title="Time", blocks=(table, Facts(rows=facts)))


def provenance_section(folder: Folder, key: str) -> Section:
    """Where everything came from: the source and its hashes, the texts, versions, and the commands that repeat it."""
    report, source = folder.report, folder.report.source
    fitted = report if isinstance(report, Fitted) else None
    calibration, healing = (fitted.calibration, fitted.healing) if fitted else (None, None)
    rows = [
        ("Original", source.name),
        ("Family, stored in", f"{source.model_type}, {source.dtype}"),
        ("Fitted" if healing else "Made", report.created),
        ("Healed", healing.created if healing else ""),
        ("Seed, context of the fit", f"{calibration.seed}, {calibration.context}" if calibration else ""),
        ("Versions", ", ".join(f"{n} {v}" for n, v in {"qectomy": report.qectomy, **report.versions}.items())),
    ]
    blocks: list[Block] = [Facts(rows=[row for row in rows if row[1]])]
    texts = [(text.file, "fit", text.tokens, text.sha256) for text in (calibration.texts if calibration else ())]
    texts += [(text.text, "healing", text.tokens, text.sha256) for text in (healing.texts if healing else ())]
    if texts:
        blocks.append(
            Table(
                caption="Texts",
                columns=("text", "used for", "tokens", "sha256"),
                words=(0, 1, 3),
                rows=[(n, use, numbers.whole(tokens), Cell(text=sha, mark="hash")) for n, use, tokens, sha in texts],
            )
        )
    hashes = [("original", source.sha256)]
    hashes += [("fitted checkpoint that was healed", healing.fitted_sha256)] if healing else []
    for whose, found in hashes:
        blocks.append(
            Table(
                caption=f"Files of the {whose}",
                columns=("file", "sha256"),
                words=(0, 1),
                rows=[(name, Cell(text=digest, mark="hash")) for name, digest in found.items()],
            )
        )
    for place, command in enumerate(dict.fromkeys([report.command, *([healing.command] if healing else [])])):
        blocks.append(Command(label="To make it again" if place == 0 else "Then, to heal it", text=command))
    return Section(key=f"{key}-provenance", title="Provenance", blocks=blocks)
