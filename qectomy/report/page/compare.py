"""Several reduced checkpoints against each other: which are worth having, in one picture and one table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qectomy.record.reduced import Fitted
from qectomy.report.page import numbers
from qectomy.report.page.accounts import recipe_words
from qectomy.report.page.best import best_measurement
from qectomy.report.page.blocks import Block, Cell, Chart, Prose, Section, Table
from qectomy.report.page.charts import pareto_chart
from qectomy.report.page.reading import Folder, Point
from qectomy.report.page.verdict import judged
from qectomy.report.query_share import query_share


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One thing in the comparison: how much it removes and what that costs. `anchor` is its part of the page."""

    name: str
    removed: float
    ratio: float
    ratio_95: tuple[float, float] | None = None
    anchor: str = ""


def place(folders: Sequence[Folder], points: Sequence[Point]) -> list[Placed]:
    """Return everything that is compared; an exact one that no text was measured for has a ratio of 1."""
    found = []
    for number, folder in enumerate(folders):
        best = best_measurement(folder)
        found.append(
            Placed(
                name=folder.name,
                removed=folder.report.parameters.removed,
                ratio=best.perplexity.ratio if best else 1.0,
                ratio_95=best.perplexity.ratio_95 if best else None,
                anchor=f"m{number}",
            )
        )
    return found + [Placed(name=p.name, removed=p.parameters_removed, ratio=p.ratio) for p in points]


def frontier(placed: Sequence[Placed]) -> list[Placed]:
    """Return those that none beats: no other removes as much or more at a ratio as low or lower, and one strictly."""
    kept: list[Placed] = []
    for one in sorted(placed, key=lambda p: (-p.removed, p.ratio)):  # each costs less than all that remove more
        lowest = min((k.ratio for k in kept), default=None)
        twin = any((k.removed, k.ratio) == (one.removed, one.ratio) for k in kept)
        if lowest is None or one.ratio < lowest or twin:
            kept.append(one)
    return kept[::-1]


def compare_section(folders: Sequence[Folder], points: Sequence[Point]) -> Section:
    """The picture of cost against what was removed, and one table of all."""
    placed = place(folders, points)
    best = frontier(placed)
    shown = [(p.name, p.removed, p.ratio, p.ratio_95, bool(p.anchor)) for p in placed]
    picture = pareto_chart("compare", shown, [(p.removed, p.ratio) for p in best])
    caption = "Further right removes more, lower costs less; the grey line joins those that none beats. Filled: the "
    caption += "checkpoints of this page, with 95 % intervals where known. Open squares: others, for comparison."
    blocks = [Chart(picture=picture, caption=caption), _table(folders, points, placed, best), *_warnings(folders)]
    return Section(key="comparison", title="Comparison", blocks=blocks)


def summary(folders: Sequence[Folder], points: Sequence[Point]) -> dict[str, Any]:
    """Return what `qectomy report` prints: a record of everything that the page places."""
    placed = place(folders, points)
    best = frontier(placed)
    verdicts = [judged(folder) for folder in folders]
    given = [*verdicts, *[None] * len(points)]
    rows = [
        {
            "name": one.name,
            "parameters_removed": one.removed,
            "ratio": one.ratio,
            "ratio_95": one.ratio_95,
            "verdict": found.word if found else None,
            "rule": found.rule if found else None,
            "on_frontier": one in best,
        }
        for one, found in zip(placed, given, strict=True)
    ]
    return {"compared": len(placed) > 1, "folders": rows}


def _table(
    folders: Sequence[Folder], points: Sequence[Point], placed: Sequence[Placed], best: Sequence[Placed]
) -> Table:
    rows: list[tuple[str | Cell, ...]] = []
    for one, folder in zip(placed, folders, strict=False):
        report = folder.report
        queries = query_share(report)
        healed = " (healed)" if isinstance(report, Fitted) and report.healing else ""
        rows.append(
            (
                Cell(text=one.name, mark=f"#{one.anchor}"),
                recipe_words(report).removesuffix(" in every layer") + healed,
                numbers.percent(one.removed, 2),
                numbers.percent(queries.removed if queries else None, 1),
                numbers.ratio(one.ratio),
                numbers.between(one.ratio_95, "ratio") if one.ratio_95 else "",
                judged(folder).word,
                "yes" if one in best else "no",
            )
        )
    for one, point in zip(placed[len(folders) :], points, strict=True):
        dash = numbers.DASH
        cells = numbers.percent(one.removed, 2), dash, numbers.ratio(one.ratio), "", dash
        rows.append((one.name, point.source or dash, *cells, "yes" if one in best else "no"))
    return Table(
        caption="All that is compared",
        columns=("name", "map or source", "removed", "W_Q removed", "ratio", "95 % interval", "verdict", "frontier"),
        words=(0, 1, 6, 7),
        rows=rows,
    )


def _warnings(folders: Sequence[Folder]) -> list[Block]:
    """Say where ratios stand side by side that were not measured alike."""
    measured = [best.perplexity.protocol for folder in folders if (best := best_measurement(folder))]
    found: list[Block] = []
    for kinds, what in (
        ({(p.text_sha256, p.scored_tokens) for p in measured}, "on different texts or numbers of tokens"),
        ({(p.context, p.stride) for p in measured}, "in windows of different lengths"),
    ):
        if len(kinds) > 1:
            found.append(
                Prose(text=f"Careful: these ratios were measured {what}. Compare them by `qectomy eval` on one.")
            )
    sources = {folder.report.source.sha256.get("model.safetensors") for folder in folders}
    if len(sources) > 1:
        found.append(Prose(text="These checkpoints were not all made from the same original."))
    return found
