"""Scores of masks, by hand and against torchmetrics; void never counts; what a patch size costs."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.known_scenes import known
from torch import Tensor

from vimoe.config.masks import IGNORE
from vimoe.errors import DataError
from vimoe.metrics.base import signature
from vimoe.metrics.segmentation import (
    SceneCounts,
    SceneScore,
    SegmentationMetric,
    ceiling,
    patch_classes,
    pixel_loss,
)

TRUTH = torch.tensor([[[0, 0, 1, 1], [0, 2, 1, IGNORE]]])
GUESS = torch.tensor([[[0, 1, 1, 1], [0, 2, 2, 0]]])


def scored(guess: Tensor, truth: Tensor, classes: int) -> SceneScore:
    counts = SceneCounts(classes)
    counts.add_predictions(guess, truth)
    return counts.score()


def noise(classes: int, seed: int = 0, batch: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, 9, 11, generator=g)
    masks = torch.randint(classes, (batch, 9, 11), generator=g)
    masks[torch.rand(masks.shape, generator=g) < 0.2] = IGNORE
    return logits, masks


def test_by_hand() -> None:
    score = scored(GUESS, TRUTH, 3)
    assert score.per_class_iou == pytest.approx((2 / 3, 2 / 4, 1 / 2))
    assert score.miou == pytest.approx((2 / 3 + 1 / 2 + 1 / 2) / 3)
    assert score.pixel_accuracy == pytest.approx(5 / 7) and (score.pixels, score.images) == (7, 1)
    assert json.loads(json.dumps(score.to_dict()))["per_class_iou"] == list(score.per_class_iou)


def test_the_confusion_is_truth_by_prediction_and_adds_up() -> None:
    counts = SceneCounts(3)
    for guess, truth in zip(GUESS[0].split(1), TRUTH[0].split(1), strict=True):
        counts.add_predictions(guess[None], truth[None])
    assert counts.confusion.tolist() == [[2, 1, 0], [0, 2, 1], [0, 0, 1]] and counts.confusion.dtype == torch.int64
    assert counts.score().miou == scored(GUESS, TRUTH, 3).miou


def test_void_never_counts() -> None:
    logits, masks = noise(4)
    first, second = SceneCounts(4), SceneCounts(4)
    first.add(logits, masks)
    other = logits.clone()
    other.permute(0, 2, 3, 1)[masks == IGNORE] = torch.randn(4) * 100
    second.add(other, masks)
    assert first.score() == second.score()
    second.add(logits, torch.full_like(masks, IGNORE))
    assert second.score().to_dict() == {**first.score().to_dict(), "images": 8}


def test_a_class_without_truth_does_not_touch_the_mean() -> None:
    truth = torch.tensor([[[0, 0, 1, 1]]])
    assert scored(truth, truth, 3).per_class_iou == (1.0, 1.0, None) and scored(truth, truth, 3).miou == 1.0
    guess = torch.tensor([[[0, 2, 1, 1]]])  # the absent class is predicted: what it takes is missing elsewhere
    assert scored(guess, truth, 3).per_class_iou == (0.5, 1.0, None) and scored(guess, truth, 3).miou == 0.75
    never = torch.tensor([[[0, 0, 0, 0]]])  # a class that is there and never predicted counts with 0
    assert scored(never, truth, 3).miou == 0.25


def test_one_class_only_and_nothing_at_all() -> None:
    truth = torch.zeros(1, 2, 2, dtype=torch.int64)
    assert scored(truth, truth, 2).per_class_iou == (1.0, None) and scored(truth, truth, 2).miou == 1.0
    empty = SceneCounts(2).score()
    assert (empty.miou, empty.pixels, empty.loss) == (0, 0, None)


def test_loss_is_the_mean_over_pixels_of_all_batches() -> None:
    (a, x), (b, y) = noise(3), noise(3, seed=1, batch=1)
    y[:, 2:] = IGNORE
    counts = SceneCounts(3)
    counts.add(a, x)
    counts.add(b, y)
    expected = F.cross_entropy(torch.cat([a, b]), torch.cat([x, y]), ignore_index=IGNORE)
    assert counts.score().loss == pytest.approx(float(expected), rel=1e-6)
    assert str(counts.score()).endswith(f"loss {expected:.4f} of 5 images")


@pytest.mark.parametrize("seed", range(3))
def test_torchmetrics_agrees(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchmetrics' own imports
        metrics = pytest.importorskip("torchmetrics.classification", reason="torchmetrics is not installed")
    logits, masks = noise(5, seed)
    counts = SceneCounts(5)
    counts.add(logits, masks)
    score = counts.score()
    theirs = metrics.MulticlassJaccardIndex(5, average="none", ignore_index=IGNORE)(logits, masks)
    assert score.per_class_iou == pytest.approx(theirs.tolist())
    assert score.miou == pytest.approx(float(metrics.MulticlassJaccardIndex(5, ignore_index=IGNORE)(logits, masks)))
    accuracy = metrics.MulticlassAccuracy(5, average="micro", ignore_index=IGNORE)(logits, masks)
    assert score.pixel_accuracy == pytest.approx(float(accuracy))
    masks[masks == 4] = IGNORE  # absent, and predicted: torchmetrics' mean has a 0 for it, ours leaves it out
    counts = SceneCounts(5)
    counts.add(logits, masks)
    theirs = metrics.MulticlassJaccardIndex(5, ignore_index=IGNORE)(logits, masks)
    assert counts.score().miou == pytest.approx(float(theirs) * 5 / 4)


def test_pixel_loss_is_the_mean_and_survives_a_batch_of_void() -> None:
    logits, masks = noise(3)
    expected = F.cross_entropy(logits, masks, ignore_index=IGNORE)
    torch.testing.assert_close(pixel_loss(logits, masks), expected)
    logits.requires_grad_()
    loss = pixel_loss(logits, torch.full_like(masks, IGNORE))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_the_ceiling_of_a_patch_size() -> None:
    truth = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [2, 2, 1, 1], [2, 0, 1, IGNORE]])
    assert ceiling([truth], (1, 1), 3).miou == 1
    two = ceiling([truth], (2, 2), 3)  # two pixels go wrong: a 0 becomes 1, and another 2
    assert two.per_class_iou == pytest.approx((4 / 6, 6 / 7, 3 / 4)) and two.loss is None
    four = ceiling([truth], (4, 4), 3)  # 6 of class 0, 6 of class 1: the first
    assert four.per_class_iou == pytest.approx((6 / 15, 0, 0))


def test_the_ceiling_of_sizes_that_patches_do_not_divide() -> None:
    truth = torch.zeros(5, 7, dtype=torch.int64)
    truth[4:] = 1
    truth[:, 6:] = 2
    assert ceiling([truth, truth], (2, 2), 3).miou == 1 and ceiling([truth, truth], (2, 2), 3).images == 2
    assert ceiling([truth], (3, 3), 3).miou < 1


def test_the_ceiling_of_patches_that_are_not_square() -> None:
    """Rows of two classes: patches as wide as the image and one pixel high lose nothing, the others half."""
    truth = torch.tensor([[0] * 4, [1] * 4])
    assert ceiling([truth], (1, 4), 2).miou == 1
    assert ceiling([truth], (2, 1), 2).per_class_iou == (0.5, 0)


def test_void_does_not_vote() -> None:
    truth = torch.full((4, 4), IGNORE)
    truth[0, 0] = 1
    assert ceiling([truth], (4, 4), 2).per_class_iou == (None, 1.0)


def test_patches_have_the_class_of_most_of_their_pixels() -> None:
    mask = torch.tensor([[0, 0, 1, 2, 1], [0, 1, 2, 2, 1], [IGNORE, IGNORE, 1, IGNORE, IGNORE]])
    # 2x2 patches, cut at the right and at the bottom
    assert patch_classes(mask[None], (2, 2), 3).tolist() == [[0, 2, 1, IGNORE, 1, IGNORE]]
    assert patch_classes(torch.stack([mask, mask.clamp(max=0)]), (3, 5), 3).tolist() == [[1], [0]]


def test_the_loss_of_an_image_is_that_of_its_pixels_that_are_not_void() -> None:
    masks = torch.tensor([[[0, 1], [IGNORE, 1]], [[IGNORE, IGNORE], [IGNORE, IGNORE]]])
    logits = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    loss, right = SegmentationMetric(known()).of_each_image(logits, masks)
    pixels = [logits[0, :, 0, 0], logits[0, :, 0, 1], logits[0, :, 1, 1]]
    expected = [F.cross_entropy(p[None], torch.tensor([c])) for p, c in zip(pixels, (0, 1, 1), strict=True)]
    assert loss[0] == pytest.approx(sum(expected) / 3)
    hits = sum(int(p.argmax() == c) for p, c in zip(pixels, (0, 1, 1), strict=True))
    assert right[0] == pytest.approx(hits / 3)
    assert loss[1] == right[1] == 0
    assert signature(masks).tolist() == [2 + IGNORE, 4 * IGNORE]


def test_a_patch_that_is_void_or_padding_has_no_class() -> None:
    masks = torch.full((1, 6, 10), IGNORE)
    masks[0, :4, :4], masks[0, 4:, 4:9] = 1, 2
    found = SegmentationMetric(known()).classes_of(masks)  # 4x4 patches on a grid of 2 x 3
    assert found.tolist() == [[1, -1, -1, -1, 2, 2]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), r"expected whole numbers of shape \(2, height, width\)"),
        (torch.full((2, 16, 16), 3), "the loader gives the label 3: expected 0 to 2"),
    ],
)
def test_what_is_no_mask_is_refused(labels: Tensor, message: str) -> None:
    metric = SegmentationMetric(known())
    metric.check(torch.zeros(2, 3, 16, 16), torch.full((2, 16, 16), IGNORE, dtype=torch.uint8))
    with pytest.raises(DataError, match=message):
        metric.check(torch.zeros(2, 3, 16, 16), labels)
