"""Dependence of experts on classes, and of layers on one another: adjusted mutual information, with intervals.

The chance level comes from permuting the classes of whole images: by tokens, experts that follow the image but not its
class would look specialised. If images are frames of videos, whole sequences of frames are permuted, and resampled for
the interval (`vimoe.analysis.intervals` describes the argument `sequences`).

Axes: I images, C classes, N experts, U routed units of an image (1, or its tokens), K chosen experts, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vimoe.analysis.expert_usage import entropy, tables_of_units
from vimoe.analysis.intervals import CHUNK, RESAMPLES, Interval, Z, resamples

_EXCHANGES = 100  # of sequences between two layers: for a chance level alone, which needs fewer than p
_PERMUTED_UNITS = 200_000_000  # decisions that are permuted for a null distribution
_NO_ROOM = 1e-9  # nats between chance level and maximum, below which all is rounding


@dataclass(frozen=True)
class Dependence(Interval):
    """Dependence of two variables on one another.

    Attributes:
        value: adjusted mutual information: 0 is the chance level, 1 means that either follows from the other. If an
            image makes several choices, it stays below 1, because its class does not tell which choice is meant.
        low, high: value -/+ 1.96 bootstrap standard deviations. The interval is for as many images as there are: with
            few images a class, the AMI of all images in the world can be somewhat higher.
        p: share of permutations of whole images with at least as much mutual information.
        nats: mutual information, plug-in estimate; biased upwards where images are few.
    """

    p: float
    nats: float


def dependence(
    labels: np.ndarray, counts: np.ndarray, seed: int = 0, permutations: int = RESAMPLES,
    sequences: np.ndarray | None = None,
) -> Dependence:  # fmt: skip
    """Adjusted mutual information of an image's class and its experts (Vinh et al., JMLR 2010, arithmetic mean).

    If each image chose one expert, it is scikit-learn's `adjusted_mutual_info_score`. Else it is that of class and
    expert over all choices, with the mean over permutations of whole images as chance level; with sequences it is the
    mean over exchanges of whole sequences, as in `dependence_of_units`.

    Args:
        labels: (I,) class of each image.
        counts: (I, N) how often it chose each expert; an image may have chosen none.
        seed: draws resamples and permutations.
        permutations: number of permutations, for p, and for the chance level if images chose several experts or come in
            sequences.
        sequences: sequences that are resampled and permuted.
    """
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    ordered = counts[order].astype(np.int64)
    table = np.add.reduceat(ordered, starts)
    nats = float(_mutual_information(table))
    rng = np.random.default_rng(seed)
    units = None if sequences is None else sequences[order]
    exchanged = (
        (rng.permutation(ordered) for _ in range(permutations))
        if units is None
        else (ordered[donors] for donors in exchanges(units, permutations, rng))
    )
    null = np.array([_mutual_information(np.add.reduceat(given, starts)) for given in exchanged])
    if units is None and _single(counts):
        from sklearn.metrics.cluster import expected_mutual_information  # figures and reports should not wait for it

        used = np.ascontiguousarray(table[:, table.any(axis=0)])
        expected = float(expected_mutual_information(used, int(used.sum())))
    else:
        expected = float(null.mean())
    samples = [_mutual_information(t) for t in _resampled_tables(ordered, starts, table, seed, units)]
    return _adjusted(table, nats, expected, null, np.concatenate(samples))


def dependence_of_units(
    labels: np.ndarray, experts: np.ndarray, classes: int, num_experts: int, seed: int = 0,
    sequences: np.ndarray | None = None,
) -> Dependence:  # fmt: skip
    """Adjusted mutual information of class and expert where each unit of an image has a class of its own.

    The chance level is the mean over permutations that give whole images the decisions of other images, position by
    position. So experts that follow the position in the image alone (the sky is above) are at chance level, though
    classes follow it too. Whole sequences exchange decisions frame by frame, for the same reason: permuted one by one,
    each frame of a video would prove again that experts follow the video.

    Args:
        labels, experts, classes, num_experts: arguments of `tables_of_units`.
        seed: draws resamples and permutations.
        sequences: sequences that are resampled and permuted.
    """
    counted = (labels >= 0).any(axis=1)
    labels, experts = labels[counted], experts[counted]
    units = np.arange(len(labels)) if sequences is None else np.unique(sequences[counted], return_inverse=True)[1]
    if not len(labels):
        return Dependence(0.0, 0.0, 0.0, 1.0, 0.0)
    tables = tables_of_units(labels, experts, classes, num_experts)
    table = tables.sum(axis=0)
    nats = float(_mutual_information(table))
    rng = np.random.default_rng(seed)
    permutations = int(np.clip(_PERMUTED_UNITS // max(experts.size, 1), 100, RESAMPLES))
    null = np.array([
        _mutual_information(tables_of_units(labels, experts[donors], classes, num_experts).sum(axis=0))
        for donors in exchanges(units, permutations, rng)
    ])  # fmt: skip
    flat = tables.reshape(len(tables), -1)
    samples = np.concatenate(
        [_mutual_information((w @ flat).reshape(-1, classes, num_experts)) for w in resamples(len(tables), seed, units)]
    )
    return _adjusted(table, nats, float(null.mean()), null, samples)


def agreement(
    favourites: Sequence[np.ndarray], seed: int = 0, sequences: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Adjusted mutual information between the images' favourite experts of every two layers.

    Args:
        favourites: (I,) of each layer.
        seed, sequences: arguments of `dependence`.

    Returns:
        "value", "low" and "high", each (L, L).
    """
    permutations = 0 if sequences is None else _EXCHANGES  # of single images the chance level is known exactly
    found = {key: np.eye(len(favourites)) for key in ("value", "low", "high")}
    for i, first in enumerate(favourites):
        for j, second in enumerate(favourites[:i]):
            chosen = second[:, None] == np.arange(second.max() + 1)
            pair = dependence(first, chosen, seed, permutations, sequences)
            for key, matrix in found.items():
                matrix[i, j] = matrix[j, i] = getattr(pair, key)
    return found


