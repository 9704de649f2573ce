"""Statistics of paired differences, against scipy and counted cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vimoe.study.paired import Mean, interval, mean_ranks, paired, sign_flip_p, verdict


@pytest.mark.parametrize("comparisons", [1, 7])
def test_the_interval_is_that_of_a_paired_t_test(comparisons: int) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 9))
    found = interval(list(a - b), comparisons)
    theirs = stats.ttest_rel(a, b).confidence_interval(1 - 0.05 / comparisons)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert found.value == pytest.approx(np.mean(a - b)) and found.n == 9


def test_an_interval_of_one_value_is_everything() -> None:
    assert interval([3.0]) == Mean(3.0, -math.inf, math.inf, 1)


@pytest.mark.parametrize(
    ("values", "p"), [([1, 2, 3], 2 / 8), ([1, 2, -3], 1.0), ([1] * 7, 2 / 128), ([1, 1, 1, -1], 10 / 16), ([2], 1.0)]
)
def test_p_counts_signs(values: list[float], p: float) -> None:
    # of 1, 2, 3: only +++ and --- have a sum as far from 0; of 1, 1, 1, -1 those with one or no odd sign
    assert sign_flip_p(values) == pytest.approx(p)


def test_p_of_many_values_is_close_to_a_t_test_and_repeats() -> None:
    values = list(np.random.default_rng(1).normal(0.5, 1, 20))
    assert sign_flip_p(values) == sign_flip_p(values)
    assert sign_flip_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)


def test_pairs_are_of_the_seeds_that_both_have() -> None:
    assert paired({2: 5.0, 0: 3.0, 1: 9.0}, {0: 1.0, 2: 1.0, 7: 0.0}) == [2.0, 4.0]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 1, "better"), (0.1, 0.4, "better, by less than the margin"), (-1, -0.1, "worse"),
        (-0.4, -0.1, "worse, by less than the margin"), (-0.5, 0.5, "equivalent within the margin"),
        (-0.6, 0.2, "not decided"), (-0.2, 0.6, "not decided"), (-math.inf, math.inf, "not decided"),
        (0, 1, "not decided"), (2, 2, "not decided, for all differences are equal"),
        (0, 0, "not decided, for all differences are equal"),
    ],
)  # fmt: skip
def test_verdicts(low: float, high: float, said: str) -> None:
    assert verdict(Mean((low + high) / 2 if math.isfinite(low) else 0.0, low, high, 7), 0.5) == said


def test_a_win_needs_routes_that_matter() -> None:
    better = Mean(1, 0.5, 1.5, 7)
    without = "better, but not shown to be by its routes"
    assert verdict(better, 0.5, Mean(0.05, 0.02, 0.08, 7), 0.01) == "better"
    assert verdict(better, 0.5, Mean(0.05, 0.005, 0.08, 7), 0.01) == without
    assert verdict(better, 0.5, None, 0.01) == without
    assert verdict(better, 2, None, 0.01) == "better, by less than the margin, but not shown to be by its routes"


def test_ranks_by_seed_and_shared_ranks() -> None:
    scores = {1e-4: {0: 0.5, 1: 0.9}, 1e-3: {0: 0.7, 1: 0.8}, 1e-2: {0: 0.7, 1: 0.1}}
    assert mean_ranks(scores) == {1e-4: 2.0, 1e-3: 1.75, 1e-2: 2.25}
    theirs = stats.rankdata([[-0.5, -0.7, -0.7], [-0.9, -0.8, -0.1]], axis=1).mean(axis=0)
    assert list(mean_ranks(scores).values()) == list(theirs)
