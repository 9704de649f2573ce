"""Halves are of every class, and what is chosen on one finds nothing in noise on the other."""

from __future__ import annotations

import numpy as np
from helpers.made_up_routing import CLASSES, EXPERTS, IMAGES, labels, rng

from vimoe.analysis.halves import best_for_class, halves


def test_halves_are_stratified() -> None:
    y = labels()
    half = halves(y)
    for c in range(CLASSES):
        assert half[y == c].sum() == -(-(y == c).sum() // 2)
    assert not np.array_equal(half, halves(y, seed=1))
    of_video = np.array([0, 0, 0, 1, 2, 2, 3, 3, 4])
    of_frames = halves(y[: len(of_video)], sequences=of_video)
    assert [len(set(of_frames[of_video == video])) for video in range(5)] == [1] * 5
    assert len(set(of_video[of_frames])) == 3  # the larger half


def test_the_best_for_a_class_is_chosen_by_the_other_half() -> None:
    values = np.array([[0, 9], [9, 0], [9, 0], [5, 4], [0, 9], [1, 2.0]])
    half = np.array([True, False, True, False, True, False])
    found = best_for_class(values, np.array([0, 0, 0, 0, 1, -1]), half)
    # of class 0 the first half has the means 4.5 and 4.5, the other 7 and 2; class 1 has nobody to choose for it
    assert found.tolist() == [1, 0, 1, 0, -1, -1]
    assert best_for_class(values, np.zeros(6), half).tolist() == [1, 0, 1, 0, 1, 0]


def test_choosing_on_the_other_half_finds_nothing_in_noise() -> None:
    """Chosen and judged by the same images, the best of many columns of noise looks good."""
    noise, classes = rng(1).normal(size=(IMAGES, EXPERTS)), np.arange(IMAGES) % CLASSES
    best = best_for_class(noise, classes, halves(classes))
    same = np.stack([noise[classes == c].mean(axis=0) for c in range(CLASSES)]).min(axis=1).mean()
    assert same < -0.1 and abs(noise[np.arange(IMAGES), best].mean()) < 0.09