def _adjusted(table: np.ndarray, nats: float, expected: float, null: np.ndarray, resampled: np.ndarray) -> Dependence:
    """Mutual information above the chance level, over the most that these loads allow."""
    scale = (entropy(table.sum(axis=1)) + entropy(table.sum(axis=0))) / 2 - expected
    p = (1 + int((null >= nats - 1e-12).sum())) / (1 + len(null))
    if scale < _NO_ROOM:
        return Dependence(0.0, 0.0, 0.0, p, nats)
    value, half = (nats - expected) / scale, Z * float(resampled.std()) / scale
    return Dependence(float(value), float(value - half), float(min(value + half, max(value, 1.0))), p, nats)


def exchanges(sequences: np.ndarray, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield for `count` permutations of sequences the image (I,) that gives its decisions to each image.

    Sequences exchange decisions frame by frame; a shorter giver begins again at its first frame.
    """
    order = np.argsort(sequences, kind="stable")
    lengths = np.bincount(sequences)
    starts = np.cumsum(lengths) - lengths
    frame = np.empty(len(order), np.int64)
    frame[order] = np.arange(len(order)) - np.repeat(starts, lengths)
    for _ in range(count):
        giver = rng.permutation(len(lengths))[sequences]
        yield order[starts[giver] + frame % lengths[giver]]


def _single(counts: np.ndarray) -> bool:
    """Return True if each image chose one expert once."""
    return bool((counts.sum(axis=1) == 1).all())


def _resampled_tables(
    ordered: np.ndarray, starts: np.ndarray, table: np.ndarray, seed: int, sequences: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Yield contingency tables (s, C, N) of RESAMPLES bootstrap samples of the images (I, N), ordered by class."""
    images = len(ordered)
    if sequences is None and _single(ordered):  # then the table knows all that there is to know
        rng, size = np.random.default_rng(seed), max(1, CHUNK // table.size)
        for start in range(0, RESAMPLES, size):
            drawn = rng.multinomial(images, table.ravel() / images, size=min(size, RESAMPLES - start))
            yield drawn.reshape(-1, *table.shape)
        return
    slices = [slice(a, b) for a, b in zip(starts, [*starts[1:], images], strict=True)]
    for w in resamples(images, seed, sequences):
        yield np.stack([w[:, s] @ ordered[s] for s in slices], axis=1)


def _mutual_information(table: np.ndarray) -> np.ndarray:
    """Return the mutual information, in nats, of the two variables of contingency tables (..., C, N)."""
    joint = table / np.maximum(table.sum(axis=(-2, -1), keepdims=True), 1)  # counts, of which there may be none
    independent = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
    return (joint * np.log(ratio)).sum(axis=(-2, -1))
