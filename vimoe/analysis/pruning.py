"""Remove the MoE layers, and experts, that validation does not support, and write down what that cost and saved."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vimoe.analysis.evidence import Effect, Evidence
from vimoe.analysis.interventions import Changes, Intervention, Subjects, Without, measure
from vimoe.analysis.statistics import numbered, over
from vimoe.config.analysis import PRUNE_TOLERANCE
from vimoe.errors import ConfigError, VimoeError, expect
from vimoe.metrics.batches import Batches
from vimoe.metrics.classification import Score, evaluate
from vimoe.metrics.segmentation import SceneScore
from vimoe.models.cost import Cost, count
from vimoe.models.interface import unwrapped
from vimoe.models.surgery import swap
from vimoe.moe.layer import moe_layers

_TIMED_IMAGES, _TIMED_SECONDS = 32, 10.0  # a receipt's throughput must not cost more than its score


@dataclass(frozen=True)
class Step:
    """One removal, or what one would have cost.

    Attributes:
        layer: module name.
        expert: which one of those that the layer still had; None for the whole layer.
        how: what took the layer's place ("shared", "merge", "matched"), or "dropped" for an expert.
        change: of the model as it was before this step.
        total: of the model as it was given, None where that was not measured.
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
    """What was removed, in order, and what was kept because removing it would have cost too much.

    Intervals are over the `sequences` that the images are of, as `vimoe.analysis.statistics.over` says.
    """

    steps: tuple[Step, ...]
    kept: tuple[Step, ...]
    tolerance: float
    sequences: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return asdict(self)

    def __str__(self) -> str:
        kept = [
            f"{step.layer}: kept; made dense ({_WORDS[step.how]}) it would change the loss by {step.change.loss}"
            for step in self.kept
        ]
        total = self.steps[-1].total if self.steps else None
        ending = [f"in all: loss {total.loss}"] if total else []
        if self.sequences is not None:
            ending.append(f"intervals are {over(self.sequences)}")
        return "\n".join([*map(str, self.steps), *kept, *ending])


_WORDS = {
    "shared": "its shared expert alone",
    "merge": "the mean of its experts",
    "matched": "the mean of its matched experts",
}


