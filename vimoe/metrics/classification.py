"""Top-1, top-5, loss and calibration error of a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.errors import DataError, counted
from vimoe.metrics.base import Counts, Metric, Score, check_range, check_shape
from vimoe.metrics.calibration import BINS, calibration_gaps
from vimoe.models.interface import find_backbone


@dataclass(frozen=True)
class ImageScore(Score):
    """Shares in 0..1, the mean cross-entropy in nats, the number of images, and the calibration error.

    Args:
        ece: expected calibration error in 0..1 (`vimoe.metrics.calibration`); None in files of an older version.
    """

    kind: ClassVar[str] = "classification"
    top1: float
    top5: float
    loss: float
    images: int
    ece: float | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key: top-1, then the loss."""
        return self.top1, -self.loss

    @property
    def columns(self) -> dict[str, float]:
        calibration = {} if self.ece is None else {"ece": self.ece}
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5, **calibration}

    def __str__(self) -> str:
        calibration = "" if self.ece is None else f", calibration error {self.ece:.2%}"
        return (
            f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, loss {self.loss:.4f}{calibration} of "
            f"{counted(self.images, 'image')}"
        )


class ImageCounts(Counts):
    """Counts of right classes, and sums of the losses and of the gaps of each bin of confidence."""

    sums = ("images", "top1", "top5", "loss", "gaps")

    def __init__(self) -> None:
        self.images, self.top1, self.top5, self.loss = 0, 0, 0, 0.0
        self.gaps = torch.zeros(BINS, dtype=torch.float64)

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (B, classes), labels (B,)."""
        logits = outputs.float()
        log_p = logits.log_softmax(dim=1)
        right = logits.argmax(dim=1) == labels  # topk may order equal logits otherwise, and bfloat16 has many
        among = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).any(dim=1)
        self.images += len(labels)
        self.top1 += int(right.sum())
        self.top5 += int((right | among).sum())
        self.loss += float(F.nll_loss(log_p, labels, reduction="sum"))
        self.gaps += calibration_gaps(log_p.amax(dim=1).exp(), right)

    def score(self) -> ImageScore:
        n = max(self.images, 1)
        ece = float(self.gaps.abs().sum()) / n
        return ImageScore(self.top1 / n, self.top5 / n, self.loss / n, self.images, ece)


class ClassificationMetric(Metric):
    """Top-1 of logits (B, classes) by labels (B,)."""

    score_type = ImageScore
    calibrates = True

    def counts(self) -> ImageCounts:
        return ImageCounts()

    def check(self, images: Tensor, labels: Tensor) -> None:
        check_shape(labels, len(images), f"({len(images)},)", axes=1)
        check_images(images, self.model)
        check_range(labels, len(self.classes))

    def of_each_image(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B,) the cross-entropy of each image, and 1 where its class is named, else 0."""
        loss = F.cross_entropy(outputs.float(), labels, reduction="none")
        return loss, (outputs.argmax(dim=1) == labels).float()

    def classes_of(self, labels: Tensor) -> Tensor:
        return labels


def check_images(images: Tensor, model: nn.Module) -> None:
    """Raise DataError for images of a shape that a ViT does not take; models around a ViT are not judged."""
    backbone = find_backbone(model)
    if backbone.path or backbone.family is None:  # such as the part of a model that reads features
        return
    channels, size = backbone.input_size[0], backbone.fixed_size
    if images.ndim != 4 or images.shape[1] != channels:
        raise DataError(
            f"the loader gives images of shape {tuple(images.shape)}: expected (images, {channels}, height, width)"
        )
    if size is not None and images.shape[-2:] != size:
        raise DataError(
            f"the loader gives images of {tuple(images.shape[-2:])}: expected {size}, the model's size; resize them, "
            f"or build the model with img_size={images.shape[-1]}"
        )
