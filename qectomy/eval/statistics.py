"""Before and after on the same windows: differences with intervals, not two bare numbers.

The bootstrap draws whole windows, with replacement, the same ones for both models: tokens of one window hang together,
and what makes a window hard makes it hard for both, so that the difference is known far better than either number.
(Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: the percentile interval. Of few windows it is
too narrow, 84 % for five instead of 95: it is widened here as Student's t widens a normal interval.)
Dimensions: N scored tokens, n windows.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qectomy.record.scores import Paired

RESAMPLES = 10_000
LEVEL = 0.95
MOST_UNITS = 1000  # that a bootstrap draws from: more change nothing but its time
FEWEST = 5  # windows that an interval is taken over
Z = 1.959964  # the normal quantile of (1 + LEVEL) / 2
DRAWN_AT_ONCE = 4_000_000  # window numbers
POSITIONS = tuple(2**power for power in range(31))  # edges of the spans over which loss by position is averaged


@dataclass(frozen=True)
class WindowSums:
    """Sums over the scored tokens of each window, and how many tokens that were."""

    sums: Tensor  # (k, n) float64, one row a quantity
    counts: Tensor  # (n,) float64


def window_sums(windows: Tensor, *values: Tensor) -> WindowSums:
    """Return the sums of each of `values`, (N,), over the tokens of each window; `windows` (N,) says which it is in.

    Of more than MOST_UNITS windows those that follow each other are taken together: as many are drawn at most.
    """
    n = int(windows.max()) + 1 if len(windows) else 0
    together = -(-n // MOST_UNITS) if n else 1
    windows, n = windows // together, -(-n // together)
    rows = [torch.zeros(n, dtype=torch.float64).index_add_(0, windows, value.double().cpu()) for value in values]
    counts = torch.zeros(n, dtype=torch.float64).index_add_(0, windows, torch.ones(len(windows), dtype=torch.float64))
    held = counts > 0
    return WindowSums(torch.stack(rows)[:, held], counts[held])


def resampled_means(found: WindowSums, seed: int = 0) -> Tensor:
    """Return (k, RESAMPLES) means a token over windows drawn with replacement, the same draw for every quantity."""
    n, generator = len(found.counts), np.random.default_rng(seed)
    columns = torch.cat([found.sums, found.counts[None]]).T  # (n, k + 1)
    parts, at_once = [], max(1, DRAWN_AT_ONCE // n)
    for start in range(0, RESAMPLES, at_once):
        shape = (min(at_once, RESAMPLES - start), n)
        drawn = columns[torch.from_numpy(generator.integers(0, n, shape))].sum(1)
        parts.append(drawn[:, :-1] / drawn[:, -1:])
    return torch.cat(parts).T


def interval(samples: Tensor, n: int) -> Tensor:
    """Return [low, high] (2,), between which LEVEL of the samples lie, widened for the n windows drawn from."""
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    middle = samples.mean()
    return middle + (torch.quantile(samples, edges) - middle) * (student(n - 1) / Z) * (n / (n - 1)) ** 0.5


def student(degrees: int) -> float:
    """Return the quantile (1 + LEVEL) / 2 of Student's t, by its expansion about the normal one (A&S 26.7.5)."""
    return Z + (Z**3 + Z) / (4 * degrees) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * degrees**2)


def mean_interval(values: Tensor, windows: Tensor) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of values (N,); None for fewer than FEWEST windows, which say too little."""
    found = window_sums(windows, values)
    n = len(found.counts)
    return _ends(interval(resampled_means(found)[0], n)) if n >= FEWEST else None


def perplexity_interval(nll: Tensor, windows: Tensor) -> tuple[float, float] | None:
    """Return the 95 % interval of exp(mean nll); None where there is none."""
    found = mean_interval(nll, windows)
    return None if found is None else (math.exp(found[0]), math.exp(found[1]))


def _ends(found: Tensor) -> tuple[float, float]:
    return float(found[0]), float(found[1])


def paired(before: Tensor, after: Tensor, windows: Tensor) -> Paired:
    """Return ratio and difference of two models' perplexities on the same tokens, (N,) nats each, with intervals.

    Intervals are None for fewer than FEWEST windows.
    """
    one, other = float(before.double().mean().exp()), float(after.double().mean().exp())
    found = window_sums(windows, before, after)
    ratio_95 = difference_95 = None
    if (n := len(found.counts)) >= FEWEST:
        first, second = resampled_means(found)
        ratio_95 = _ends(interval(second - first, n).exp())
        difference_95 = _ends(interval(second.exp() - first.exp(), n))
    return Paired(
        ratio=math.exp(float((after.double() - before.double()).mean())),
        ratio_95=ratio_95,
        difference=other - one,
        difference_95=difference_95,
        windows=len(windows.unique()),
    )


def by_position(positions: Tensor, *nlls: Tensor) -> tuple[list[int], list[list[float]]]:
    """Return edges of spans of positions, and each model's mean loss, in nats, of the targets in each span.

    `positions` (N,): of each target in its window. A span without a target is the one before's; the last edge
    ends the last.
    """
    last = int(positions.max())
    edges = [edge for edge in POSITIONS if edge <= last] + [last + 1]
    inside = [bool(((positions >= a) & (positions < b)).any()) for a, b in itertools.pairwise(edges)]
    edges = [edge for edge, held in zip(edges, inside, strict=False) if held] + [last + 1]
    means = [
        [float(nll[(positions >= a) & (positions < b)].mean()) for a, b in itertools.pairwise(edges)] for nll in nlls
    ]
    return edges, means
