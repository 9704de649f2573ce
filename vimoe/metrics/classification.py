"""Top-1, top-5 and loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.metrics.batches import Batches, forwards


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
