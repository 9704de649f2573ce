"""The contract between a task and the training loop: batches, a loss, a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from vimoe.metrics.base import Score
from vimoe.models.interface import logits_of


@dataclass(frozen=True)
class Job:
    """One data set to learn, and the loss to learn it with; a task makes it, `vimoe.training.loop.train` does it.

    Args:
        loader: training batches (inputs, targets), with a `vimoe.data.order.Shuffled` for a sampler.
        names: names of the training images, for messages.
        fingerprint: hash of training images and targets; a training does not go on with others.
        prepare: function of a loaded batch on the device; it returns inputs of the model and targets of the loss.
        loss: function of outputs and prepared targets; it returns a scalar.
        evaluate: function that scores a model on validation and leaves it in eval mode.
        forward: function of a model and its prepared inputs; it returns logits.
        facts: entries for summary.json.
    """

    loader: DataLoader
    names: Sequence[str]
    fingerprint: int
    prepare: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    evaluate: Callable[[nn.Module], Score]
    forward: Callable[[nn.Module, Tensor], Tensor] = logits_of
    facts: Mapping[str, Any] = field(default_factory=dict)
