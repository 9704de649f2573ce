"""J and F of masks: by hand, against a loop over pixels, over images and processes; void belongs to no mask."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.segmenters import segmenter
from helpers.tiny import vit

from vimoe.config.masks import IGNORE
from vimoe.errors import ConfigError
from vimoe.metrics.base import metric_of
from vimoe.metrics.contours import contour, contour_accuracy, region_similarity
from vimoe.metrics.segmentation import ContourCounts, ContourScore, SceneCounts


def square(top: int, left: int, side: int = 2, shape: tuple[int, int] = (6, 6)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top : top + side, left : left + side] = True
    return mask


NOTHING = np.zeros((6, 6), bool)
OUTLINE = {(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (1, 2), (2, 1), (2, 2)}  # of the square at (1, 1)


def test_a_contour_by_hand() -> None:
    assert set(zip(*np.nonzero(contour(square(1, 1))), strict=True)) == OUTLINE
    assert not contour(NOTHING).any() and not contour(~NOTHING).any()  # the image's rim is no contour
    assert np.argwhere(contour(square(4, 4))).tolist() == [[3, 3], [3, 4], [3, 5], [4, 3], [5, 3]]


def test_region_similarity_by_hand() -> None:
    assert region_similarity(square(1, 1), square(1, 1)) == region_similarity(NOTHING, NOTHING) == 1
    assert region_similarity(square(1, 1), square(1, 2)) == 2 / 6
    assert region_similarity(square(1, 1), NOTHING) == region_similarity(square(1, 1), square(1, 3)) == 0


def test_contour_accuracy_by_hand() -> None:
    """Of the eight pixels of each outline five are within one pixel of the other; diagonals are further away."""
    assert contour_accuracy(square(1, 3), square(1, 1)) == 5 / 8
    assert contour_accuracy(square(1, 3), square(1, 1), tolerance=0) == 3 / 8
    assert contour_accuracy(square(1, 2), square(1, 1)) == contour_accuracy(NOTHING, NOTHING) == 1
    assert contour_accuracy(NOTHING, square(1, 1)) == contour_accuracy(square(1, 1), NOTHING) == 0
    far = np.zeros((20, 20), bool)
    far[15:18, 15:18] = True
    assert contour_accuracy(far, square(1, 1, shape=(20, 20))) == 0
    one_sided = square(1, 1) | (square(4, 4) & ~square(5, 5))  # every true pixel is near, and a second outline is not
    precision = 8 / contour(one_sided).sum()
    assert contour_accuracy(one_sided, square(1, 1)) == pytest.approx(2 * precision / (precision + 1))


def test_the_tolerance_is_a_share_of_the_diagonal_rounded_up() -> None:
    """0.008 of the diagonal of 480 x 360, which is 600, is 4.8 pixels."""
    wall = np.zeros((480, 360), bool)
    wall[:, :100] = True
    for shift, expected in ((5, 1), (6, 0)):
        assert contour_accuracy(np.roll(wall, shift, axis=1) | wall, wall) == expected


def slowly(predicted: np.ndarray, truth: np.ndarray, reach: int) -> float:
    def outline(mask: np.ndarray) -> list[tuple[int, int]]:
        height, width = mask.shape
        steps = ((0, 1), (1, 0), (1, 1))
        return [
            (y, x)
            for y, x in itertools.product(range(height), range(width))
            if any(mask[y, x] != mask[min(y + dy, height - 1), min(x + dx, width - 1)] for dy, dx in steps)
        ]

    ours, theirs = outline(predicted), outline(truth)
    shares = [
        sum(any(math.dist(p, q) <= reach for q in b) for p in a) / len(a) for a, b in ((ours, theirs), (theirs, ours))
    ]
    return 2 * math.prod(shares) / sum(shares)


@pytest.mark.parametrize("reach", [1, 2, 3])
def test_it_is_what_a_loop_over_pixels_gives(reach: int) -> None:
    rng = np.random.default_rng(reach)
    for _ in range(4):
        first, second = rng.random((2, 14, 19)) < 0.1
        got = contour_accuracy(first, second, (reach - 0.5) / math.hypot(14, 19))
        assert got == pytest.approx(slowly(first, second, reach))


def shown(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(mask.astype("int64"))[None]


def test_means_cover_the_images_whose_truth_has_the_class() -> None:
    counts = ContourCounts(3)
    counts.add_predictions(shown(square(1, 3)), shown(square(1, 1)))
    counts.add_predictions(shown(square(1, 1)), shown(square(1, 1)))
    counts.add_predictions(shown(square(1, 1)), shown(NOTHING))  # class 1 is not there, and only 0 pays for it
    score = counts.score()
    assert counts.frames.tolist() == [3, 2, 0]
    assert score.per_class_j[1:] == (0.5, None)
    assert score.per_class_f[1:] == ((5 / 8 + 1) / 2, None)
    assert score.per_class_j[0] == pytest.approx((28 / 36 + 1 + 32 / 36) / 3)
    assert score.j == pytest.approx((score.per_class_j[0] + 0.5) / 2) and "J " in str(score) and "F " in str(score)
    plain = SceneCounts(3)
    plain.confusion, plain.images = counts.confusion, counts.images
    assert plain.score().to_dict().items() <= score.to_dict().items()
    assert ContourScore.from_dict(json.loads(json.dumps(score.to_dict()))) == score


def test_only_masks_have_contours() -> None:
    assert type(metric_of(segmenter()).contours()) is ContourCounts
    with pytest.raises(ConfigError, match="contours of a classification model: expected one that predicts masks"):
        metric_of(vit()).contours()


def test_void_belongs_to_no_mask() -> None:
    truth = shown(square(1, 1))
    truth[0, :, 3:] = IGNORE
    first, second = ContourCounts(2), ContourCounts(2)
    first.add_predictions(shown(square(1, 1)), truth)
    second.add_predictions(shown(square(1, 1) | square(1, 4)), truth)
    assert first.score() == second.score() and first.score().per_class_j == (1, 1)


def test_processes_add_up() -> None:
    counts = ContourCounts(2)
    counts.add_predictions(shown(square(1, 3)), shown(square(1, 1)))
    twice = counts.over(SimpleNamespace(count=2, sum=lambda share: 2 * share))
    assert twice.frames.tolist() == [2, 2] and twice.score().per_class_f == counts.score().per_class_f
    assert (twice.score().images, twice.score().pixels) == (2, 72)
