"""Usage of experts: how often each was chosen, how evenly, and in which combinations over depth.

Axes: I images, C classes, N experts, U routed units of an image (1, or its tokens), K chosen experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vimoe.analysis.intervals import Interval, Z, mean_intervals, resamples


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


def favourites(counts: np.ndarray, gates: np.ndarray) -> np.ndarray:
    """Return each image's most used expert (I,); N, which is none, for an image without any.

    Of equally used experts the one with the larger sum of gates (I, N) counts.
    """
    most = (counts + gates / (1 + gates.sum(axis=1, keepdims=True))).argmax(axis=1)
    return np.where(counts.any(axis=1), most, counts.shape[1])


def most_frequent(experts: np.ndarray, gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent combination (K,) of the decisions (I, U, K), and its mean gates (K,)."""
    order = np.argsort(experts, axis=-1)
    experts, gates = (np.take_along_axis(a, order, -1).reshape(-1, a.shape[-1]) for a in (experts, gates))
    codes = _codes(experts)
    mine = codes == np.bincount(codes).argmax()
    return experts[mine][0], gates[mine].mean(axis=0)


def effective_number(counts: np.ndarray, seed: int = 0, sequences: np.ndarray | None = None) -> Interval:
    """exp(entropy of the load) of (I, N) counts: N where all experts are used alike, 1 where only one is.

    With the estimate and 1.96 bootstrap standard deviations, because resampled loads are less even than loads are.
    """
    numbers = np.exp(entropy(np.concatenate([w @ counts for w in resamples(len(counts), seed, sequences)])))
    value, half = float(np.exp(entropy(counts.sum(axis=0)))), Z * float(numbers.std())
    return Interval(value, max(value - half, 1.0), min(value + half, float(counts.shape[1])))


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
    return len(taken), float(np.exp(entropy(taken)))


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


def entropy(counts: np.ndarray) -> np.ndarray:
    """Return the entropy over the last axis, in nats."""
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=-1)


def _codes(rows: np.ndarray) -> np.ndarray:
    """Return a number for each row of small numbers, from -1 on; it is equal where the rows are."""
    codes = np.zeros(len(rows), dtype=np.int64)
    for column in rows.T:
        _, codes = np.unique(codes * (int(column.max()) + 2) + column + 1, return_inverse=True)  # small again
    return codes
