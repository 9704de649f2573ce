"""Specialisation in numbers with intervals: pure functions of how often each image used each expert.

Images are independent of one another, tokens are not. So intervals come from resampling whole images, and the chance
level from permuting the classes of whole images: by tokens, experts that follow the image but not its class would look
specialised. If images are frames of videos, the videos are independent, and whole sequences of frames are resampled and
permuted.
The argument `sequences` then has (I,) numbers 0..S-1, each at least once; it is None if each image counts by itself.

Axes: I images, S sequences, C classes, N experts, U routed units of an image (1, or its tokens), K chosen experts,
L layers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

CONFIDENCE = 0.95
Z = 1.959964  # half the width of a normal interval of that confidence, in standard deviations
RESAMPLES = 500
WIDER = 1.05  # than it could be, at most, an interval over draws that ended early
FEWEST = 5  # sequences that are resampled: of fewer the samples are too alike for an interval
_EXCHANGES = 100  # of sequences between two layers: for a chance level alone, which needs fewer than p
_PERMUTED_UNITS = 200_000_000  # decisions that are permuted for a null distribution
_CHUNK = 400_000  # resampled images at a time, which bounds the memory
_NO_ROOM = 1e-9  # nats between chance level and maximum, below which all is rounding


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% interval, over images or over sequences of them."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


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
        w @ values / w.sum(axis=1, keepdims=True) for w in _resamples(len(values), seed, sequences)
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
    for w in _resamples(len(values), seed, sequences):
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
        else (ordered[donors] for donors in _exchanges(units, permutations, rng))
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


def count_experts(
    group: np.ndarray, experts: np.ndarray, groups: int, num_experts: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """(groups, N) how often each expert was chosen in each group, or the sum of the weights of these choices.

    Args:
        group: (...,) number of the group that each decision belongs to, from 0.
        experts: (..., K) chosen experts; -1, an empty slot, does not count.
        groups, num_experts: number of groups, and N.
        weights: (..., K).
    """
    code = group[..., None] * (num_experts + 1) + experts + 1  # empty slots have a column of their own
    flat = None if weights is None else weights.ravel()
    counts = np.bincount(code.ravel(), flat, groups * (num_experts + 1))
    return counts.reshape(groups, num_experts + 1)[:, 1:]


def tables_of_units(labels: np.ndarray, experts: np.ndarray, classes: int, num_experts: int) -> np.ndarray:
    """(I, C, N) how often the units of each class chose each expert, image by image.

    Args:
        labels: (I, U) class of each unit; negative where it has none, and does not count.
        experts: (I, U, K), -1 in empty slots.
        classes, num_experts: C and N.
    """
    images, counted = len(labels), labels >= 0
    image = np.broadcast_to(np.arange(images)[:, None], labels.shape)[counted]
    return count_experts(image * classes + labels[counted], experts[counted], images * classes, num_experts).reshape(
        images, classes, num_experts
    )


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
        for donors in _exchanges(units, permutations, rng)
    ])  # fmt: skip
    flat = tables.reshape(len(tables), -1)
    samples = np.concatenate(
        [
            _mutual_information((w @ flat).reshape(-1, classes, num_experts))
            for w in _resamples(len(tables), seed, units)
        ]
    )
    return _adjusted(table, nats, float(null.mean()), null, samples)


def effective_number(counts: np.ndarray, seed: int = 0, sequences: np.ndarray | None = None) -> Interval:
    """exp(entropy of the load) of (I, N) counts: N where all experts are used alike, 1 where only one is.

    With the estimate and 1.96 bootstrap standard deviations, because resampled loads are less even than loads are.
    """
    numbers = np.exp(_entropy(np.concatenate([w @ counts for w in _resamples(len(counts), seed, sequences)])))
    value, half = float(np.exp(_entropy(counts.sum(axis=0)))), Z * float(numbers.std())
    return Interval(value, max(value - half, 1.0), min(value + half, float(counts.shape[1])))


def favourites(counts: np.ndarray, gates: np.ndarray) -> np.ndarray:
    """Return each image's most used expert (I,); N, which is none, for an image without any.

    Of equally used experts the one with the larger sum of gates (I, N) counts.
    """
    most = (counts + gates / (1 + gates.sum(axis=1, keepdims=True))).argmax(axis=1)
    return np.where(counts.any(axis=1), most, counts.shape[1])


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


def activated_pairs(
    counts: Sequence[np.ndarray], seed: int = 0, sequences: np.ndarray | None = None
) -> tuple[Interval, int, int]:
    """Distinct (layer, expert) pairs that an image activates, from (I, N) counts of each layer: mean, least, most."""
    pairs = sum((layer > 0).sum(axis=1) for layer in counts)
    assert isinstance(pairs, np.ndarray)
    (mean,) = mean_intervals(pairs[:, None], seed, sequences)
    return mean, int(pairs.min()), int(pairs.max())


def routes(decisions: Sequence[np.ndarray]) -> tuple[int, float]:
    """Distinct combinations of experts over depth, and their effective number, exp(entropy).

    Args:
        decisions: chosen experts (I, U, K) of each layer, -1 in empty slots. A layer that routes whole images sends all
            of their tokens there. In a hierarchical model, whose tokens become fewer, no token has a route: a layer
            then counts with the first choice of most tokens of an image.
    """
    units = max(layer.shape[1] for layer in decisions)
    if not {layer.shape[1] for layer in decisions} <= {1, units}:
        units = 1
        decisions = [
            np.array([np.bincount(image + 1).argmax() - 1 for image in layer[..., 0]])[:, None, None]
            for layer in decisions
        ]
    spread = [
        np.broadcast_to(layer, (len(layer), units, layer.shape[2])).reshape(len(layer) * units, -1)
        for layer in decisions
    ]
    taken = np.bincount(_codes(np.concatenate([np.sort(layer, axis=1) for layer in spread], axis=1)))
    return len(taken), float(np.exp(_entropy(taken)))


def possible_routes(choices: Sequence[tuple[Sequence[int], bool]]) -> int:
    """Return the number of routes that tokens could take: of one kind of tokens the product over the layers.

    A token's kind, and so its pool of experts, is the same in all layers. Routes of several kinds can be the same one
    only if they are empty in all layers that have pools; each is counted once.

    Args:
        choices: of each layer, how many sets of experts a token of each kind can get (one number where kinds do not
            matter), and if the empty set is one of them.
    """
    kinds = max(len(each) for each, _ in choices)
    of_kinds = [math.prod(each[min(kind, len(each) - 1)] for each, _ in choices) for kind in range(kinds)]
    in_common = math.prod(each[0] if len(each) == 1 else int(empty) for each, empty in choices)
    return sum(of_kinds) - (kinds - 1) * in_common


def most_frequent(experts: np.ndarray, gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent combination (K,) of the decisions (I, U, K), and its mean gates (K,)."""
    order = np.argsort(experts, axis=-1)
    experts, gates = (np.take_along_axis(a, order, -1).reshape(-1, a.shape[-1]) for a in (experts, gates))
    codes = _codes(experts)
    mine = codes == np.bincount(codes).argmax()
    return experts[mine][0], gates[mine].mean(axis=0)


