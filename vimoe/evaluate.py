"""What a model gets right on labelled images, and what it says of others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.errors import VimoeError
from vimoe.loading import eval_loader, preprocessing
from vimoe.terminal import track

Batches = Iterable[tuple[Tensor, Tensor]]


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
    model.eval()
    weight = next(model.parameters())
    for images, labels in track(loader, task):
        yield images.to(weight.device, weight.dtype, non_blocking=True), labels.to(weight.device)


def predict(model: nn.Module, files: Sequence[Path], top: int = 5, workers: int | None = None) -> list[dict[str, Any]]:
    """The most likely classes of image files, best first.

    Args:
        model: a model with preprocessing and label names, as `vimoe.load` gives it.
        files: image files.
        top: how many classes to name.
        workers: processes that decode images, as `DataConfig.workers`.

    Returns:
        For each file {"file", "classes": [{"name", "probability"}]}.
    """
    loader = eval_loader([(file, 0) for file in files], preprocessing(model), batch_size=32, workers=workers)
    names = label_names(model)
    results: list[dict[str, Any]] = []
    for logits, _ in forwards(model, loader, "predicting"):
        values, indices = logits.float().softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
        for row, best in zip(values.tolist(), indices.tolist(), strict=True):
            classes = [{"name": names[i], "probability": p} for p, i in zip(row, best, strict=True)]
            results.append({"file": str(files[len(results)]), "classes": classes})
    return results


def label_names(model: nn.Module) -> list[str]:
    """The names of a model's classes, or their numbers where it has none."""
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    classes: Any = model.num_classes
    if names and len(names) != classes:
        raise VimoeError(f"the model has {classes} classes and {len(names)} label names: expected a name for each")
    return list(names) if names else [str(i) for i in range(classes)]
