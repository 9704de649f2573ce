"""Statistics of paired differences over seeds, in small functions."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

Name = TypeVar("Name", bound=Hashable)  # of a rate, or of an outcome
EXACT = 16  # seeds up to which all 2^n signs are tried


@dataclass(frozen=True)
class Mean:
    """A mean with an interval.

    Attributes:
        value: mean.
        low, high: ends of the interval; infinite for fewer than two values.
        n: number of values.
    """

    value: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float], comparisons: int = 1, confidence: float = 0.95) -> Mean:
    """Return the mean and its Student interval: mean ± t(1 - a / 2m; n - 1) s / sqrt(n), a = 1 - confidence.

    Args:
        values: values, at least one; for paired arms their differences by seed.
        comparisons: m, the number of intervals that shall hold together (Bonferroni).
        confidence: probability that they hold.
    """
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Mean(mean, -float("inf"), float("inf"), n)
    half = float(stats.t.ppf(1 - (1 - confidence) / (2 * comparisons), n - 1)) * statistics.stdev(values) / n**0.5
    return Mean(mean, mean - half, mean + half, n)


def sign_flip_p(values: Sequence[float]) -> float:
    """Return the two-sided p-value of a mean of 0: the share of all signs with a mean at least as far from 0.

    It assumes that a difference and its negative are equally likely if the arms are equal, and no normal distribution.
    The smallest p is 2 / 2^n. Above EXACT values, 9,999 random signs of a fixed seed stand for all.
    """
    if len(values) < 2:
        return 1.0
    exact = len(values) <= EXACT
    found = stats.permutation_test(
        (np.asarray(values),),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if exact else 9999,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def paired(of: dict[int, float], against: dict[int, float]) -> list[float]:
    """Return of - against for each seed that both have, in the order of the seeds."""
    return [of[seed] - against[seed] for seed in sorted(of.keys() & against.keys())]


def verdict(difference: Mean, margin: float, routes: Mean | None = None, needed: float | None = None) -> str:
    """Return what a difference says, by the rule of the study.

    "better" if its interval lies above 0, and "worse" if it lies below; "equivalent" if it lies within ± margin and
    holds 0. Else, and if all differences are equal, "not decided". Better and worse say so if the interval lies within
    the margin. Where routes have to matter, better is "not shown to be by its routes" unless the interval of what it
    costs to permute them lies above `needed`.

    Args:
        difference: difference of a metric of which more is better, over seeds.
        margin: largest difference that counts as none, in the same unit.
        routes: cost of permuting the routes, over seeds, in nats.
        needed: cost that it has to exceed; None if there is no such condition.
    """
    if difference.n > 1 and difference.low == difference.high:  # few seeds on few images: a spread is there, and unseen
        return "not decided, for all differences are equal"
    within = -margin <= difference.low and difference.high <= margin
    little = ", by less than the margin" if within else ""
    if difference.low > 0:
        unshown = needed is not None and (routes is None or routes.low <= needed)
        return f"better{little}{', but not shown to be by its routes' if unshown else ''}"
    if difference.high < 0:
        return f"worse{little}"
    return "equivalent within the margin" if within else "not decided"


def mean_ranks(scores: Mapping[Name, Mapping[int, float]]) -> dict[Name, float]:
    """Return the mean over seeds of each candidate's rank, 1 for the highest score; equal scores share their ranks.

    Args:
        scores: score of each candidate by seed; all have the same seeds.
    """
    names = list(scores)
    seeds = sorted(scores[names[0]])
    ranks = [stats.rankdata([-scores[name][seed] for name in names]) for seed in seeds]
    return {name: float(np.mean([row[i] for row in ranks])) for i, name in enumerate(names)}
