"""Which MoE layers specialise, and whether it matters: tables of class and expert, and interventions on the routing.

Axes: C classes, N experts, R routed units (images or tokens), K chosen experts.

Two interventions answer two questions for each layer, as the change of the validation loss in nats: does it matter
*which* expert an image gets (whole decisions, experts and gates, are permuted between images), and what would be lost
if the layer were dense (its output becomes S(x), the shared expert's; without one, that of the merged experts).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor, nn

from vimoe.errors import DataError, VimoeError
from vimoe.evaluate import Batches, Score, ScoreCounts, forwards, label_names
from vimoe.moe import MoE, Routing, record
from vimoe.upcycling import moe_layers


@dataclass(frozen=True)
class LayerEvidence:
    """What validation images say of one MoE layer.

    Attributes:
        name: module name of the layer.
        counts: (C, N), how often the units of each class chose each expert; from it follow heatmap and load.
        gate_mass: (N,) mean over units of the gate that each expert got, 0 where it was not chosen.
        mutual_information: of class and expert in nats, plug-in estimate from `counts`. It is biased upwards where
            images are few: compare it within one data set only.
        adjusted_mutual_information: of class and the image's most used expert, adjusted for chance: 0 is what
            independence gives, 1 a function of one another (scikit-learn's, arithmetic mean).
        permuted_loss_change: nats, when whole routing decisions are permuted between images.
        shared_loss_change: nats, when the layer's output is S(x); None without a shared expert.
        merged_loss_change: nats, when the layer is one FFN with the experts' mean weights; None with a shared expert.
    """

    name: str
    counts: np.ndarray
    gate_mass: np.ndarray
    mutual_information: float
    adjusted_mutual_information: float
    permuted_loss_change: float
    shared_loss_change: float | None
    merged_loss_change: float | None

    @property
    def heatmap(self) -> np.ndarray:
        """(C, N) P(expert | class): each row sums to 1, or is 0 for a class without images."""
        return self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)

    @property
    def load(self) -> np.ndarray:
        """(N,) share of all decisions that each expert got; sums to 1."""
        return self.counts.sum(axis=0) / self.counts.sum()

    @property
    def removal_loss_change(self) -> float:
        """What making the layer dense costs, measured as it would be done: S(x) alone, else the experts merged."""
        change = self.merged_loss_change if self.shared_loss_change is None else self.shared_loss_change
        assert change is not None
        return change


@dataclass(frozen=True)
class Evidence:
    """The evidence on every MoE layer of a model, with the score of the untouched model on the same images."""

    layers: tuple[LayerEvidence, ...]
    base: Score
    classes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it: what `routing.json` holds."""
        layers = []
        for layer in self.layers:
            values = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(layer).items()}
            layers.append({**values, "load": layer.load.tolist()})
        return {"base": self.base.to_dict(), "classes": list(self.classes), "layers": layers}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evidence:
        """The inverse of `to_dict`."""
        layers = []
        for row in values["layers"]:
            arrays = {"counts": np.array(row["counts"]), "gate_mass": np.array(row["gate_mass"])}
            layers.append(LayerEvidence(**{k: v for k, v in row.items() if k != "load"} | arrays))
        return cls(tuple(layers), Score(**values["base"]), tuple(values["classes"]))

    def __str__(self) -> str:
        head = f"{'layer':<20}{'AMI':>7}{'MI':>8}{'busiest':>9}{'idlest':>8}{'permuted':>10}{'dense':>9}"
        rows = [
            f"{e.name:<20}{e.adjusted_mutual_information:>7.3f}{e.mutual_information:>8.3f}{e.load.max():>9.1%}"
            f"{e.load.min():>8.1%}{e.permuted_loss_change:>+10.4f}{e.removal_loss_change:>+9.4f}"
            for e in self.layers
        ]
        return "\n".join(
            [f"{self.base.images} images, top-1 {self.base.top1:.2%}, loss {self.base.loss:.4f}", head, *rows]
        )


def analyze(model: nn.Module, loader: Batches, seed: int = 0, progress: bool = False) -> Evidence:
    """Measures every MoE layer of a classifier on validation images.

    Args:
        model: a model with MoE layers; left in eval mode.
        loader: validation batches of (images, labels), the same in the same order each time it is read: it is read
            once to see the routing and once more for each intervention.
        seed: draws the permutation of the images.
        progress: show a progress bar on standard error for each pass.

    Raises:
        VimoeError: where the model has no MoE layer.
        DataError: where the loader is empty or gives other images when it is read again.
    """
    layers = moe_layers(model)
    if not layers:
        raise VimoeError("the model has no MoE layer: expected one that vimoe.upcycle made")
    base, labels, tables = _observe(model, loader, layers, "observing the routing" if progress else "")
    if not math.isfinite(base.loss):
        raise VimoeError(f"the model's loss on validation is {base.loss}: expected a model whose outputs are finite")
    donors = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))

    def loss_change(task: str, intervention: AbstractContextManager[None]) -> float:
        with intervention:
            return _score(model, loader, labels, task if progress else "").loss - base.loss

    evidence = []
    for name, layer in layers.items():
        table = tables[name]
        gate_mass = table.gate_mass / table.units
        shared = merged = None
        if layer.shared is not None:
            shared = loss_change(f"{name} as S(x)", computing(layer, layer.shared))
        else:
            merged = loss_change(f"{name} merged", computing(layer, layer.merged(gate_mass)))
        evidence.append(
            LayerEvidence(
                name=name,
                counts=table.counts.numpy(),
                gate_mass=gate_mass.numpy(),
                mutual_information=mutual_information(table.counts.numpy()),
                adjusted_mutual_information=float(adjusted_mutual_info_score(labels, torch.cat(table.favourites))),
                permuted_loss_change=loss_change(f"{name} permuted", permuted(layer, *table.decisions(), donors)),
                shared_loss_change=shared,
                merged_loss_change=merged,
            )
        )
    return Evidence(tuple(evidence), base, tuple(label_names(model)))


