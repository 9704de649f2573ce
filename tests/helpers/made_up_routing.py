"""Classes and decisions of images that are made up, for numbers whose answers are known."""

from __future__ import annotations

import numpy as np

IMAGES, CLASSES, EXPERTS, TOKENS = 600, 10, 8, 50


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def labels(seed: int = 0) -> np.ndarray:
    return rng(seed).integers(0, CLASSES, IMAGES)


def chosen(experts: np.ndarray) -> np.ndarray:
    """(I,) one expert of each image, as counts (I, N)."""
    return (experts[:, None] == np.arange(EXPERTS)).astype(int)
