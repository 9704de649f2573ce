"""Decisions of MoE layers for validation images: a uniform sample of them, and tables of experts by class.

Axes: I images, B images of a batch, P patches of an image, C classes, N experts, U routed units of an image, K chosen
experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vimoe.analysis.dependence import Dependence, dependence, dependence_of_units
from vimoe.analysis.expert_usage import count_experts, tables_of_units
from vimoe.analysis.interventions import Subjects
from vimoe.errors import DataError, VimoeError
from vimoe.metrics.base import Metric, Score, signature
from vimoe.moe import MoE, Routing, record
from vimoe.process import Alone, Process

KEPT_IMAGES = 20_000  # whose decisions are kept, at most
KEPT_UNITS = 2**21  # of each layer, at most: tokens are many
_COMPARED = 16  # images whose tokens go to all experts of a layer
_EXAMPLES = 8  # images that are named for each expert


class Decisions:
    """Decisions of a uniform sample of the images in each layer, and a few layer inputs.

    Of several processes each adds its share of every batch, and draws for all of it, so that `close` joins one sample.

    Attributes:
        places: (I,) places in the loader, in rising order; signatures: (I,) by which to know the images again.
        labels: (I,) class of each image, or (I, P) of each patch if `by_patch`; -1 for none.
        experts, gates: decisions (I, U, K) by layer; -1 and 0 in empty slots.
        inputs: inputs (a few images, tokens, channels) by layer.
    """

    def __init__(
        self, layers: Mapping[str, MoE], seed: int, by_patch: bool = False, process: Process | None = None
    ) -> None:
        self.layers, self.by_patch, self.process = layers, by_patch, process or Alone()
        self.experts: dict[str, np.ndarray] = {}
        self.gates: dict[str, np.ndarray] = {}
        self.inputs: dict[str, Tensor] = {}
        self._rng = np.random.default_rng(seed)
        self._limit = KEPT_IMAGES
        self._watched = np.full(_COMPARED, -1)  # places of the images of the inputs

    @contextmanager
    def watching(self, places: range) -> Iterator[None]:
        """Keep the inputs of the layers for a few images of the batch that runs inside the block."""
        slots, rows = self._slots(places, _COMPARED)
        self._watched[slots] = np.array(places)[rows]

        def add_input(name: str, x: Tensor) -> None:
            if name not in self.inputs:
                self.inputs[name] = x.new_empty(_COMPARED, *x.shape[1:])
            for slot, row in zip(slots, rows, strict=True):
                self.inputs[name][slot] = x[row]

        with ExitStack() as stack:
            for name, layer in self.layers.items():
                hook = layer.register_forward_pre_hook(
                    lambda this, args, name=name: add_input(name, this.grid.tokens(args[0]))
                )
                stack.callback(hook.remove)
            yield

    def add(self, places: range, labels: np.ndarray, routings: list[Routing], signatures: np.ndarray) -> None:
        """Add a batch: (B,) places, (B,) or (B, P) labels, (B,) signatures, and the routing of each layer."""
        arrays = {r.layer: [_per_image(a, r) for a in (r.experts, r.gates)] for r in routings}
        if not self.experts:
            self._limit = min(KEPT_IMAGES, *(KEPT_UNITS // e.shape[1] for e, _ in arrays.values()))
            self.places, self.signatures = np.full(self._limit, -1), np.empty(self._limit, np.int64)
            self.labels = np.empty((self._limit, *labels.shape[1:]), np.int32)
            for name, (experts, gates) in arrays.items():  # memory is taken when it is written to
                self.experts[name] = np.empty((self._limit, *experts.shape[1:]), np.int16)
                self.gates[name] = np.empty((self._limit, *gates.shape[1:]), np.float32)
        slots, rows = self._slots(places, self._limit)
        self.places[slots], self.signatures[slots] = np.array(places)[rows], signatures[rows]
        self.labels[slots] = labels[rows]
        for name, (experts, gates) in arrays.items():
            self.experts[name][slots], self.gates[name][slots] = experts[rows], gates[rows]

    def close(self) -> None:
        """Join the images of all processes, in the loader's order. Each process calls it, and has seen some."""
        mine, _ = self._last(self.places)
        kept = self.places, self.signatures, self.labels, *self.experts.values(), *self.gates.values()
        arrays = [self.process.gather(array[mine]) for array in kept]
        order = np.argsort(np.concatenate(arrays[0]))
        self.places, self.signatures, self.labels, *decisions = (np.concatenate(each)[order] for each in arrays)
        self.experts = dict(zip(self.experts, decisions, strict=False))
        self.gates = dict(zip(self.gates, decisions[len(self.gates) :], strict=True))
        mine, used = self._last(self._watched)
        for name, kept_inputs in self.inputs.items():
            own = torch.zeros_like(kept_inputs)
            own[mine] = kept_inputs[mine]
            self.inputs[name] = self.process.sum(own)[:used]

    def _last(self, places: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the slots whose last image is this process's, given the places of its own, and how many are used."""
        last = np.max(self.process.gather(places), axis=0)
        return np.flatnonzero((places == last) & (last >= 0)), int((last >= 0).sum())

    def per_image(self, name: str, weights: np.ndarray | None = None) -> np.ndarray:
        """Return how often each image chose each expert (I, N), or the sum of weights (I, U, K) of these choices."""
        return _per_image_counts(self.experts[name], self.layers[name].config.num_experts, weights)

    def examples(self, gates: np.ndarray) -> tuple[tuple[int, ...], ...]:
        """Return for each expert the places of the images that gave it most of (I, N) gates, best first."""
        best = np.argsort(-gates, axis=0, kind="stable")[:_EXAMPLES].T
        return tuple(tuple(int(self.places[i]) for i in row if gates[i, e] > 0) for e, row in enumerate(best))

    def _slots(self, places: range, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Reservoir sampling (Vitter's algorithm R): where to keep which rows of a batch."""
        nth = np.arange(places.start - self.process.rank, places.stop)  # of all processes
        slots = np.where(nth < limit, nth, self._rng.integers(0, nth + 1))[self.process.rank :: self.process.count]
        rows = np.flatnonzero(slots < limit)
        return slots[rows], rows


def observe(
    model: nn.Module, subjects: Subjects, layers: Mapping[str, MoE], seed: int, task: str
) -> tuple[Score, Decisions]:
    """Run the untouched model on all images of the loader. Return its score, and what the layers decided.

    Raises:
        DataError: if there are fewer than two images, or they are of several sizes, or the metric's classes are wrong.
        VimoeError: if the loss is not finite.
    """
    metric, process = subjects.metric, subjects.process
    seen, counts = Decisions(layers, seed, metric.by_patch, process), metric.counts()
    shape: torch.Size | None = None
    for places, start, labels in subjects.batches(task):
        sizes = start.inputs.shape[1:]
        shape = shape or sizes
        _check_sizes(shape, sizes)
        with torch.no_grad(), subjects.keeping(start, labels), record(model) as routings, seen.watching(places):
            counts.add(start.logits(model), labels)
        seen.add(places, _classes_of(metric, labels, routings, layers), routings, signature(labels).cpu().numpy())
    shapes = process.gather(shape)
    if not all(shapes):
        what = "the loader is empty" if not any(shapes) else f"fewer images than processes, {process.count}"
        raise DataError(f"{what}: expected validation images to analyse the routing on")
    _check_sizes(*shapes)
    found = counts.over(process).score()
    if found.images == 1:
        raise DataError("1 validation image: expected at least 2, of one there are no intervals; give more")
    if not math.isfinite(found.columns["loss"]):
        raise VimoeError(
            f"the model's loss on validation is {found.columns['loss']}: expected a model whose outputs are finite"
        )
    seen.close()
    return found, seen


def _check_sizes(*shapes: torch.Size | None) -> None:
    """Raise DataError for images of several sizes."""
    if odd := [tuple(each) for each in shapes if each and each != shapes[0]]:
        raise DataError(f"the loader gives images of {tuple(shapes[0] or ())} and {odd[0]}: expected one size")


def _classes_of(metric: Metric, labels: Tensor, routings: Sequence[Routing], layers: Mapping[str, MoE]) -> np.ndarray:
    """Return the metric's classes of a batch, (B,) or (B, P). Raises DataError for another shape or range."""
    found, classes = metric.classes_of(labels).cpu().numpy(), len(metric.classes)
    expected: list[tuple[int, ...]] = [(len(labels),)]
    if metric.by_patch:
        tokens = ((each.batch[1], layers[each.layer].router.layout.num_prefix_tokens) for each in routings)
        expected = [(len(labels), number - prefix) for number, prefix in tokens]
    if odd := next((shape for shape in expected if shape != found.shape), None):
        axes = "(images, patches)" if metric.by_patch else "(images,)"
        raise DataError(
            f"the metric {metric.score_type.kind!r} gives classes of shape {found.shape}: expected {odd}, {axes}"
        )
    wrong = found[(found < -1) | (found >= classes)]
    if wrong.size:
        raise DataError(
            f"the metric {metric.score_type.kind!r} gives the class {wrong[0]}: expected 0 to {classes - 1}, or -1 for "
            f"none"
        )
    return found


@dataclass(frozen=True)
class ByClass:
    """Classes and choices of experts in a layer: of whole images, or of the patches of segmented ones.

    Attributes:
        labels: (I,), or (I, P) by patch; below 0 for no class.
        experts: (I, U, K) of all units of images with one class, (I, P, K) of patches.
        classes, num_experts: C and N.
        by_patch: True if labels are by patch.
    """

    labels: np.ndarray
    experts: np.ndarray
    classes: int
    num_experts: int
    by_patch: bool

    @classmethod
    def of(cls, seen: Decisions, name: str, classes: int) -> ByClass:
        """Return those of a layer, by its name, and of so many classes."""
        layer, experts = seen.layers[name], seen.experts[name]
        if seen.by_patch:
            prefix = layer.router.layout.num_prefix_tokens
            patches = experts[:, prefix:] if layer.config.routing == "token" else experts
            experts = np.broadcast_to(patches, (*seen.labels.shape, experts.shape[2]))
        return cls(seen.labels, experts, classes, layer.config.num_experts, seen.by_patch)

    def table(self, some: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(C, N) how often the units of each class chose each expert, in some of the images."""
        labels, experts = self.labels[some], self.experts[some]
        if not self.by_patch:
            labels = np.broadcast_to(labels[:, None], experts.shape[:2])
        counted = labels >= 0
        return count_experts(labels[counted], experts[counted], self.classes, self.num_experts)

    def per_image(self) -> np.ndarray:
        """(I, N) how often each image's units of a class chose each expert."""
        if not self.by_patch:
            return _per_image_counts(self.experts, self.num_experts) * (self.labels >= 0)[:, None]
        return tables_of_units(self.labels, self.experts, self.classes, self.num_experts).sum(axis=1)

    def dependence(self, seed: int, sequences: np.ndarray | None) -> Dependence:
        """Return how far experts follow classes (`vimoe.analysis.dependence.dependence`)."""
        if not self.by_patch:
            some = self.labels >= 0
            if not some.any():
                return Dependence(0.0, 0.0, 0.0, 1.0, 0.0)
            units = None if sequences is None else np.unique(sequences[some], return_inverse=True)[1]
            return dependence(self.labels[some], self.per_image()[some], seed, sequences=units)
        known = (self.labels, self.experts, self.classes, self.num_experts)
        return dependence_of_units(*known, seed, sequences)


def _per_image_counts(experts: np.ndarray, num_experts: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Return how often each image chose each expert (I, N), or the sum of weights, both (I, U, K)."""
    image = np.broadcast_to(np.arange(len(experts))[:, None], experts.shape[:2])
    return count_experts(image, experts, len(experts), num_experts, weights)


def _per_image(decisions: Tensor, routing: Routing) -> np.ndarray:
    """(R, K) of all units to (B, U, K)."""
    return decisions.view(routing.batch[0], -1, decisions.shape[1]).cpu().numpy()
