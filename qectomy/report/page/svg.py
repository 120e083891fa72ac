"""Matplotlib figures as SVG that is part of a page: its colours, its font, ids that no other picture has.

The same figure gives the same bytes. Texts from outside never pass through matplotlib, which would read `$` as
mathematics and look for glyphs: `Labels` stand in for them until the picture is drawn.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from markupsafe import Markup, escape

# What matplotlib draws with, and the variable of page.css that takes its place.
INK, SOFT, RULE, PAPER = "#010101", "#020202", "#030303", "#040404"
ONE, TWO, THREE = "#010203", "#020304", "#030405"  # the reduced model, held out or worse, healed or better
VARIABLES = {INK: "ink", SOFT: "soft", RULE: "rule", PAPER: "paper", ONE: "one", TWO: "two", THREE: "three"}

WIDTH = 5.8  # inches, at 72 units each: a phone shows a picture at four fifths of that, a desk at one and a half
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qectomy",
    "font.size": 9.5,
    "text.parse_math": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.facecolor": "none",
    "axes.titlesize": 9.5,
    "axes.titlecolor": SOFT,
    "axes.titlelocation": "left",
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "legend.columnspacing": 2.0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "text.color": INK,
    "xtick.color": SOFT,
    "xtick.labelcolor": SOFT,
    "xtick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.color": SOFT,
    "ytick.labelcolor": SOFT,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


@dataclass(frozen=True)
class Labels:
    """Texts from outside that a figure shows; a figure is given what stands in for them."""

    texts: list[str] = field(default_factory=list)

    def stand_in(self, text: str, longest: int = 30) -> str:
        shown = " ".join(text.split())
        self.texts.append(shown if len(shown) <= longest else shown[: longest - 1] + "…")
        return f"@{len(self.texts) - 1}@"


@contextmanager
def drawing(height: float) -> Iterator[Any]:
    """Yield an empty figure of the page's look; the page's settings hold inside the block, for `inline` too."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a matplotlibrc of the user says
        matplotlib.rcParams.update(cast(Any, SETTINGS))
        figure = Figure(figsize=(WIDTH, height), dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        cast(Any, figure.get_layout_engine()).set(w_pad=0.09)  # the letters of another font may be wider
        yield figure


def inline(figure: Any, key: str, description: str, labels: Labels | None = None) -> Markup:
    """Return a figure as an <svg> element whose ids begin with `key`; `description` is for those who cannot see it."""
    held = io.StringIO()
    figure.savefig(held, format="svg", metadata={"Date": None})
    text = held.getvalue()
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    body = text[text.index("</metadata>") + len("</metadata>") : text.rindex("</svg>")]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)  # it would style the whole page
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)  # matplotlib repeats every text in a comment
    body = re.sub(r"font(-family)?: [^;\"]*?'[^;\"]*?(; |\")", _sized, body)
    body = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", body)
    body = re.sub(r'<g id="(?!figure)[a-zA-Z_0-9.]+">', "<g>", body)
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = body.replace("xlink:href", "href").replace('href="#', f'href="#{key}-').replace("url(#", f"url(#{key}-")
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), body)  # places, not the texts
    body = re.sub(r"\s*\n\s*", "\n", body)
    if labels:
        body = re.sub(r"@(\d+)@", lambda found: str(escape(labels.texts[int(found[1])])), body)
    return Markup(
        f'<svg viewBox="0 0 {float(width):g} {float(height):g}" role="img" aria-label="{escape(description)}">'
        f"{body}</svg>"
    )


def _sized(found: "re.Match[str]") -> str:
    """A font's family is the page's; its size stays, which matplotlib writes apart unless it is in `font:`."""
    size = re.search(r"[\d.]+px", found[0])
    end = '"' if found[0].endswith('"') else ""
    return f"font-size: {size[0]}; {end}" if size else end