@dataclass(frozen=True)
class Receipt:
    """A model before and after: its score on test images, what it costs, and images a second measured in turns."""

    score: Score | SceneScore
    cost: Cost
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
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
) -> Pruning:
    """Makes the MoE layers dense that validation does not support, in place.

    A layer goes when the upper bound of the 95% interval of the loss change is at most `tolerance`, by the way of
    making it dense that has the lowest loss. With a loader this is greedy: the layer with the lowest bound goes, and
    all that remain are measured again in the model without it. Without one all layers are judged by the evidence, each
    as if it were removed alone, which several together may not bear out. Interrupted, the model is left with the
    removals until then.

    The loader is read once where what comes before the first MoE layer takes at most 1 GiB: it never changes. After
    that a round costs the blocks from there on, and for each way of making a layer dense those after the layer.

    Args:
        model: the model that the evidence is of; left in eval mode.
        evidence: from `vimoe.analyze`; its gate masses weigh the mean of experts.
        loader: validation batches of (images, labels), the same in the same order each time it is read.
        tolerance: in nats, for each removal. The bounds are of the images that also choose what goes, so several
            removals cost a little more on other images: look at the receipt.
        experts: also drop experts of the layers that stay, from the last layer to the first, one after another by the
            same rule. It saves memory but no arithmetic. Needs the loader.
        seed: draws the bootstrap.
        progress: show how far each measurement is, as in `vimoe.analyze`.
        sequences: for each image of the loader the video that it is a frame of, as in `vimoe.analyze`.

    Raises:
        ConfigError: for a tolerance that is no number, `experts` without a loader, or not as many sequences as images.
        VimoeError: where the evidence is of another model, or has no interventions and there is no loader.

    >>> import timm, torch, vimoe
    >>> dense = timm.create_model("test_vit", num_classes=2)
    >>> model = vimoe.upcycle(dense, vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> loader = [(torch.randn(8, 3, 160, 160), torch.tensor([0, 1] * 4))]
    >>> pruning = vimoe.prune(model, vimoe.analyze(model, loader, draws=1), loader)
    >>> [step.layer for step in pruning.steps]  # all experts are copies still, so nothing is lost
    ['blocks.5.mlp']
    """
    if not math.isfinite(tolerance):
        raise ConfigError(f"tolerance={tolerance}: expected a number of nats, such as {PRUNE_TOLERANCE}")
    if experts and loader is None:
        raise ConfigError("experts=True without a loader: expected one, because each removal is measured; pass loader")
    model = unwrapped(model)
    expect("evidence", evidence, Evidence, "give what vimoe.analyze returned")
    layers = moe_layers(model)
    known = {e.name: (e.num_experts, e.top_k, e.routing) for e in evidence.layers}
    ours = {n: (m.config.num_experts, m.router.slots, m.config.routing) for n, m in layers.items()}
    if known != ours:
        odd = sorted(set(known.items()) ^ set(ours.items()))[0][0]
        raise VimoeError(
            f"the evidence is of another model: {odd} has (experts, top_k, routing) {known.get(odd, 'none')} in it and "
            f"{ours.get(odd, 'none')} in this model; run analyze on this model"
        )
    mass = {e.name: torch.from_numpy(e.gate_mass) for e in evidence.layers}
    if loader is None:
        return _by_evidence(model, evidence, mass, tolerance)
    greedy = _Greedy(model, loader, tolerance, seed, progress, sequences)
    kept = greedy.layers(mass)
    if experts:
        for name in reversed(moe_layers(model)):
            greedy.experts(name)
    return Pruning(tuple(greedy.steps), kept, tolerance, greedy.sequences)


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
    """Removes one thing after another, and measures what is left after each."""

    def __init__(
        self, model: nn.Module, loader: Batches, tolerance: float, seed: int, progress: bool,
        sequences: Sequence[Hashable] | None,
    ) -> None:  # fmt: skip
        self.model = model.eval()  # what is built in a layer's place has its mode
        self.tolerance, self.seed, self.progress = tolerance, seed, progress
        self._subjects = Subjects(model, loader, list(moe_layers(model)))
        self.steps: list[Step] = []
        self._units, self.sequences = numbered(sequences)
        self._named = None if sequences is None else len(sequences)
        self._total = Changes(np.zeros(1), np.zeros(1))  # (I,) of each image, by all steps

    def layers(self, mass: Mapping[str, Tensor]) -> tuple[Step, ...]:
        """Makes layers dense as long as one can go; returns what those that stay would have cost."""
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

    def experts(self, name: str) -> None:
        """Drops experts of a layer as long as one can go."""
        layer = moe_layers(self.model)[name]
        left = list(range(layer.config.num_experts))
        while len(left) > layer.config.top_k:
            without: list[Intervention] = [Without(e) for e in range(len(left))]
            changes = self._measure({name: without}, f"pruning experts of {name}")
            effects = Effect.each(changes[name], self.seed, self._units)
            column = min(range(len(effects)), key=lambda i: effects[i].loss.high)
            if effects[column].loss.high > self.tolerance:
                return
            layer.keep_experts([e for e in range(len(left)) if e != column])
            self._took(Step(name, left.pop(column), "dropped", effects[column]), changes[name], column)

    def _measure(self, plan: Mapping[str, list[Intervention]], task: str) -> dict[str, Changes]:
        task = task if self.progress else ""
        changes = measure(self._subjects, plan, task)
        images = len(next(iter(changes.values())).loss)
        if self._named not in (None, images):
            raise ConfigError(f"{self._named} sequences of {images} images: expected one for each image")
        return changes

    def _took(self, step: Step, change: Changes, column: int) -> None:
        self._total = Changes(self._total.loss + change.loss[:, column], self._total.right + change.right[:, column])
        total_of = Changes(self._total.loss[:, None], self._total.right[:, None])
        (total,) = Effect.each(total_of, self.seed, self._units)
        self.steps.append(replace(step, total=total))


def receipts(
    models: list[nn.Module],
    loader: Batches,
    score: Callable[[nn.Module, Any, str], Score | SceneScore] = evaluate,
    timed: Batches | None = None,
    task: str = "",
) -> list[Receipt]:
    """The same measurements of each model; speed on the loader's first batch, in turns, because machines are noisy.

    Args:
        models: to be measured.
        loader: test batches.
        score: of a model on a loader; of classifiers by default.
        timed: batches to time a forward on, by default those of the loader.
        task: what to call the scoring where it is shown how far it is; not shown without it.
    """
    speeds = images_per_second(models, next(iter(timed or loader))[0])
    scores = [score(m, loader, task and f"{task}, {i} of {len(models)}") for i, m in enumerate(models, 1)]
    return [Receipt(score, count(m), s) for m, score, s in zip(models, scores, speeds, strict=True)]


def images_per_second(models: list[nn.Module], images: Tensor, rounds: int = 15) -> list[float]:
    """Median inference throughput of each model on the same images, timed in turns after a round to warm up.

    On a CPU these are at most 32 images, and there are fewer rounds, but 3 at least, once they have taken 10 s.

    The images should be real ones: how long an MoE takes depends on which experts they go to.
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
