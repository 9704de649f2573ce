"""Mean IoU of predicted masks, from confusion counts, and the ceiling that a patch size puts on it.

Void pixels (IGNORE) never count: not as truth, and not as predictions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vimoe.config.masks import IGNORE
from vimoe.errors import counted
from vimoe.metrics.base import Counts, Metric, Score, check_range, check_shape
from vimoe.metrics.contours import contour_accuracy, region_similarity
from vimoe.process import Process


@dataclass(frozen=True)
class SceneScore(Score):
    """Shares in 0..1.

    Args:
        miou: mean of `per_class_iou` over the classes that have at least one truth pixel.
        per_class_iou: intersection over union of the pixels of each class, over all images together; None for a class
            without a truth pixel. Such a class plays no part in the mean, whatever was predicted: a pixel that is
            wrongly taken for it is missing in its true class.
        pixel_accuracy: share of pixels that are right.
        loss: mean cross-entropy of a pixel in nats; None where there were no scores.
        pixels, images: number of pixels that are not void, and of images.
    """

    kind: ClassVar[str] = "segmentation"
    miou: float
    per_class_iou: tuple[float | None, ...]
    pixel_accuracy: float
    loss: float | None
    pixels: int
    images: int

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key: mean IoU, then the loss."""
        return self.miou, -(self.loss or 0.0)

    @property
    def columns(self) -> dict[str, float]:
        return {"loss": self.loss or 0.0, "miou": self.miou, "pixel_accuracy": self.pixel_accuracy}

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "per_class_iou": list(self.per_class_iou)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SceneScore:
        return super().from_dict({**values, "per_class_iou": tuple(values["per_class_iou"])})

    def __str__(self) -> str:
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        of = counted(self.images, "image")
        return f"mean IoU {self.miou:.2%}, pixel accuracy {self.pixel_accuracy:.2%}{loss} of {of}"


