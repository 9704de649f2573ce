"""Remove the MoE layers that the evidence does not support, and write down what that cost and saved."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.accounting import Cost, count
from vimoe.analysis import Evidence, LayerEvidence
from vimoe.config import PRUNE_TOLERANCE
from vimoe.errors import ConfigError, VimoeError
from vimoe.evaluate import Batches, Score, evaluate
from vimoe.upcycling import densify, moe_layers


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a layer, and why: `loss_change` is the evidence, in nats on validation."""

    layer: str
    keep: bool
    how: str
    loss_change: float

    def __str__(self) -> str:
        what = "the shared expert alone" if self.how == "shared" else "the experts merged"
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
    """Keeps a layer when making it dense costs more than `tolerance` nats on validation, measured as it is done.

    With a shared expert that remains alone, without one the experts are merged. Each layer was measured with the
    others in place, once and without an interval: look at the receipt.
    """
    if not math.isfinite(tolerance):
        raise ConfigError(f"tolerance={tolerance}: expected a number of nats, such as {PRUNE_TOLERANCE}")
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


def receipts(models: list[nn.Module], loader: Batches) -> list[Receipt]:
    """The same measurements of each model; speed on the loader's first batch, in turns, because machines are noisy."""
    speeds = images_per_second(models, next(iter(loader))[0])
    return [Receipt(evaluate(m, loader), count(m), s) for m, s in zip(models, speeds, strict=True)]


def images_per_second(models: list[nn.Module], images: Tensor, rounds: int = 15) -> list[float]:
    """Median inference throughput of each model on the same images, timed in turns after a round to warm up.

    The images should be real ones: how long an MoE takes depends on which experts they go to.
    """
    times: list[list[float]] = [[] for _ in models]
    weight = next(models[0].parameters())
    device, images = weight.device, images.to(weight.device, weight.dtype)
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for model, seconds in zip(models, times, strict=True):
                model.eval()
                _wait_for(device)
                start = time.perf_counter()
                model(images)
                _wait_for(device)
                seconds.append(time.perf_counter() - start)
    return [len(images) / statistics.median(seconds[1:]) for seconds in times]


def _verdict(layer: LayerEvidence, tolerance: float) -> Verdict:
    how = "merge" if layer.shared_loss_change is None else "shared"
    change = layer.removal_loss_change
    return Verdict(layer.name, change > tolerance, how, change)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
