"""What a model gets right on labelled images, and what it says of others."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.errors import DataError, VimoeError
from vimoe.loading import Readable, eval_loader, preprocessing
from vimoe.terminal import track

Batches = Iterable[tuple[Tensor, Tensor]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """Shares in 0..1, the mean cross-entropy in nats, and the number of images they are of."""

    top1: float
    top5: float
    loss: float
    images: int

    @property
    def rank(self) -> tuple[float, float]:
        """Of two scores the better one has the larger: by top-1, then by loss."""
        return self.top1, -self.loss

    @property
    def columns(self) -> dict[str, float]:
        """What the logs show."""
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5}

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return asdict(self)

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, loss {self.loss:.4f} of {self.images} images"


class ScoreCounts:
    """Counts from which a Score follows, added up batch by batch."""

    def __init__(self) -> None:
        self.images, self.top1, self.top5, self.loss = 0, 0, 0, 0.0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch: logits (B, classes), labels (B,)."""
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self.images += len(labels)
        self.top1 += int(best[:, 0].sum())
        self.top5 += int(best.any(dim=1).sum())
        self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))

    def score(self) -> Score:
        """What has been counted so far."""
        n = max(self.images, 1)
        return Score(self.top1 / n, self.top5 / n, self.loss / n, self.images)


def evaluate(model: nn.Module, loader: Batches, task: str = "") -> Score:
    """Top-1, top-5 and loss over a loader of (images, labels), and shows how far it is if `task` names it.

    Leaves the model in eval mode.
    """
    counts = ScoreCounts()
    for logits, labels in forwards(model, loader, task):
        counts.add(logits, labels)
    return counts.score()


def forwards(model: nn.Module, loader: Batches, task: str = "") -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, labels) of each batch, in eval mode, without gradient, on the model's device and in its type.

    Args:
        model: a classifier.
        loader: batches of (images, labels).
        task: what to call this where it is shown how far it is (`vimoe.terminal`); not shown without it.
    """
    for images, labels in batches_of(model, loader, task):
        with torch.no_grad():
            yield model(images), labels


def batches_of(model: nn.Module, loader: Batches, task: str = "") -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of each batch on the model's device and in its type, the model in eval mode; as `forwards`."""
    if isinstance(loader, Tensor) or not hasattr(loader, "__iter__"):
        raise DataError(f"the loader is of type {type(loader).__name__}: expected batches of (images, labels)")
    model.eval()
    weight = next(model.parameters())
    for batch in track(loader, task):
        images, labels = _pair(model, batch)
        if not len(images):
            continue
        yield images.to(weight.device, weight.dtype, non_blocking=True), labels.to(weight.device, torch.int64)


def _pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a batch. Raises DataError for what is none that the model takes."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else "")
        raise DataError(f"the loader gives {what}: expected pairs (images, labels); wrap it in one that gives these")
    for name, part in zip(("images", "labels"), batch, strict=True):
        if not isinstance(part, Tensor):
            raise DataError(f"the loader gives {name} of type {type(part).__name__}: expected a tensor; convert it")
    images, labels = batch
    if labels.is_floating_point() or labels.ndim not in (1, 3) or len(labels) != len(images):
        raise DataError(
            f"the loader gives labels of {labels.dtype} and shape {tuple(labels.shape)} for {len(images)} images: "
            f"expected whole numbers of shape ({len(images)},), or masks (images, height, width)"
        )
    embed: Any = getattr(model, "patch_embed", None)
    if embed is None:  # a segmenter, or the rest of a model on features
        return images, labels
    channels = getattr(getattr(embed, "proj", None), "in_channels", None)
    if images.ndim != 4 or channels not in (None, images.shape[1]) or labels.ndim != 1:
        raise DataError(
            f"the loader gives images of shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)}: "
            f"expected (images, {channels or 'channels'}, height, width) and (images,)"
        )
    if getattr(embed, "strict_img_size", False) and images.shape[-2:] != tuple(embed.img_size):
        raise DataError(
            f"the loader gives images of {tuple(images.shape[-2:])}: expected {tuple(embed.img_size)}, the model's "
            f"size; resize them, or build the model with img_size={images.shape[-1]}"
        )
    return images, labels


def predict(model: nn.Module, files: Sequence[Path], top: int = 5, workers: int | None = None) -> list[dict[str, Any]]:
    """Name the most likely classes of image files, best first.

    Args:
        model: a model with preprocessing and label names, as `vimoe.load` gives it.
        files: image files.
        top: how many classes to name.
        workers: processes that decode images, as `DataConfig.workers`.

    Returns:
        For each file {"file", "classes": [{"name", "probability"}]}, or {"file", "error"} where it cannot be read.

    Raises:
        DataError: where none can be read.
    """
    samples, prepared = [(file, 0) for file in files], preprocessing(model)
    names, weight = label_names(model.eval()), next(model.parameters())
    results: list[dict[str, Any]] = []
    loader = eval_loader(samples, prepared, 32, workers, Readable)
    for images, errors in track(loader, "predicting"):
        with torch.no_grad():
            logits = model(images.to(weight.device, weight.dtype))
        values, indices = logits.float().softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
        for row, best, error in zip(values.tolist(), indices.tolist(), errors, strict=True):
            classes = [{"name": names[i], "probability": p} for p, i in zip(row, best, strict=True)]
            results.append({"file": str(files[len(results)]), **({"error": error} if error else {"classes": classes})})
    report_errors(results)
    return results


def report_errors(predictions: Sequence[dict[str, Any]]) -> None:
    """Warn of predictions that are errors. Raises DataError where all are."""
    errors = [each["error"] for each in predictions if "error" in each]
    if errors and len(errors) == len(predictions):
        raise DataError(
            errors[0] if len(errors) == 1 else f"none of {len(errors)} images can be read: {errors[0]}, ..."
        )
    if errors:
        logger.warning("%d of %d images were not predicted, such as: %s", len(errors), len(predictions), errors[0])


def label_names(model: nn.Module) -> list[str]:
    """The names of a model's classes, or their numbers where it has none."""
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    classes: Any = model.num_classes
    if names and len(names) != classes:
        raise VimoeError(f"the model has {classes} classes and {len(names)} label names: expected a name for each")
    return list(names) if names else [str(i) for i in range(classes)]
