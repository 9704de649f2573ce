"""Intervals over images, or over sequences of images, from resampling them.

Images are independent of one another, tokens are not. So whole images are resampled. If images are frames of videos,
the videos are independent, and whole sequences of frames are resampled.
The argument `sequences` then has (I,) numbers 0..S-1, each at least once; it is None if each image counts by itself.

Axes: I images, S sequences, Q quantities, D draws of a partner for each image.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
Z = 1.959964  # half the width of a normal interval of that confidence, in standard deviations
RESAMPLES = 500
WIDER = 1.05  # than it could be, at most, an interval over draws that ended early
FEWEST = 5  # sequences that are resampled: of fewer the samples are too alike for an interval
CHUNK = 400_000  # resampled images at a time, which bounds the memory


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% interval, over images or over sequences of them."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def numbered(names: Sequence[Hashable] | None) -> tuple[np.ndarray | None, int | None]:
    """Number the sequences of images, given their names, in the order in which they come.

    Returns:
        Numbers (I,) to resample by, None for resampling by image; and the count of sequences, None if nothing is known.
        Fewer than `FEWEST` are counted and not resampled: then intervals are of these videos' frames (`over` says so).
    """
    if names is None:
        return None, None
    numbers: dict[Hashable, int] = {}
    sequences = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)
    return (sequences if len(numbers) >= FEWEST else None), len(numbers)


def over(sequences: int | None) -> str:
    """Return in words what intervals are over, given the count of sequences, or None if nothing is known."""
    if sequences is None:
        return "over images"
    if sequences >= FEWEST:
        return f"over {sequences} sequences of images"
    return f"over single frames of {sequences} sequence{'s' * (sequences != 1)}, and so too narrow"


def mean_intervals(values: np.ndarray, seed: int = 0, sequences: np.ndarray | None = None) -> list[Interval]:
    """Return the mean over images of each column of (I, Q), with its bootstrap percentiles."""
    means = np.concatenate([
        w @ values / w.sum(axis=1, keepdims=True) for w in resamples(len(values), seed, sequences)
    ])  # fmt: skip
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return [Interval(*map(float, each)) for each in zip(values.mean(axis=0), low, high, strict=True)]


def pair_interval(
    values: np.ndarray, partners: np.ndarray, seed: int = 0, sequences: np.ndarray | None = None
) -> Interval:
    """Return the mean of (I, D) values that depend on two images each, and its interval.

    Value (i, d) is of image i and image partners[i, d]. Both are resampled: in a bootstrap sample a pair counts as
    often as both of its images together, by the product of their weights. A pair within one sequence counts by the
    weight of that sequence, or similar frames would be paired more often in the samples than in the data.
    """
    means = []
    unit = np.arange(len(values)) if sequences is None else sequences
    units = int(unit.max()) + 1
    across = units / max(units - 1, 1)  # over the mean of a product of two weights: so all pairs count 1 on average
    for w in resamples(len(values), seed, sequences):
        sums, weights = np.zeros(len(w)), np.zeros(len(w))
        for value, partner in zip(values.T, partners.T, strict=True):
            pairs = np.where(unit == unit[partner], w, across * w * w[:, partner])
            sums += pairs @ value
            weights += pairs.sum(axis=1)
        means.append(sums[weights > 0] / weights[weights > 0])  # of few images a sample may hold no pair
    low, high = np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def enough_draws(
    values: np.ndarray, partners: np.ndarray, most: int, seed: int = 0, sequences: np.ndarray | None = None
) -> int:
    """Return the number of draws after which the interval is at most `WIDER` times as wide as with `most` draws.

    A few draws tell it. The square of the width of `pair_interval` is a + b / draws: a comes from the images, b from
    the pairs that they happen to form, and more draws lower the second term alone. Both follow from the width for these
    draws and for either half of them. The mean plays no part, so stopping does not bias the mean.

    Args:
        values, partners, seed, sequences: arguments of `pair_interval`, with an even number of draws.
        most: the most draws that can be made.
    """
    draws = values.shape[1]

    def square(some: slice) -> float:
        interval = pair_interval(values[:, some], partners[:, some], seed, sequences)
        return (interval.high - interval.low) ** 2

    whole, halves = square(slice(None)), square(slice(draws // 2)) / 2 + square(slice(draws // 2, None)) / 2
    b = draws * max(0.0, halves - whole)
    a = max(0.0, whole - b / draws)
    room = WIDER**2 * (a + b / most) - a
    return min(most, max(draws, math.ceil(b / room - 1e-9))) if room > 0 else draws


def resamples(images: int, seed: int, sequences: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yield bootstrap weights (s, I), RESAMPLES in all: how often each image was drawn, or its sequence."""
    rng = np.random.default_rng(seed)
    units = images if sequences is None else int(sequences.max()) + 1
    size = max(1, min(RESAMPLES, CHUNK // images))
    for start in range(0, RESAMPLES, size):
        drawn = rng.integers(0, units, (min(size, RESAMPLES - start), units))
        weights = np.stack([np.bincount(row, minlength=units) for row in drawn]).astype(np.float64)
        yield weights if sequences is None else weights[:, sequences]