class SceneCounts(Counts):
    """Confusion counts of pixels, on the device of the batches.

    Attributes:
        classes: number of classes.
        images, scored: number of images so far, and of those whose predictions came with scores.
        confusion: (classes, classes) int64, pixels by truth (row) and prediction (column).
        loss: sum of the pixels' cross-entropy.
    """

    sums: ClassVar[tuple[str, ...]] = ("images", "scored", "confusion", "loss")

    def __init__(self, classes: int) -> None:
        self.classes, self.images, self.scored = classes, 0, 0
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.loss = torch.zeros((), dtype=torch.float64)

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Count a batch: scores (B, classes, H, W), masks (B, H, W) int64."""
        loss = F.cross_entropy(outputs.float(), labels, ignore_index=IGNORE, reduction="none").double().sum()
        self.loss, self.scored = self.loss.to(loss.device) + loss, self.scored + len(labels)
        self.add_predictions(outputs.argmax(dim=1), labels)

    def add_predictions(self, predicted: Tensor, masks: Tensor) -> None:
        """Count a batch of predicted classes (B, H, W)."""
        counted = masks != IGNORE
        pairs = masks[counted].long() * self.classes + predicted[counted]
        found = torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)
        self.confusion = self.confusion.to(found.device) + found
        self.images += len(masks)

    def score(self) -> SceneScore:
        """Return the score of all batches so far; shares are 0 without any."""
        confusion = self.confusion.cpu().double()
        right, truth, predicted = confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)
        ious = [
            float(right[c] / (truth[c] + predicted[c] - right[c])) if truth[c] > 0 else None
            for c in range(self.classes)
        ]
        present = [iou for iou in ious if iou is not None]
        pixels = int(self.confusion.sum())
        return SceneScore(
            miou=sum(present) / max(len(present), 1),
            per_class_iou=tuple(ious),
            pixel_accuracy=float(right.sum()) / max(pixels, 1),
            loss=float(self.loss) / max(pixels, 1) if self.scored else None,
            pixels=pixels,
            images=self.images,
        )


@dataclass(frozen=True)
class ContourScore(SceneScore):
    """A score with J and F by class.

    Args:
        per_class_j, per_class_f: means over the images whose truth has the class; None for a class that none has.
    """

    per_class_j: tuple[float | None, ...]
    per_class_f: tuple[float | None, ...]

    @property
    def j(self) -> float:
        """Mean of `per_class_j` over the classes that are there."""
        return _mean(self.per_class_j)

    @property
    def f(self) -> float:
        """Mean of `per_class_f` over the classes that are there."""
        return _mean(self.per_class_f)

    def to_dict(self) -> dict[str, Any]:
        per_class = {name: list(getattr(self, name)) for name in ("per_class_j", "per_class_f")}
        return {**super().to_dict(), **per_class, "j": self.j, "f": self.f}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ContourScore:
        given = {name: each for name, each in values.items() if name not in ("j", "f")}
        per_class = {name: tuple(values[name]) for name in ("per_class_iou", "per_class_j", "per_class_f")}
        return cls(**{**given, **per_class})

    def __str__(self) -> str:
        return f"{super().__str__()}; J {self.j:.2%}, F {self.f:.2%}"


class ContourCounts(SceneCounts):
    """Counts of a scene score, and sums of J and F. Give it to `vimoe.metrics.base.evaluate` as `counts`.

    J and F of a class cover the images whose truth has it: elsewhere a pixel that is wrongly taken for it is missing in
    its true class. (DAVIS counts an image without the object as 1, or 0 if some of it is predicted.) Void pixels belong
    to no mask. It takes about 0.1 s for an image of 480 x 360 and eleven classes.

    Attributes:
        frames: (classes,) int64, number of images whose truth has the class.
        regions, contours: (classes,) sums of J and F over these.
    """

    sums = (*SceneCounts.sums, "frames", "regions", "contours")

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.frames = torch.zeros(classes, dtype=torch.int64)
        self.regions, self.contours = torch.zeros(2, classes, dtype=torch.float64)

    def add_predictions(self, predicted: Tensor, masks: Tensor) -> None:
        super().add_predictions(predicted, masks)
        for guess, truth in zip(predicted.cpu().numpy(), masks.cpu().numpy(), strict=True):
            counted = truth != IGNORE
            for c in np.unique(truth[counted]):
                found, wanted = (guess == c) & counted, truth == c
                self.frames[c] += 1
                self.regions[c] += region_similarity(found, wanted)
                self.contours[c] += contour_accuracy(found, wanted)

    def score(self) -> ContourScore:
        """Return the score of all batches so far."""
        frames = self.frames.tolist()
        j, f = (
            tuple(total / n if n else None for total, n in zip(sums.tolist(), frames, strict=True))
            for sums in (self.regions, self.contours)
        )
        return ContourScore(**vars(super().score()), per_class_j=j, per_class_f=f)


class SegmentationMetric(Metric):
    """Mean IoU of scores (B, classes, H, W) by masks (B, H, W) with IGNORE; the model is a `Segmenter`."""

    score_type = SceneScore
    by_patch = True

    def counts(self) -> SceneCounts:
        return SceneCounts(len(self.classes))

    def contours(self) -> SceneCounts:
        return ContourCounts(len(self.classes))

    def check(self, images: Tensor, labels: Tensor) -> None:
        check_shape(labels, len(images), f"({len(images)}, height, width)", axes=3)
        check_range(labels[labels != IGNORE], len(self.classes))

    def labelled(self, labels: Tensor) -> Tensor:
        """Return (B,) True for the images that are not all void."""
        return (labels != IGNORE).flatten(1).any(dim=1)

    def of_each_image(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B,) means over the pixels of each image that are not void: cross-entropy, and share right."""
        loss = F.cross_entropy(outputs.float(), labels, ignore_index=IGNORE, reduction="none")
        right, counted = outputs.argmax(dim=1) == labels, labels != IGNORE
        pixels = counted.flatten(1).sum(dim=1).clamp(min=1)
        return loss.flatten(1).sum(dim=1) / pixels, (right & counted).flatten(1).sum(dim=1) / pixels

    def classes_of(self, labels: Tensor) -> Tensor:
        """Return (B, P) the class that most pixels of each patch have; -1 for a patch that is void or padding."""
        segmenter: Any = self.model
        height, width = labels.shape[1:]
        (rows, columns), (patch_h, patch_w) = segmenter.grid(height, width), segmenter.patch_size
        masks = F.pad(labels, (0, columns * patch_w - width, 0, rows * patch_h - height), value=IGNORE)
        classes = patch_classes(masks, segmenter.patch_size, len(self.classes))
        return classes.where(classes != IGNORE, -1)


