"""Choices that are made on one half of the images and judged on the other.

Axes: I images, V columns to choose from.
"""

from __future__ import annotations

from itertools import product

import numpy as np


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
