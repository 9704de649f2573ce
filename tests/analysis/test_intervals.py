"""Intervals of means and of pairs cover at the stated rate."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.made_up_routing import rng

from vimoe.analysis import intervals
from vimoe.analysis.intervals import WIDER, enough_draws, mean_intervals, pair_interval


def test_so_few_images_that_a_sample_may_hold_no_pair() -> None:
    found = pair_interval(np.array([[1.0], [2.0], [3.0]]), np.array([[1], [2], [0]]))
    assert found.value == 2 and 1 <= found.low <= found.high <= 3
    alone = pair_interval(np.array([[4.0]]), np.array([[0]]))
    assert (alone.value, alone.low, alone.high) == (4, 4, 4)


@pytest.mark.parametrize("kind", ["who takes", "who gives", "both"])
def test_intervals_of_permutations_cover_whoever_makes_the_difference(kind: str) -> None:
    """Resampling only those who take would miss that other images would give other decisions."""
    covered, narrow, n = [], [], 80
    for seed in range(200):
        draw = rng(1000 + seed)
        partners = np.stack([draw.permutation(n) for _ in range(5)], axis=1)
        takes, gives = draw.exponential(size=(2, n)) - 1
        if kind == "who takes":
            gives = 0 * gives
        elif kind == "who gives":
            takes = 0 * takes
        values = takes[:, None] + gives[partners] + 0.5
        found = pair_interval(values, partners, seed)
        covered.append(found.low <= 0.5 <= found.high)
        one_sided = mean_intervals(values.mean(axis=1, keepdims=True), seed)[0]
        narrow.append(one_sided.low <= 0.5 <= one_sided.high)
        assert found.value == pytest.approx(values.mean())
    assert 0.90 <= np.mean(covered) <= 1.0
    if kind == "who gives":
        assert np.mean(narrow) < 0.7  # the check can fail


def test_intervals_of_means_cover_at_the_stated_rate() -> None:
    """Skewed as changes of a loss are: nothing for most images, much for some."""
    draws = rng(7).exponential(size=(400, 150)) * (rng(8).random((400, 150)) < 0.5)
    intervals = [mean_intervals(row[:, None], seed)[0] for seed, row in enumerate(draws)]
    covered = np.mean([i.low <= 0.5 <= i.high for i in intervals])
    assert 0.91 <= covered <= 0.98  # 95% but for 400 trials and 150 images
    halved = [abs(i.value - 0.5) <= (i.high - i.low) / 4 for i in intervals]
    assert np.mean(halved) < 0.8  # the check sees an interval of half the width


def test_memory_for_resamples_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are drawn at a time, they are the same."""
    values = rng(1).normal(size=(1000, 2))
    whole = mean_intervals(values)
    monkeypatch.setattr(intervals, "CHUNK", 10_000)
    for one, other in zip(whole, mean_intervals(values), strict=True):
        assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high))


@pytest.mark.parametrize(("of_pairs", "low", "high"), [(0.0, 4, 12), (0.5, 5, 13), (8.0, 16, 20)])
def test_draws_are_enough_once_more_would_not_narrow_the_interval(of_pairs: float, low: int, high: int) -> None:
    """In 20 data sets, with values of images and of which two of them meet: how many, and what that gives away."""
    found, wider = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        partners = np.stack([rng.permutation(200) for _ in range(20)], axis=1)
        values = rng.normal(size=(200, 1)) + of_pairs * rng.normal(size=(200, 20))
        found.append(enough_draws(values[:, :4], partners[:, :4], 20, seed))
        assert found[-1] == enough_draws(values[:, :4] + 7.0, partners[:, :4], 20, seed)
        some, every = (pair_interval(values[:, :d], partners[:, :d], seed) for d in (found[-1], 20))
        wider.append((some.high - some.low) / (every.high - every.low))
    assert low <= np.mean(found) <= high
    assert np.mean(wider) < WIDER + 0.03


def test_draws_that_all_say_the_same_are_enough() -> None:
    partners = np.stack([np.random.default_rng(d).permutation(30) for d in range(4)], axis=1)
    assert enough_draws(np.zeros((30, 4)), partners, 20) == 4
    assert enough_draws(np.random.default_rng(0).normal(size=(30, 4)), partners, 5) in (4, 5)