def halves(labels: np.ndarray, seed: int = 0, sequences: np.ndarray | None = None) -> np.ndarray:
    """(I,) True for a random half of the images of each class, the larger one where their number is odd.

    Where images belong to sequences (I,), numbered from 0, it is a half of the sequences, whatever their classes.
    """
    if sequences is not None:
        return halves(np.zeros(sequences.max() + 1), seed)[sequences]
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    mask = np.zeros(len(labels), dtype=bool)
    mask[order] = rank % 2 == 0
    return mask


def best_for_class(values: np.ndarray, labels: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Return for each image the column with the lowest mean over the images of its class in the other half.

    So no image takes part in the choice that it is judged by.

    Args:
        values: (I, V).
        labels: (I,) class of each image; below 0 for none.
        half: (I,) bool, the half that each image is in.

    Returns:
        (I,) numbers of columns; -1 for an image without a class, or whose class has no images in the other half.
    """
    best = np.full(len(labels), -1)
    for label, side in product(np.unique(labels[labels >= 0]), (True, False)):
        same = labels == label
        if (same & (half != side)).any():
            best[same & (half == side)] = values[same & (half != side)].mean(axis=0).argmin()
    return best


def orders(tables: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Order the classes, for all layers alike, and the experts of each layer so that blocks appear.

    Spectral co-clustering (Dhillon, KDD 2001) of P(expert | class) of all layers side by side. Draw the result on other
    images than it was found on: sorting makes structure of noise.

    Args:
        tables: counts (C, N) of each layer, how often the units of a class chose each expert.
    """
    shares = [table / np.maximum(table.sum(axis=1, keepdims=True), 1) for table in tables]
    together = np.concatenate(shares, axis=1)
    seen, used = together.any(axis=1), together.any(axis=0)  # what is empty would make clusters of its own
    rows, closeness = np.full(len(together), np.inf), together.max(axis=1)
    # classes with the same routes are one point: as several they would be parted by rounding
    points, point = np.unique(together[seen][:, used].round(9), axis=0, return_inverse=True)
    clusters = min(len(points), max(share.any(axis=0).sum() for share in shares))
    if clusters > 1:
        from sklearn.cluster import SpectralCoclustering

        found = SpectralCoclustering(clusters, random_state=0).fit(points + 1e-6)
        rows[seen] = found.row_labels_[point]
        same = rows[seen][:, None] == found.column_labels_
        closeness[seen] = (points[point] * same).sum(axis=1)
    order = np.lexsort((-closeness, rows))
    position = np.empty(len(order))
    position[order] = np.arange(len(order))
    centres = [(position[:, None] * share).sum(axis=0) / np.maximum(share.sum(axis=0), 1e-12) for share in shares]
    idle = [share.sum(axis=0) == 0 for share in shares]  # they stand last
    return order, [np.lexsort((centre, none)) for centre, none in zip(centres, idle, strict=True)]


def _adjusted(table: np.ndarray, nats: float, expected: float, null: np.ndarray, resampled: np.ndarray) -> Dependence:
    """Mutual information above the chance level, over the most that these loads allow."""
    scale = (_entropy(table.sum(axis=1)) + _entropy(table.sum(axis=0))) / 2 - expected
    p = (1 + int((null >= nats - 1e-12).sum())) / (1 + len(null))
    if scale < _NO_ROOM:
        return Dependence(0.0, 0.0, 0.0, p, nats)
    value, half = (nats - expected) / scale, Z * float(resampled.std()) / scale
    return Dependence(float(value), float(value - half), float(min(value + half, max(value, 1.0))), p, nats)


def _resamples(images: int, seed: int, sequences: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yield bootstrap weights (s, I), RESAMPLES in all: how often each image was drawn, or its sequence."""
    rng = np.random.default_rng(seed)
    units = images if sequences is None else int(sequences.max()) + 1
    size = max(1, min(RESAMPLES, _CHUNK // images))
    for start in range(0, RESAMPLES, size):
        drawn = rng.integers(0, units, (min(size, RESAMPLES - start), units))
        weights = np.stack([np.bincount(row, minlength=units) for row in drawn]).astype(np.float64)
        yield weights if sequences is None else weights[:, sequences]


def _exchanges(sequences: np.ndarray, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
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


def _codes(rows: np.ndarray) -> np.ndarray:
    """Return a number for each row of small numbers, from -1 on; it is equal where the rows are."""
    codes = np.zeros(len(rows), dtype=np.int64)
    for column in rows.T:
        _, codes = np.unique(codes * (int(column.max()) + 2) + column + 1, return_inverse=True)  # small again
    return codes


def _single(counts: np.ndarray) -> bool:
    """Return True if each image chose one expert once."""
    return bool((counts.sum(axis=1) == 1).all())


def _resampled_tables(
    ordered: np.ndarray, starts: np.ndarray, table: np.ndarray, seed: int, sequences: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Yield contingency tables (s, C, N) of RESAMPLES bootstrap samples of the images (I, N), ordered by class."""
    images = len(ordered)
    if sequences is None and _single(ordered):  # then the table knows all that there is to know
        rng, size = np.random.default_rng(seed), max(1, _CHUNK // table.size)
        for start in range(0, RESAMPLES, size):
            drawn = rng.multinomial(images, table.ravel() / images, size=min(size, RESAMPLES - start))
            yield drawn.reshape(-1, *table.shape)
        return
    slices = [slice(a, b) for a, b in zip(starts, [*starts[1:], images], strict=True)]
    for w in _resamples(images, seed, sequences):
        yield np.stack([w[:, s] @ ordered[s] for s in slices], axis=1)


def _mutual_information(table: np.ndarray) -> np.ndarray:
    """Return the mutual information, in nats, of the two variables of contingency tables (..., C, N)."""
    joint = table / np.maximum(table.sum(axis=(-2, -1), keepdims=True), 1)  # counts, of which there may be none
    independent = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
    return (joint * np.log(ratio)).sum(axis=(-2, -1))


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Return the entropy over the last axis, in nats."""
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=-1)
