"""Removal of the MoE layers and experts that validation does not support, with its costs and savings."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.analysis.changes import Changes
from vimoe.analysis.evidence import Effect, Evidence
from vimoe.analysis.intervals import numbered, over
from vimoe.analysis.interventions import Intervention, Subjects, Without, measure
from vimoe.config.analysis import PRUNE_TOLERANCE
from vimoe.config.checks import LARGEST_SEED, check_count
from vimoe.errors import ConfigError, VimoeError, expect
from vimoe.metrics.base import Batches, Score, evaluate
from vimoe.models.cost import Cost, count
from vimoe.models.interface import unwrapped
from vimoe.models.surgery import swap
from vimoe.moe.layer import MoE, moe_layers

_TIMED_IMAGES, _TIMED_SECONDS = 32, 10.0  # a receipt's throughput must not cost more than its score


@dataclass(frozen=True)
class Step:
    """One removal, or one that would have cost too much.

    Attributes:
        layer: module name.
        expert: number of the expert in the layer before pruning; None for the whole layer.
        how: dense FFN that took the layer's place (`vimoe.densify`), or "dropped" for an expert.
        change: effect on the model before this step.
        total: effect of all steps on the given model; None if it was not measured.
    """

    layer: str
    expert: int | None
    how: str
    change: Effect
    total: Effect | None = None

    def __str__(self) -> str:
        if self.expert is not None:
            return f"{self.layer}: expert {self.expert} dropped, loss {self.change.loss}"
        return f"{self.layer}: made dense ({_WORDS[self.how]}), loss {self.change.loss}"


@dataclass(frozen=True)
class Pruning:
    """Removals in order, and the layers that were kept.

    Attributes:
        steps: removals in order.
        kept: layers that stay, each with the effect of its cheapest removal.
        tolerance: largest upper bound of a removal's loss change, in nats; None where all layers were merged.
        sequences: number of videos that the images are frames of; None if nothing says. Intervals are over these
            (`vimoe.analysis.intervals.over`).
        without_method: names of the layers that stay because no method makes them dense; they are not in `kept`.
    """

    steps: tuple[Step, ...]
    kept: tuple[Step, ...]
    tolerance: float | None
    sequences: int | None = None
    without_method: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON knows them."""
        return asdict(self)

    def __str__(self) -> str:
        kept = [
            f"{step.layer}: kept; made dense ({_WORDS[step.how]}) it would change the loss by {step.change.loss}"
            for step in self.kept
        ]
        kept += [f"{name}: kept; no method makes it dense" for name in self.without_method]
        total = self.steps[-1].total if self.steps else None
        calibrated = f", calibrated {total.calibrated}" if total and total.calibrated else ""
        ending = [f"in all: loss {total.loss}{calibrated}"] if total else []
        if self.sequences is not None:
            ending.append(f"intervals are {over(self.sequences)}")
        return "\n".join([*map(str, self.steps), *kept, *ending])


_WORDS = {
    "shared": "its shared expert alone",
    "merge": "the mean of its experts",
    "matched": "the mean of its matched experts",
    "join": "its experts side by side",
    "whole": "its pieces at full weight",
}