def mutual_information(counts: np.ndarray) -> float:
    """Of the two variables of a contingency table, in nats."""
    joint = counts / counts.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())


@contextmanager
def permuted(layer: MoE, experts: Tensor, gates: Tensor, donors: Tensor) -> Iterator[None]:
    """While it holds, image i gets the complete decision (experts and gates) that image donors[i] got.

    Args:
        layer: whose router is overruled.
        experts, gates: (images, units of an image, K), the decisions in the order in which images will come.
        donors: (images,) a permutation.
    """
    position = 0

    def overrule(_router: nn.Module, _args: Any, routing: Routing) -> Routing:
        nonlocal position
        chosen = donors[position : position + routing.batch[0]]
        position += routing.batch[0]
        device = routing.gates.device
        return replace(
            routing, experts=experts[chosen].flatten(0, 1).to(device), gates=gates[chosen].flatten(0, 1).to(device)
        )

    handle = layer.router.register_forward_hook(overrule)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def computing(layer: MoE, dense: nn.Module) -> Iterator[None]:
    """While it holds, the layer's output is that of a dense FFN."""
    handle = layer.register_forward_hook(lambda _layer, args, _output: dense(*args))
    try:
        yield
    finally:
        handle.remove()


class _Table:
    """What one layer's decisions add up to."""

    def __init__(self, classes: int, experts: int) -> None:
        self.counts = torch.zeros(classes, experts, dtype=torch.int64)
        self.gate_mass = torch.zeros(experts, dtype=torch.float64)
        self.units = 0
        self.favourites: list[Tensor] = []
        self._experts: list[Tensor] = []
        self._gates: list[Tensor] = []

    def add(self, routing: Routing, labels: Tensor) -> None:
        images, n = routing.batch[0], routing.num_experts
        experts, gates = routing.experts.cpu(), routing.gates.cpu()
        image = routing.image.cpu()
        per_image = torch.zeros(images, n, dtype=torch.int64)
        per_image.index_put_((image[:, None].expand_as(experts), experts), torch.tensor(1), accumulate=True)
        self.counts.index_add_(0, labels.cpu(), per_image)
        self.gate_mass.index_add_(0, experts.flatten(), gates.flatten().double())
        self.units += len(gates)
        # of equally used experts the one with the larger gates
        mass = torch.zeros(images, n).index_put_((image[:, None].expand_as(experts), experts), gates, accumulate=True)
        self.favourites.append((per_image + mass / (1 + mass.sum(dim=1, keepdim=True))).argmax(dim=1))
        self._experts.append(experts.view(images, -1, experts.shape[1]))
        self._gates.append(gates.view(images, -1, gates.shape[1]))

    def decisions(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self._experts), torch.cat(self._gates)


def _observe(
    model: nn.Module, loader: Batches, layers: dict[str, MoE], task: str
) -> tuple[Score, Tensor, dict[str, _Table]]:
    classes = len(label_names(model))
    tables = {name: _Table(classes, layer.config.num_experts) for name, layer in layers.items()}
    counts, seen = ScoreCounts(), []
    with torch.no_grad(), record(model) as routings:
        for logits, labels in forwards(model, loader, task):
            counts.add(logits, labels)
            seen.append(labels.cpu())
            for routing in routings:
                tables[routing.layer].add(routing, labels)
            routings.clear()
    if not seen:
        raise DataError("the loader is empty: expected validation images to analyse the routing on")
    return counts.score(), torch.cat(seen), tables


def _score(model: nn.Module, loader: Batches, expected: Tensor, task: str) -> Score:
    counts, position = ScoreCounts(), 0
    for logits, labels in forwards(model, loader, task):
        if not torch.equal(labels.cpu(), expected[position : position + len(labels)]):
            raise DataError("the loader gives its images in another order each time: expected one with shuffle=False")
        position += len(labels)
        counts.add(logits, labels)
    if position != len(expected):
        raise DataError(f"the loader gave {len(expected)} images, then {position}: expected one that can be read again")
    return counts.score()
