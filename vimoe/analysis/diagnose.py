"""Diagnosis: do the experts of each MoE layer differ, do they weigh enough, do routes matter, are there better ones?

Axes: I images, N experts, U routed units of an image, V interventions.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from operator import length_hint
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vimoe.analysis.analyze import analyze
from vimoe.analysis.changes import Changes
from vimoe.analysis.diagnosis import Diagnosis, Gates, LayerDiagnosis, Oracle
from vimoe.analysis.evidence import Effect, Evidence, LayerEvidence
from vimoe.analysis.expert_similarity import distances
from vimoe.analysis.expert_usage import effective_number
from vimoe.analysis.halves import best_for_class, halves
from vimoe.analysis.intervals import numbered
from vimoe.analysis.interventions import Only, Subjects, measure
from vimoe.analysis.remedies import findings
from vimoe.config.analysis import DRAWS, OVERRULED_IMAGES
from vimoe.config.checks import LARGEST_SEED, check_count
from vimoe.errors import ConfigError, DataError, VimoeError, expect
from vimoe.metrics.base import Batches, Metric, batches, metric_of
from vimoe.models.frozen_trunk import Entry
from vimoe.models.interface import unwrapped
from vimoe.moe import MoE
from vimoe.moe.autocast import in_type_of_autocast
from vimoe.moe.layer import moe_layers
from vimoe.moe.packed import check_not_packed

_COMPARED = 16  # images whose tokens go to all experts of a layer
_AT_ONCE = 64  # images


@torch.no_grad()
def diagnose(
    model: nn.Module,
    loader: Batches,
    evidence: Evidence | None = None,
    draws: int = DRAWS,
    overrule: int | None = OVERRULED_IMAGES,
    seed: int = 0,
    progress: bool = False,
    sequences: Sequence[Hashable] | None = None,
    metric: str | None = None,
) -> Diagnosis:
    """Say of every MoE layer whether its routes matter, why not, and what to try next.

    It compares the experts with the shared expert and with one another, and looks at gates and load. The effect of
    permuted routes is that of the evidence. The oracle bound is the effect of sending each image to the best expert for
    its class, with the gates that the router gave it: with k = 1 all that any choice by class could gain. The expert is
    chosen on one half of the images and measured on the other. `vimoe.analysis.remedies.RULES` judges by these figures.

    Given the evidence, the cost is one pass over the images that are measured, and N interventions on each layer, as
    those of `vimoe.analyze`. The tokens of 16 images go to all experts.

    Args:
        model: a model with MoE layers; left in eval mode.
        loader: validation batches of (images, labels), the same in the same order each time it is read.
        evidence: result of `vimoe.analyze` for this model and loader; by default it is made here.
        draws: permutations, at most, where the evidence is made here.
        overrule: images that are measured, drawn uniformly; None for all.
        seed: draws images, halves, permutations and resamples.
        progress: show how far each pass is, as in `vimoe.analyze`.
        sequences: name of the video of each image of the loader, as in `vimoe.analyze`.
        metric: name in `vimoe.metrics.registry.METRICS`; by default that of the evidence.

    Raises:
        ConfigError: if `overrule` is less than 2, or there are not as many sequences as images.
        VimoeError: if the model has no MoE layer, or a router whose decisions cannot be exchanged or are the same for
            all images; or if the evidence is of another model or has no interventions.
        DataError: if the loader is empty, or gives other images than those of the evidence.

    >>> import timm, torch, vimoe
    >>> dense = timm.create_model("test_vit", num_classes=2)
    >>> model = vimoe.upcycle(dense, vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> loader = [(torch.randn(8, 3, 160, 160), torch.tensor([0, 1] * 4))]
    >>> diagnosis = vimoe.diagnose(model, loader, draws=1)
    >>> "copies" in [finding.name for finding in diagnosis.findings]  # no expert has been trained
    True
    """
    check_overrule(overrule)
    check_count("seed", seed, 0, LARGEST_SEED)
    model = unwrapped(model)
    check_exchangeable(model)
    if evidence is None:
        evidence = analyze(model, loader, draws, overrule, seed, progress, sequences, metric)
    expect("evidence", evidence, Evidence, "give what vimoe.analyze returned")
    check_not_packed(model)
    layers = moe_layers(model)
    evidence.check_model(layers)
    if any(each.permuted is None for each in evidence.layers):
        raise VimoeError(
            "the evidence has no interventions: expected those that permute routes; run analyze with overrule of at "
            "least 2"
        )
    total = evidence.base.images
    if sequences is not None and len(sequences) != total:
        raise ConfigError(f"{len(sequences)} sequences of {total} images: expected one for each image")
    rng = np.random.default_rng(seed)
    places = np.sort(rng.choice(total, total if overrule is None else min(overrule, total), replace=False))
    videos = None if sequences is None else [sequences[place] for place in places.tolist()]
    units, how_many = numbered(videos)

    measured_by = metric_of(model, metric or evidence.base.kind)
    sample = _Sample(measured_by, loader, places, total)
    subjects = Subjects(model, sample, list(layers), metric=measured_by.score_type.kind)
    labels, predicted, seen = _observe(subjects, layers, len(places), "looking at the experts" if progress else "")
    oracles: dict[str, Oracle] = {}
    if measured_by.by_patch:
        without = "patches have classes here, and images have none"
    else:
        oracles = _oracles(subjects, layers, labels, predicted, units, seed, "trying each expert" if progress else "")
        without = "" if oracles else "no class has images in both halves"
    figures = tuple(
        seen[each.name].figures(layers[each.name], each, oracles.get(each.name), units, seed)
        for each in evidence.layers
    )
    found = findings(figures, layers, more_images=min(len(places), evidence.overruled_images) < total)
    return Diagnosis(evidence.base, len(places), how_many, figures, found, without, subjects.features)


def check_exchangeable(model: nn.Module) -> None:
    """Raise VimoeError for a model with a router for which exchanged decisions of images tell nothing.

    They cannot be exchanged (`Router.overrulable` is False), or all images have the same ones (`Router.constant`).
    """
    for name, layer in moe_layers(model).items():
        if layer.router.constant or not layer.router.overrulable:
            why = "that differ between images" if layer.router.constant else "that images can exchange"
            raise VimoeError(
                f"{name} has moe.router={layer.config.router!r}: expected routers with decisions {why}, which tells "
                f"whether they matter; use analyze, which measures the dense FFNs in the layers' place"
            )


def check_overrule(overrule: int | None) -> None:
    """Raise ConfigError for a number of images from which no diagnosis follows."""
    if overrule is not None and overrule < 2:
        raise ConfigError(f"overrule={overrule}: expected at least 2 images to measure on, or None for all")


class _Sample:
    """Some images of a loader, by their places in rising order, of as many in all as the evidence is of."""

    def __init__(self, metric: Metric, loader: Batches, places: np.ndarray, total: int) -> None:
        self.metric, self.loader, self.places, self.total = metric, loader, places, total

    def __iter__(self) -> Iterator[tuple[Entry, Tensor]]:
        seen = 0
        for start, labels in batches(self.metric, self.loader):
            first, last = np.searchsorted(self.places, [seen, seen + len(start)])
            rows = torch.from_numpy(self.places[first:last] - seen).to(labels.device)
            seen += len(start)
            if len(rows):
                yield start[rows], labels[rows]
        if seen != self.total:
            raise DataError(
                f"the loader gives {seen} images, the evidence is of {self.total}: expected the same images; run "
                f"analyze on this loader"
            )

    def __length_hint__(self) -> int:
        return length_hint(self.loader)


class _Seen:
    """Decisions of a layer, image by image, and some of its inputs."""

    def __init__(self) -> None:
        self.gates: list[Tensor] = []  # (units,) sums over the chosen experts
        self.sure: list[Tensor] = []  # (units,) largest weight by the router
        self.usage: list[Tensor] = []  # (images, N)
        self.inputs: list[Tensor] = []

    def add(self, layer: MoE, x_BTD: Tensor, some: Tensor) -> None:
        """Add the layer's input for a batch, and keep that of some of the images."""
        routing = layer.router(in_type_of_autocast(x_BTD))
        self.gates.append(routing.gates.sum(dim=1).cpu())
        self.sure.append(layer.router.probabilities(routing.logits).amax(dim=1).cpu())
        self.usage.append(routing.usage.cpu())
        self.inputs.append(x_BTD[some.to(x_BTD.device)])

    def figures(
        self, layer: MoE, evidence: LayerEvidence, oracle: Oracle | None, sequences: np.ndarray | None, seed: int
    ) -> LayerDiagnosis:
        """Return the figures of the layer."""
        assert evidence.permuted
        gates, usage = torch.cat(self.gates).double().numpy(), torch.cat(self.usage).numpy()
        shared, mean = distances(layer, torch.cat(self.inputs), layer.shared)
        return LayerDiagnosis(
            name=evidence.name,
            num_experts=layer.config.num_experts,
            images=len(usage),
            from_shared=shared,
            from_mean=mean,
            gates=Gates(float(gates.mean()), *map(float, np.quantile(gates, [0.05, 0.5, 0.95]))),
            router_confidence=float(torch.cat(self.sure).double().mean()),
            learns=not layer.router.blind and any(p.requires_grad for p in layer.router.routes),
            experts_per_unit=float(usage.sum() / len(gates)),
            load=tuple((usage.sum(axis=0) / max(usage.sum(), 1)).tolist()),
            effective_experts=effective_number(usage, seed, sequences),
            permuted=evidence.permuted,
            dense=evidence.dense,
            oracle=oracle,
        )


def _observe(
    subjects: Subjects, layers: Mapping[str, MoE], images: int, task: str
) -> tuple[np.ndarray, np.ndarray, dict[str, _Seen]]:
    """Run all images. Return their classes (I,), the class of the largest logit (I,), and what each layer did."""
    labels, predicted, seen = [], [], {name: _Seen() for name in layers}
    every = -(-images // _COMPARED)
    for _, logits, records, targets, index in subjects.records(list(layers), _AT_ONCE, task):
        labels.append(subjects.metric.classes_of(targets).cpu().numpy())
        predicted.append(logits.flatten(1).argmax(dim=1).cpu().numpy())
        for name, layer in layers.items():
            x: Any = records[name].x
            seen[name].add(layer, x, (index % every == 0).nonzero()[:, 0])
    return np.concatenate(labels), np.concatenate(predicted), seen


def _oracles(
    subjects: Subjects, layers: Mapping[str, MoE], labels: np.ndarray, predicted: np.ndarray,
    sequences: np.ndarray | None, seed: int, task: str,
) -> dict[str, Oracle]:  # fmt: skip
    """Return the oracle of each layer; none where no class has images in both halves."""
    half = halves(labels + 1, seed, sequences)
    plan = {name: [Only(expert) for expert in range(layer.config.num_experts)] for name, layer in layers.items()}
    changes = measure(subjects, plan, task)
    found = {name: _oracle(each, labels, predicted, half, sequences, seed) for name, each in changes.items()}
    return {name: oracle for name, oracle in found.items() if oracle}


def _oracle(
    changes: Changes, labels: np.ndarray, predicted: np.ndarray, half: np.ndarray, sequences: np.ndarray | None,
    seed: int,
) -> Oracle | None:  # fmt: skip
    """Return the effects of the best expert, given those (I, N) of each; None where no class has two images."""
    by_class = best_for_class(changes.loss, labels, half)
    rows = np.flatnonzero(by_class >= 0)
    if not len(rows):
        return None
    for_all = best_for_class(changes.loss, np.zeros_like(labels), half)
    by_prediction = best_for_class(changes.loss, predicted, half)
    by_prediction = np.where(by_prediction < 0, for_all, by_prediction)
    chosen = np.stack([by_prediction, for_all, by_class, changes.loss.argmin(axis=1)], axis=1)[rows]
    units = None if sequences is None else np.unique(sequences[rows], return_inverse=True)[1]
    effects = Effect.each(changes.chosen(rows, chosen), seed, units)
    return Oracle(effects[0], effects[1], effects[2], effects[3], len(rows))
