"""Remove the MoE layers that the evidence does not support, and write down what that cost and saved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.accounting import Cost, count, model_input_size
from vimoe.analysis import Evidence, LayerEvidence
from vimoe.config import PRUNE_TOLERANCE
from vimoe.errors import VimoeError
from vimoe.evaluate import Score, evaluate
from vimoe.upcycling import densify, moe_layers


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a layer, and why: `loss_change` is the evidence, in nats on validation."""

    layer: str
    keep: bool
    how: str
    loss_change: float

    def __str__(self) -> str:
        what = "the shared expert alone" if self.how == "shared" else "another image's experts"
        decision = "kept" if self.keep else f"made dense ({self.how})"
        return f"{self.layer}: {decision}; with {what} the loss changes by {self.loss_change:+.4f}"


@dataclass(frozen=True)
class Receipt:
    """A model before and after: its score on test images, what it costs, and images a second measured in turns."""

    score: Score
    cost: Cost
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {**asdict(self.score), **asdict(self.cost), "images_per_second": self.images_per_second}


def verdicts(evidence: Evidence, tolerance: float = PRUNE_TOLERANCE) -> list[Verdict]:
    """Keeps a layer when removing its routed experts costs more than `tolerance` nats on validation.

    With a shared expert that is measured as it would be done: the output becomes S(x). Without one, a layer goes
    when the images' decisions can be permuted at no greater cost, and its experts are merged.
    """
    return [_verdict(layer, tolerance) for layer in evidence.layers]


def prune(model: nn.Module, evidence: Evidence, tolerance: float = PRUNE_TOLERANCE) -> list[Verdict]:
    """Makes the layers dense that the evidence does not support, in place; all or nothing.

    Args:
        model: the model that the evidence is of.
        evidence: from `vimoe.analyze`.
        tolerance: largest loss change in nats that a removed layer may have.

    Returns:
        The verdict on every layer.

    Raises:
        VimoeError: where the evidence is of another model.
    """
    layers = moe_layers(model)
    for layer in evidence.layers:
        if layer.name not in layers or (layers[layer.name].shared is None) != (layer.shared_loss_change is None):
            raise VimoeError(f"the evidence is of another {layer.name} than this model's: run analyze on this model")
    decided = verdicts(evidence, tolerance)
    mass = {layer.name: torch.from_numpy(layer.gate_mass) for layer in evidence.layers}
    remove = [verdict for verdict in decided if not verdict.keep]
    for how in {verdict.how for verdict in remove}:
        densify(model, [verdict.layer for verdict in remove if verdict.how == how], how, mass)
    return decided


def receipts(models: list[nn.Module], loader: Iterable[tuple[Tensor, Tensor]]) -> list[Receipt]:
    """The same measurements of each model; speed in turns, because machines are noisy."""
    speeds = images_per_second(models)
    return [Receipt(evaluate(m, loader), count(m), s) for m, s in zip(models, speeds, strict=True)]


def images_per_second(models: list[nn.Module], batch_size: int = 32, rounds: int = 7) -> list[float]:
    """Median inference throughput of each model on random images, timed in turns after a round to warm up."""
    times: list[list[float]] = [[] for _ in models]
    device = next(models[0].parameters()).device
    images = torch.randn(batch_size, *model_input_size(models[0]), device=device)
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for model, seconds in zip(models, times, strict=True):
                model.eval()
                _wait_for(device)
                start = time.perf_counter()
                model(images)
                _wait_for(device)
                seconds.append(time.perf_counter() - start)
    return [batch_size / statistics.median(seconds[1:]) for seconds in times]


def _verdict(layer: LayerEvidence, tolerance: float) -> Verdict:
    how = "merge" if layer.shared_loss_change is None else "shared"
    change = layer.removal_loss_change
    return Verdict(layer.name, change > tolerance, how, change)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
