"""Intervals against SciPy's bootstrap and against what they promise: to hold the truth 95 times in 100."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from qectomy.eval import statistics
from qectomy.eval.statistics import (
    by_position,
    interval,
    paired,
    perplexity_interval,
    resampled_means,
    student,
    window_sums,
)


def draw(n=40, length=16, effect=0.05, seed=0, spread=0.5):
    """Losses of two models, (n * length,) each, whose windows differ in difficulty far more than the models do."""
    generator = torch.Generator().manual_seed(seed)
    hard = spread * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    noise = 0.2 * torch.randn(n, length, generator=generator, dtype=torch.float64)
    change = effect + 0.1 * torch.randn(n, length, generator=generator, dtype=torch.float64)
    before = 3 + hard + noise
    return before.flatten(), (before + change).flatten(), torch.arange(n).repeat_interleave(length)


def test_sums_of_windows():
    windows = torch.tensor([2, 0, 2, 2])
    found = window_sums(windows, torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4))
    assert found.sums.tolist() == [[2.0, 8.0], [1.0, 3.0]]  # no window 1: nothing of it is scored
    assert found.counts.tolist() == [1.0, 3.0]


def test_the_ratio_and_its_interval_against_scipy():
    before, after, windows = draw()
    found = paired(before, after, windows)
    assert found.ratio == pytest.approx(math.exp((after - before).mean()))
    assert found.difference == pytest.approx(math.exp(after.mean()) - math.exp(before.mean()))
    assert found.windows == 40
    per_window = (after - before).view(40, -1).mean(1).numpy()
    theirs = stats.bootstrap(
        (per_window,), np.mean, n_resamples=20_000, method="percentile", random_state=np.random.default_rng(1)
    ).confidence_interval
    assert np.log(found.ratio_95) == pytest.approx([theirs.low, theirs.high], abs=1e-3)


def test_pairing_is_what_makes_the_interval_narrow():
    before, after, windows = draw()
    low, high = paired(before, after, windows).ratio_95
    assert 1.0 < low < high < 1.1  # the effect shows ...
    alone = [perplexity_interval(nll, windows) for nll in (before, after)]
    assert alone[0][1] > alone[1][0]  # ... where the two bare numbers' intervals overlap
    shuffled = after.view(40, -1)[torch.randperm(40, generator=torch.Generator().manual_seed(5))].flatten()
    wide = paired(before, shuffled, windows).ratio_95
    assert wide[1] - wide[0] > 5 * (high - low)


@pytest.mark.parametrize("n", [statistics.FEWEST, 12, 60])
def test_it_holds_the_truth_about_as_often_as_it_says(n, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    held = 0
    for seed in range(200):
        low, high = paired(*draw(n=n, length=4, seed=seed)).ratio_95
        held += low <= math.exp(0.05) <= high
    assert 178 <= held <= 199  # of 200; 95 % of them is 190, five standard deviations of which are 15


def test_windows_of_unequal_lengths_count_by_their_tokens():
    windows = torch.tensor([0] * 90 + [1] * 10)
    nll = torch.cat([torch.full((90,), 1.0), torch.full((10,), 2.0)])
    means = resampled_means(window_sums(windows, nll))[0]
    assert {round(float(mean), 6) for mean in means} == {1.0, 1.1, 2.0}
    assert (means == 1.0).double().mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("n", [1, statistics.FEWEST - 1])
def test_few_windows_give_no_interval(n):
    windows = torch.arange(8) % n
    found = paired(torch.ones(8), 2 * torch.ones(8), windows)
    assert found.ratio == pytest.approx(math.e)
    assert found.ratio_95 is None
    assert found.difference_95 is None
    assert perplexity_interval(torch.ones(8), windows) is None


def test_more_windows_than_are_drawn_are_taken_together():
    windows = torch.arange(5 * statistics.MOST_UNITS)
    found = window_sums(windows, windows.double())
    assert len(found.counts) == statistics.MOST_UNITS
    assert found.counts.tolist() == [5.0] * statistics.MOST_UNITS
    assert found.sums[0, :2].tolist() == [0 + 1 + 2 + 3 + 4, 5 + 6 + 7 + 8 + 9]
    assert paired(torch.zeros(len(windows)), torch.ones(len(windows)), windows).windows == len(windows)


def test_the_draw_is_the_same_each_time_and_in_any_portions(monkeypatch):
    found = window_sums(draw()[2], *draw()[:2])
    whole = resampled_means(found)
    assert torch.equal(resampled_means(found), whole)
    assert whole.shape == (2, statistics.RESAMPLES)
    monkeypatch.setattr(statistics, "DRAWN_AT_ONCE", 40 * 999)
    assert torch.equal(resampled_means(found), whole)


def test_edges_of_an_interval():
    samples = torch.arange(1001, dtype=torch.float64)
    assert interval(samples, 10**9).tolist() == pytest.approx([25.0, 975.0])
    wider = interval(samples, 5).tolist()
    assert (wider[1] - 500) / 475 == pytest.approx(
        stats.t.ppf(0.975, 4) / stats.norm.ppf(0.975) * (5 / 4) ** 0.5, rel=0.02
    )
    assert 500 - wider[0] == pytest.approx(wider[1] - 500)


@pytest.mark.parametrize("degrees", [4, 5, 9, 30, 1000])
def test_the_quantile_of_student(degrees):
    assert student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=0.02 if degrees < 5 else 0.01)


def test_loss_by_position():
    positions = torch.tensor([1, 2, 3, 4, 7, 8, 1])
    edges, (first, second) = by_position(positions, positions.double(), torch.ones(7))
    assert edges == [1, 2, 4, 8, 9]
    assert first == [1.0, 2.5, 5.5, 8.0]
    assert second == [1.0] * 4


def test_positions_that_overlapping_windows_never_score_are_left_out():
    edges, (means,) = by_position(torch.tensor([6, 7, 31]), torch.tensor([1.0, 3.0, 5.0]))
    assert edges == [4, 16, 32]  # nothing in 8 to 15: it is the span before's
    assert means == [2.0, 5.0]