@dataclass(frozen=True)
class Receipt:
    """Score of a model on test images, its cost, and its throughput in images a second."""

    score: Score
    cost: Cost
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON knows them."""
        return {**self.score.to_dict(), **asdict(self.cost), "images_per_second": self.images_per_second}


def prune(
    model: nn.Module,
    evidence: Evidence,
    loader: Batches | None = None,
    tolerance: float = PRUNE_TOLERANCE,
    experts: bool = False,
    seed: int = 0,
    progress: bool = False,
    sequences: Sequence[Hashable] | None = None,
    merge_all: bool = False,
) -> Pruning:
    """Replace, in place, the MoE layers that validation does not support by dense FFNs; with `merge_all` all of them.

    A layer that no method makes dense (`MoE.densify_methods`) stays; only experts can be dropped there.

    A layer is removed if the upper bound of the 95% interval of its loss change is at most `tolerance`. Of the ways to
    make it dense, the one with the lowest loss is taken. With a loader the removal is greedy: the layer with the lowest
    bound goes, and all others are measured again in the model without it. Without a loader all layers are judged by
    the evidence, each as if it were removed alone; several removals together may cost more. If it is interrupted, the
    model is left with the removals until then.

    The loader is read once if the inputs of the first block with an MoE layer take at most 1 GiB, since they never
    change. After that a round costs the blocks from there on, and for each way to make a layer dense the blocks after
    the layer.

    Args:
        model: model of the evidence; left in eval mode.
        evidence: result of `vimoe.analyze`; its gate masses weigh the mean of experts, and its score names the metric.
        loader: validation batches of (images, labels), the same in the same order each time it is read.
        tolerance: nats for each removal. The same images give the bounds and choose the removals, so several removals
            cost a little more on other images: look at the receipt.
        experts: drop experts too, of the layers that stay, from the last layer to the first, one after another by the
            same rule. It saves memory but no arithmetic, and needs the loader.
        seed: seed of the bootstrap.
        progress: show a progress bar for each measurement, as in `vimoe.analyze`.
        sequences: video of each image of the loader, as in `vimoe.analyze`.
        merge_all: make every MoE layer one FFN of the dense one's size, from the first layer to the last, whatever it
            costs: the mean of its experts by the evidence's gate masses, or the pieces of moe.init="split" put together
            again. Each change is measured once, and nothing is decided. It needs the loader.

    Raises:
        ConfigError: if the tolerance is no number, `experts` or `merge_all` without a loader, `merge_all` with another
            tolerance or `experts`, or not as many sequences as images.
        VimoeError: if the evidence is of another model, or has no interventions and there is no loader; or if
            `experts`, and the decisions of a router cannot be overruled (`Router.overrulable`).

    >>> import timm, torch, vimoe
    >>> dense = timm.create_model("test_vit", num_classes=2)
    >>> model = vimoe.upcycle(dense, vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> loader = [(torch.randn(8, 3, 160, 160), torch.tensor([0, 1] * 4))]
    >>> pruning = vimoe.prune(model, vimoe.analyze(model, loader, draws=1), loader)
    >>> [step.layer for step in pruning.steps]  # all experts are copies still, so nothing is lost
    ['blocks.5.mlp']
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not math.isfinite(tolerance):
        raise ConfigError(f"tolerance={tolerance!r}: expected a number of nats, such as {PRUNE_TOLERANCE}")
    check_count("seed", seed, 0, LARGEST_SEED)
    if (experts or merge_all) and loader is None:
        name = "merge_all" if merge_all else "experts"
        raise ConfigError(f"{name}=True without a loader: expected one, because each removal is measured; pass loader")
    model = unwrapped(model)
    if merge_all:
        check_merge_all(model, tolerance, experts)
    expect("evidence", evidence, Evidence, "give what vimoe.analyze returned")
    layers = moe_layers(model)
    evidence.check_model(layers)
    if experts:
        check_experts(model)
    mass = {e.name: torch.from_numpy(e.gate_mass) for e in evidence.layers}
    without_method = tuple(name for name, layer in layers.items() if not layer.densify_methods)
    if loader is None:
        return replace(_by_evidence(model, evidence, mass, tolerance), without_method=without_method)
    subjects = Subjects(model, loader, list(layers), metric=evidence.base.kind)
    greedy = _Greedy(model.eval(), subjects, tolerance, seed, progress, sequences)
    if merge_all:
        greedy.merge(mass)
        return Pruning(tuple(greedy.steps), (), None, greedy.sequences)
    kept = greedy.layers(mass)
    if experts:
        for name in reversed(moe_layers(model)):
            greedy.experts(name)
    return Pruning(tuple(greedy.steps), kept, tolerance, greedy.sequences, without_method)


def check_experts(model: nn.Module) -> None:
    """Raise VimoeError if the decisions of a router cannot be overruled, so that no expert of its can be left out."""
    for name, layer in moe_layers(model).items():
        if not layer.router.overrulable:
            raise VimoeError(
                f"experts=True, and {name} has moe.router={layer.config.router!r}: expected routers whose decisions "
                f"can be overruled, by which the loss without an expert is measured; leave experts out"
            )


def check_merge_all(model: nn.Module, tolerance: float, experts: bool) -> None:
    """Raise an error if `prune` cannot make every MoE layer of a model one FFN, with these arguments.

    Raises:
        ConfigError: if an argument would not be read.
        VimoeError: if the experts of a layer have no mean and are no pieces of one FFN.
    """
    for name, value, unread in (("experts", experts, False), ("tolerance", tolerance, PRUNE_TOLERANCE)):
        if value != unread:
            raise ConfigError(
                f"{name}={value} with merge_all=True: expected {unread}, since all layers become dense, whatever it "
                f"costs; leave it out"
            )
    for name, layer in moe_layers(model).items():
        if _merging(layer) is None:
            raise VimoeError(
                f"merge_all=True: {name} has several shared experts, or experts that are no FFNs of its own width: "
                f"expected FFNs of one width, which have a mean, or pieces of one (init='split'); leave it out"
            )


def _merging(layer: MoE) -> str | None:
    """Return the method that makes one FFN of the dense one's size of all experts of a layer; None if there is none."""
    return next((how for how in ("merge", "whole") if how in layer.densify_methods), None)


def _by_evidence(model: nn.Module, evidence: Evidence, mass: Mapping[str, Tensor], tolerance: float) -> Pruning:
    layers = moe_layers(model)
    if any(layers[e.name].densify_methods and not e.dense for e in evidence.layers):
        raise VimoeError("the evidence has no interventions: expected those of making layers dense; pass the loader")
    all_steps = [Step(e.name, None, *e.best_dense) for e in evidence.layers if e.dense]
    steps = [step for step in all_steps if step.change.loss.high <= tolerance]
    if len(steps) > 1:
        warnings.warn(
            f"{len(steps)} layers are made dense, each measured as if it were the only one; what they cost together "
            f"is not known: pass the loader, and it is measured after each",
            stacklevel=3,
        )
    swap(model, {step.layer: layers[step.layer].dense(step.how, mass[step.layer]) for step in steps})
    kept = tuple(step for step in all_steps if step not in steps)
    return Pruning(tuple(steps), kept, tolerance, evidence.overruled_sequences)


class _Greedy:
    """Removal of one layer or expert after another, with a measurement after each.

    The model is in eval mode, as a dense FFN takes the mode of the layer that it replaces.
    """

    def __init__(
        self, model: nn.Module, subjects: Subjects, tolerance: float, seed: int, progress: bool,
        sequences: Sequence[Hashable] | None,
    ) -> None:  # fmt: skip
        self.model, self._subjects = model, subjects
        self.tolerance, self.seed, self.progress = tolerance, seed, progress
        self.steps: list[Step] = []
        self._videos = sequences
        self._units, self.sequences = numbered(None)  # known once the loader is read
        self._total: Changes | None = None  # by all steps together

    def layers(self, mass: Mapping[str, Tensor]) -> tuple[Step, ...]:
        """Make layers dense as long as one can go. Return the layers that stay, with what removing them would cost."""
        layers = moe_layers(self.model)
        ways = {
            name: {how: layer.dense(how, mass[name]) for how in layer.densify_methods}
            for name, layer in layers.items()
            if layer.densify_methods
        }
        while ways:
            changes = self._measure({name: list(way.values()) for name, way in ways.items()}, "pruning layers")
            best: dict[str, tuple[Step, int]] = {}
            for name, change in changes.items():
                effects = Effect.each(change, self.seed, self._units)
                column = min(range(len(effects)), key=lambda i: effects[i].loss.value)
                best[name] = Step(name, None, list(ways[name])[column], effects[column]), column
            step, column = min(best.values(), key=lambda each: each[0].change.loss.high)
            if step.change.loss.high > self.tolerance:
                return tuple(step for step, _ in best.values())
            swap(self.model, {step.layer: ways.pop(step.layer)[step.how]})
            self._took(step, changes[step.layer], column)
        return ()

    def merge(self, mass: Mapping[str, Tensor]) -> None:
        """Make each layer one FFN of all its experts, from the first to the last."""
        for name, layer in moe_layers(self.model).items():
            how = _merging(layer)
            assert how is not None  # check_merge_all has looked
            merged = layer.dense(how, mass[name])
            changes = self._measure({name: [merged]}, f"merging {name}")
            (effect,) = Effect.each(changes[name], self.seed, self._units)
            swap(self.model, {name: merged})
            self._took(Step(name, None, how, effect), changes[name], 0)

    def experts(self, name: str) -> None:
        """Drop experts of a layer as long as one can go."""
        layer = moe_layers(self.model)[name]
        left = list(range(layer.config.num_experts))
        while removable := layer.router.removable:
            without: list[Intervention] = [Without(e) for e in removable]
            changes = self._measure({name: without}, f"pruning experts of {name}")
            effects = Effect.each(changes[name], self.seed, self._units)
            column = min(range(len(effects)), key=lambda i: effects[i].loss.high)
            if effects[column].loss.high > self.tolerance:
                return
            dropped = removable[column]
            layer.keep_experts([e for e in range(len(left)) if e != dropped])
            self._took(Step(name, left.pop(dropped), "dropped", effects[column]), changes[name], column)

    def _measure(self, plan: Mapping[str, list[Intervention]], bar: str) -> dict[str, Changes]:
        changes = measure(self._subjects, plan, bar if self.progress else "")
        if self._videos is not None:
            if len(self._videos) != (given := self._subjects.given):
                raise ConfigError(f"{len(self._videos)} sequences of {given} images: expected one for each image")
            assert self._subjects.images
            self._units, self.sequences = numbered([self._videos[at] for at in self._subjects.images.places.tolist()])
        return changes

    def _took(self, step: Step, change: Changes, column: int) -> None:
        taken = change.columns(slice(column, column + 1))
        self._total = taken if self._total is None else self._total.then(taken)
        (total,) = Effect.each(self._total, self.seed, self._units)
        self.steps.append(replace(step, total=total))


def receipts(
    models: list[nn.Module],
    loader: Batches,
    score: Callable[[nn.Module, Any, str], Score] = evaluate,
    timed: Batches | None = None,
    bar: str = "",
) -> list[Receipt]:
    """Return the same measurements of each model; throughput is timed in turns, because machines are noisy.

    Args:
        models: models to measure.
        loader: test batches.
        score: function that scores a model on a loader under a progress bar of a name; by default `evaluate`.
        timed: batches of images, whose first one a forward is timed on; by default those of the loader.
        bar: name of the progress bar of the scoring; without it there is none.
    """
    images: Any = next(iter(loader if timed is None else timed))[0]
    speeds = images_per_second(models, images)
    scores = [score(m, loader, bar and f"{bar}, {i} of {len(models)}") for i, m in enumerate(models, 1)]
    return [Receipt(score, count(m), s) for m, score, s in zip(models, scores, speeds, strict=True)]


def images_per_second(models: list[nn.Module], images: Tensor, rounds: int = 15) -> list[float]:
    """Return the median throughput of each model in inference, in images a second.

    All models take the same images, in turns, after a round to warm up. A CPU takes at most 32 of them, and stops after
    3 rounds or more once they have taken 10 s. Give real images, since the load of the experts decides the time.

    Args:
        models: models to time, on one device.
        images: (B, channels, height, width).
        rounds: number of timed rounds, at most.
    """
    times: list[list[float]] = [[] for _ in models]
    weight = next(models[0].parameters())
    device, images = weight.device, images.to(weight.device, weight.dtype)
    if device.type == "cpu":
        images = images[:_TIMED_IMAGES]
    with torch.inference_mode():
        while len(times[0]) <= rounds and (len(times[0]) <= 3 or sum(map(sum, times)) < _TIMED_SECONDS):
            for model, seconds in zip(models, times, strict=True):
                model.eval()
                _wait_for(device)
                start = time.perf_counter()
                model(images)
                _wait_for(device)
                seconds.append(time.perf_counter() - start)
    return [len(images) / statistics.median(seconds[1:]) for seconds in times]


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