def pixel_loss(
    logits: Tensor, masks: Tensor, weights: Tensor | None = None, smoothing: float = 0.0, over: Process | None = None
) -> Tensor:
    """Return the mean cross-entropy over the pixels that are not void; 0 with a gradient of 0 if all are void.

    Shares of a batch differ in their number of void pixels. So with `over` the sum over this process's pixels is
    divided by the mean number of pixels of a process: the mean of these losses is that of the whole batch.

    It is computed in float32, and in float64 for logits in float64.

    Args:
        logits: (B, classes, H, W).
        masks: (B, H, W) int64 with IGNORE.
        weights: (classes,) weight of a pixel by its class; by default all weigh the same.
        smoothing: mass given to the other classes.
        over: processes that have equal shares of the batch's images; by default this one has all of them.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    weights = None if weights is None else weights.to(logits.device, precise)
    total = F.cross_entropy(
        logits.to(precise), masks, weights, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
    )
    counted = masks[masks != IGNORE]
    mass = (torch.ones_like(counted) if weights is None else weights[counted]).sum()
    return total / (mass if over is None else over.mean(mass)).clamp(min=1e-6)


def patch_classes(masks: Tensor, patch: tuple[int, int], classes: int) -> Tensor:
    """Return (B, P) the class that most pixels of each patch have; of equal ones the first, IGNORE if all are void.

    Args:
        masks: (B, H, W) int64 with IGNORE. Patches are counted row by row; at the edges they may be cut.
        patch: (height, width) in pixels.
        classes: number of classes.
    """
    images, height, width = masks.shape
    rows, columns = (
        torch.arange(side, device=masks.device) // part for side, part in zip((height, width), patch, strict=True)
    )
    number = (rows[-1] + 1) * (columns[-1] + 1)
    patches = rows[:, None] * (columns[-1] + 1) + columns
    index = torch.arange(images, device=masks.device)[:, None, None] * number + patches
    counted = masks != IGNORE
    votes = torch.bincount(index[counted] * classes + masks[counted], minlength=images * int(number) * classes)
    votes = votes.view(images, int(number), classes)
    return torch.where(votes.any(dim=-1), votes.argmax(dim=-1), IGNORE)


def ceiling(masks: Iterable[Tensor], patch: tuple[int, int], classes: int) -> SceneScore:
    """Return the score of a decoder that knows the majority class of each patch, and nothing finer.

    All pixels of a patch are predicted as the class that most of them have; of equal ones the first. The score shows
    the price of the patch size. It is no strict bound: bilinear interpolation can draw borders inside of patches.

    Args:
        masks: (H, W) each, int64 with IGNORE; sizes may differ.
        patch: (height, width) of a patch in pixels.
        classes: number of classes.
    """
    counts = SceneCounts(classes)
    for mask in masks:
        height, width = mask.shape
        best = patch_classes(mask[None], patch, classes).view(-(-height // patch[0]), -1)
        grown = best.repeat_interleave(patch[0], 0).repeat_interleave(patch[1], 1)[:height, :width]
        counts.add_predictions(grown[None].clamp(max=classes - 1), mask[None])  # where all is void nothing counts
    return counts.score()


def _mean(values: tuple[float | None, ...]) -> float:
    present = [value for value in values if value is not None]
    return sum(present) / max(len(present), 1)
