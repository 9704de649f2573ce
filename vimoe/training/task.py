"""What a training needs to know of its task: batches, a loss, a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.data import DataLoader

from vimoe.models.interface import logits_of


class Scored(Protocol):
    """How good a model is on validation.

    Attributes:
        rank: of two scores the better one has the larger.
        columns: what the logs show; "loss" is the mean, in nats.
    """

    @property
    def rank(self) -> tuple[float, ...]: ...
    @property
    def columns(self) -> dict[str, float]: ...
    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Task:
    """One data set to learn, and how.

    Args:
        loader: of training batches (inputs, targets), with a `vimoe.data.order.Shuffled` for a sampler.
        names: of the training images, for messages.
        fingerprint: of training images and targets, so that a training does not go on with others.
        prepare: a batch as it was loaded, on the device, to what the model takes and what the loss takes.
        loss: outputs and prepared targets to a scalar.
        evaluate: scores a model on validation, and leaves it in eval mode.
        forward: a model and its inputs to logits; for cached features that of the blocks after the trunk.
        facts: what summary.json is to say of it.
    """

    loader: DataLoader
    names: Sequence[str]
    fingerprint: int
    prepare: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    evaluate: Callable[[nn.Module], Scored]
    forward: Callable[[nn.Module, Tensor], Tensor] = logits_of
    facts: Mapping[str, Any] = field(default_factory=dict)
