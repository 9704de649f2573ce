"""Chance levels of similarities by permutation: what a figure would be if indices, tokens or experts had no meaning.

Two kinds of things are permuted. Hidden units and tokens are many, so the exact mean and variance over all permutations
(Hoeffding, A Combinatorial Central Limit Theorem, 1951) give the range of a normal distribution. Experts are few, so
relabelled experts are counted out.

Axes: N experts, M things that are exchanged, V relabellings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from torch import Tensor

from vimoe.analysis.intervals import CONFIDENCE, Z

COUNTED = 6  # experts whose relabellings are all tried: 720 of them
DRAWN = 499  # relabellings of more experts


@dataclass(frozen=True)
class Permuted:
    """A figure beside its values under permutation.

    Attributes:
        value: the figure.
        low, high: range of 95% of its values if what is permuted had no meaning; a value inside says nothing.
    """

    value: float
    low: float
    high: float

    @classmethod
    def normal(cls, value: float, mean: float, variance: float) -> Permuted:
        """Return a figure whose values under permutation have this mean and variance."""
        half = Z * math.sqrt(max(variance, 0.0))
        return cls(value, mean - half, mean + half)

    @classmethod
    def relabelled(cls, n: int, figure: Callable[[np.ndarray], float], seed: int = 0) -> Permuted:
        """Return a figure whose values under permutation are those for relabelled experts.

        Args:
            n: N.
            figure: function of new labels (N,) of the experts on one of two sides; the other side keeps its own.
            seed: draws labels where they are too many to try all.
        """
        rng = np.random.default_rng(seed)
        labels: Iterable[tuple[int, ...]] = permutations(range(n))
        if n > COUNTED:
            labels = (tuple(rng.permutation(n)) for _ in range(DRAWN))
        values = [figure(np.array(each)) for each in labels]
        low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return cls(figure(np.arange(n)), float(low), float(high))


def exchange_moments(values_MM: Tensor) -> tuple[float, float]:
    """Return mean and variance, over all permutations p, of the mean over m of values[m, p(m)]; M is at least 2.

    Hoeffding (1951): with d the values less the means of their row and column, plus the mean of all, the variance of
    the sum is sum d^2 / (M - 1).
    """
    m, all_MM = len(values_MM), values_MM.double()
    mean = all_MM.mean()
    apart_MM = all_MM - all_MM.mean(dim=0) - all_MM.mean(dim=1, keepdim=True) + mean
    return mean.item(), (apart_MM.square().sum() / (m - 1) / m**2).item()
