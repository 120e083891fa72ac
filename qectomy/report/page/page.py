"""The page: one HTML file that needs nothing else, says what was removed, what it cost and whether to believe it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from qectomy import __version__
from qectomy.errors import clean
from qectomy.record.reduced import Exact, Fitted
from qectomy.report.page import accounts, outcomes, quality, texts
from qectomy.report.page.accounts import recipe_words
from qectomy.report.page.best import SAVED, best_measurement
from qectomy.report.page.blocks import Section
from qectomy.report.page.compare import compare_section
from qectomy.report.page.numbers import between, bytes_, percent, ratio, rough
from qectomy.report.page.reading import Folder, Point
from qectomy.report.page.verdict import Check, Verdict, checks, judged
from qectomy.report.query_share import kind_words, query_share

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS: tuple[Callable[[Folder, str], Section | None], ...] = (
    quality.perplexity_section,
    outcomes.healing_section,
    quality.layer_section,
    quality.moved_section,
    quality.position_section,
    outcomes.task_section,
    texts.token_section,
    texts.generation_section,
    accounts.removed_section,
    accounts.bench_section,
    accounts.singular_section,
    accounts.timing_section,
    accounts.provenance_section,
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number of the headline: what it is, and a line below it."""

    label: str
    value: str
    below: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """All that the page says of one folder."""

    key: str
    title: str
    name: str
    subtitle: str
    figures: Sequence[Figure]
    verdict: Verdict
    checks: Sequence[Check]
    sections: Sequence[Section]


def page(folders: Sequence[Folder], *, points: Sequence[Point] = (), title: str | None = None) -> str:
    """Return the page of one reduced checkpoint, or the comparison of several. The same input gives the same text."""
    assert folders
    alone = len(folders) == 1
    parts = [part(folder, "m" if alone else f"m{number}") for number, folder in enumerate(folders)]
    comparison = compare_section(folders, points) if points or not alone else None
    shown = clean(title) if title else parts[0].title if alone else f"{len(folders)} reduced checkpoints"
    template = _environment().get_template("page.html")
    return template.render(
        version=__version__,
        title=shown,
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        alone=alone,
        parts=parts,
        comparison=comparison,
    )


def part(folder: Folder, key: str) -> Part:
    """Return what the page says of one folder; its anchors begin with `key`."""
    report = folder.report
    exact = isinstance(report, Exact)
    healed = ", healed" if isinstance(report, Fitted) and report.healing else ""
    return Part(
        key=key,
        title=f"{report.source.name}{',' * exact} {kind_words(report)}{healed}",
        name=folder.name,
        subtitle=recipe_words(report),
        figures=_figures(folder),
        verdict=judged(folder),
        checks=checks(folder),
        sections=[section for make in SECTIONS if (section := make(folder, key)) is not None],
    )


def _figures(folder: Folder) -> list[Figure]:
    report, found = folder.report, best_measurement(folder)
    saved, removed = report.bytes.before - report.bytes.after, report.parameters.removed
    figures = [
        Figure(
            label="Parameters removed",
            value=percent(removed, 2 if removed < 0.1 else 1),
            below=f"of {rough(report.parameters.before)}; {bytes_(saved)}",
        )
    ]
    if found:
        times, ends = found.perplexity.ratio, found.perplexity.ratio_95
        interval = f"95 %: {between(ends, 'ratio')}" if ends else "no interval recorded"
        interval = "1 but for rounding" if isinstance(report, Exact) else interval
        interval += f"; by {SAVED}" if found.file == SAVED else ""
        figures.append(Figure(label="Perplexity, times the original’s", value=ratio(times), below=interval))
    elif isinstance(report, Exact):
        error = f"{report.logit_error:.1e}"
        figures.append(Figure(label="Largest error of a logit", value=error, below="as a share of the largest logit"))
    if (queries := query_share(report)) is not None:
        figures.append(Figure(label="W_Q removed", value=percent(queries.removed), below=queries.words))
    return figures


def indexed(text: str) -> Markup:
    """Set W_Q, b_O, W_down and their like with an index; all else is text."""
    return Markup(re.sub(r"\b([Wb])_([QKVO]|gate|up|down)\b", r"\1<sub>\2</sub>", str(escape(text))))


def words(text: str) -> Markup:
    """Set our own words: as `indexed`, and code between backticks."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(indexed(text))))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"words": words, "indexed": indexed}
    return environment
