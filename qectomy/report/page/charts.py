"""The pictures of the page, each a pure function of numbers to an <svg> element."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from qectomy.report.page.numbers import short
from qectomy.report.page.svg import INK, ONE, PAPER, SOFT, THREE, TWO, Labels, drawing, inline

Interval = tuple[float, float] | None
MODEL_COLOURS = {"original": SOFT, "fitted": ONE, "reduced": ONE, "healed": THREE}
MODEL_MARKERS = {"original": "s", "fitted": "o", "reduced": "o", "healed": "D"}


def perplexity_chart(
    key: str, rows: Sequence[tuple[str, float, Interval]], ratios: Sequence[tuple[str, float, Interval]]
) -> Markup:
    """Perplexity of each model, and beside it its ratio to the original, with their intervals as bars."""
    told = [f"{name} {value:.4g}{_interval_words(bar)}" for name, value, bar in rows]
    told += [f"ratio of {name} {value:.4g}{_interval_words(bar)}" for name, value, bar in ratios]
    names = [name for name, _, _ in rows]
    with drawing(0.75 + 0.33 * len(rows)) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1))
        _dots(left, names, rows, "perplexity")
        _dots(right, names, ratios, "ratio to the original")
        right.axvline(1, color=SOFT, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        left.set_yticks(range(len(names)), names)
        left.tick_params(axis="y", labelcolor=INK)
        left.set_ylim(len(names) - 0.4, -0.6)
        return inline(figure, key, f"Dots with error bars: {'; '.join(told)}.")


def _interval_words(bar: Interval) -> str:
    return f" ({bar[0]:.4g} to {bar[1]:.4g})" if bar else ""


def _dots(axes: Any, names: list[str], rows: Sequence[tuple[str, float, Interval]], title: str) -> None:
    for name, value, bar in rows:
        spread = [[max(value - bar[0], 0)], [max(bar[1] - value, 0)]] if bar else None
        axes.errorbar(
            [value],
            [names.index(name)],
            xerr=spread,
            fmt=MODEL_MARKERS.get(name, "o"),
            color=MODEL_COLOURS.get(name, ONE),
            capsize=3,
            elinewidth=1.4,
            zorder=3,
        )
    ends = [end for _, value, bar in rows for end in (value, *(bar or ()))] + ([1.0] if "ratio" in title else [])
    middle = (min(ends) + max(ends)) / 2
    half = max(0.62 * (max(ends) - min(ends)), 0.01 * middle)  # differences far below a percent look it
    axes.set_xlim(middle - half, middle + half)
    _few_ticks(axes.xaxis, 4)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set_title(title)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def layer_chart(key: str, layers: Sequence[tuple[int, float | None, float | None]]) -> Markup:
    """Attention KL of each layer, on the windows it was fitted on and on held-out ones."""
    values = [value for _, *both in layers for value in both if value is not None]
    worst = max(layers, key=lambda row: row[2] if row[2] is not None else -math.inf)
    description = f"Attention KL of {len(layers)} layers, fitted and held out; largest held out in layer {worst[0]}."
    with drawing(2.5) as figure:
        axes = figure.subplots()
        for index, fitted, heldout in layers:
            if fitted is not None and heldout is not None:
                axes.plot([index, index], [fitted, heldout], color=SOFT, linewidth=0.9, zorder=1)
        for position, name, colour, marker in ((1, "fitted on", ONE, "o"), (2, "held out", TWO, "D")):
            axes.plot(
                [row[0] for row in layers],
                [math.nan if row[position] is None else row[position] for row in layers],
                marker,
                color=colour,
                label=name,
                markerfacecolor=colour if marker == "D" else PAPER,
                markeredgewidth=1.4,
            )
        if min(values) > 0 and max(values) > 20 * min(values):
            _log_axis(axes)
        else:
            axes.set_ylim(bottom=min(0, *values))
        _layer_axis(axes, [row[0] for row in layers])
        axes.set_title("attention KL, nats")
        axes.grid(axis="y")
        figure.legend(loc="outside upper right", ncols=2, borderpad=0, handletextpad=0.3)
        return inline(figure, key, description)


def removed_chart(key: str, layers: Sequence[tuple[int, float, float]]) -> Markup:
    """What each layer stored for its queries and what it stores now, as bars."""
    description = f"Numbers stored for the queries of {len(layers)} layers, before as outlines and now as filled bars."
    with drawing(2.2) as figure:
        axes = figure.subplots()
        indices = [row[0] for row in layers]
        axes.bar(indices, [row[1] for row in layers], 0.72, fill=False, edgecolor=SOFT, linewidth=1, label="before")
        axes.bar(indices, [row[2] for row in layers], 0.72, color=ONE, linewidth=0, label="now")
        _layer_axis(axes, indices)
        _thousands(axes.yaxis)
        axes.set_title("numbers stored for the queries of a layer")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper right", ncols=2, borderpad=0, handlelength=1.2)
        return inline(figure, key, description)


def singular_chart(key: str, layers: Sequence[tuple[int, Sequence[float]]]) -> Markup:
    """Singular values of each layer's W_Q over the share of the index, each as a share of the layer's largest."""
    description = f"Singular values of W_Q in {len(layers)} layers, falling, each as a share of its layer's largest."
    with drawing(2.9) as figure:
        axes = figure.subplots()
        middle = len(layers) // 2 if len(layers) > 2 else -1
        shown = {0, middle, len(layers) - 1}
        for place, (index, values) in enumerate(layers):
            depth = place / max(len(layers) - 1, 1)
            axes.plot(
                [100 * i / max(len(values) - 1, 1) for i in range(len(values))],
                [value / values[0] if value > 0 else math.nan for value in values],
                color=SOFT if place == middle else ONE if depth <= 0.5 else TWO,
                alpha=1 if place in shown else round(0.75 - min(depth, 1 - depth), 3),
                zorder=3 if place in shown else 2,
                linewidth=1.6 if place in shown else 0.9,
                linestyle=(0, (4, 1.5)) if 0 < place == len(layers) - 1 else (0, (1, 1.2)) if place == middle else "-",
                label=f"layer {index}" if place in shown else None,
            )
        _log_axis(axes)
        axes.set_xlabel("place among the singular values, %")
        axes.set_title("singular value ÷ the largest")
        axes.grid(axis="y")
        figure.legend(loc="outside upper right", ncols=3, borderpad=0, handlelength=1.6)
        return inline(figure, key, description)


def healing_chart(key: str, curve: Sequence[tuple[int, float]], original: float | None, kept: int | None) -> Markup:
    """Perplexity on the validation windows over the tokens trained on."""
    (_, first), (tokens, last) = curve[0], curve[-1]
    description = f"Validation perplexity from {first:.4g} at the start to {last:.4g} after {tokens:,} tokens."
    with drawing(2.6) as figure:
        axes = figure.subplots()
        axes.plot(*zip(*curve, strict=True), "-o", color=THREE, label="reduced model", zorder=3)
        best = [(at, value) for at, value in curve if at == kept]
        if best:
            axes.plot(*best[0], "o", markersize=10, markerfacecolor="none", color=INK, label="kept", zorder=4)
        if original is not None:
            axes.axhline(original, color=SOFT, linewidth=1.1, linestyle=(0, (3, 2)), label="original")
        _thousands(axes.xaxis)
        _few_ticks(axes.xaxis, 5)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_xlabel("tokens trained on")
        axes.set_title("perplexity on the validation windows")
        axes.grid(axis="y")
        figure.legend(loc="outside upper right", ncols=3, borderpad=0, handlelength=1.6)
        return inline(figure, key, description)


def position_chart(key: str, names: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Markup:
    """Mean loss by position in the window: both models above, the difference below."""
    gaps = [new - old for old, new in zip(before, after, strict=True)]
    finite = [gap for gap in gaps if math.isfinite(gap)] or [math.nan]
    description = (
        f"Mean loss by position in the window. Difference at the first positions {finite[0]:+.3g} nats, "
        f"at the last {finite[-1]:+.3g} nats."
    )
    with drawing(3.3) as figure:
        top, low = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        places = range(len(names))
        top.plot(places, before, "-s", color=SOFT, label="original", markersize=4)
        top.plot(places, after, "-o", color=ONE, label="reduced", markersize=4)
        top.set_title("loss, nats a token")
        low.bar(places, gaps, 0.62, color=[TWO if gap > 0 else THREE for gap in gaps], linewidth=0)
        low.axhline(0, color=SOFT, linewidth=0.8)
        low.set_title("reduced − original, nats")
        low.set_xticks(places, names, rotation=0 if len(names) < 9 else 30)
        low.set_xlabel("position of the predicted token in its window")
        for axes in (top, low):
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            _few_ticks(axes.yaxis, 4)
        figure.legend(loc="outside upper right", ncols=2, borderpad=0, handlelength=1.6)
        return inline(figure, key, description)


def pareto_chart(
    key: str,
    points: Sequence[tuple[str, float, float, Interval, bool]],
    frontier: Sequence[tuple[float, float]],
) -> Markup:
    """Perplexity ratio over the share of parameters removed: (name, removed, ratio, interval, ours); the frontier."""
    labels = Labels()
    told = "; ".join(f"{name}: {100 * x:.1f} % removed at ratio {y:.4g}" for name, x, y, _, _ in points)
    with drawing(3.9) as figure:
        axes = figure.subplots()
        axes.axhline(1, color=SOFT, linewidth=0.9, linestyle=(0, (3, 2)))
        axes.step(
            [100 * x for x, _ in frontier], [y for _, y in frontier], where="pre", color=SOFT, linewidth=2, alpha=0.45
        )
        for _, x, y, bar, ours in points:
            spread = [[max(y - bar[0], 0)], [max(bar[1] - y, 0)]] if bar else None
            axes.errorbar(
                [100 * x],
                [y],
                yerr=spread,
                fmt="o" if ours else "s",
                color=ONE if ours else SOFT,
                markerfacecolor=ONE if ours else PAPER,
                markersize=6,
                capsize=3,
                zorder=3,
            )
        if max(y for _, _, y, _, _ in points) > 1.5:
            _log_axis(axes, (1, 1.5, 2, 3, 5, 7))
        xs = [100 * x for _, x, _, _, _ in points]
        room = 0.14 * ((max(xs) - min(xs)) or 1)
        axes.set_xlim(min(xs) - room / 2, max(xs) + 1.6 * room)
        axes.margins(y=0.12)
        axes.set_xlabel("parameters of the model removed, %")
        axes.set_title("perplexity ÷ the original’s")
        axes.grid(axis="y")
        figure.draw_without_rendering()  # so that places on the paper are known
        _label_points(axes, [(100 * x, y, labels.stand_in(name), name) for name, x, y, _, _ in points])
        return inline(figure, key, f"Parameters removed against perplexity ratio: {told}.", labels)


def _label_points(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each point's name beside it, on the side of more room, and clear of the names written before."""
    taken: list[tuple[float, float, float]] = []  # from, to, height, in points on paper
    spots = [axes.transData.transform((x, y)) for x, y, _, _ in points]
    left, right = axes.bbox.x0, axes.bbox.x1
    for (x, y, stand_in, name), (at, height) in sorted(zip(points, spots, strict=True), key=lambda item: -item[1][1]):
        wide = 5.1 * min(len(name), 30) + 10
        leftward = at + wide > right and at - wide > left - 30
        start = at - wide if leftward else at
        goal = height
        for step in range(40):  # at its height, then a little lower or higher, and so on
            goal = height + (-1 if step % 2 else 1) * 4.5 * ((step + 1) // 2)
            clear = all(start > end or start + wide < begin or abs(goal - there) > 12 for begin, end, there in taken)
            dots = all(
                abs(goal - spot[1]) > 9 or not start - 4 < spot[0] < start + wide for spot in spots if spot[0] != at
            )
            if clear and dots:
                break
        taken.append((start, start + wide, goal))
        axes.annotate(
            stand_in,
            (x, y),
            (-9 if leftward else 9, goal - height),
            textcoords="offset points",
            ha="right" if leftward else "left",
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def _layer_axis(axes: Any, indices: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set_xlim(min(indices) - 0.7, max(indices) + 0.7)
    axes.set_xlabel("layer")


def _log_axis(axes: Any, steps: Sequence[float] = ()) -> None:
    """A logarithmic y axis with numbers as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=steps or ((1,) if high > 300 * low else (1, 2, 5))))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 1e-4 else short(value)))


def _few_ticks(axis: Any, most: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 5, 10]))


def _thousands(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(sep=" "))
