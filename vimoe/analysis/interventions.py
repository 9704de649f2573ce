"""Effects of overruling an MoE layer, image by image: other decisions, or a dense FFN in its place.

Little is computed twice. A batch runs once untouched, from the first layer's block on if the features before it are
known. An intervention on a layer then needs other outputs of this layer for the images whose decisions it changes, and
the rest of the model after them. Features before the layer are remembered. Each expert computes each unit once,
whatever interventions send it there. If nothing reads the patches that leave the last block, its FFN leaves them out.

Axes: I images, B images of a batch, V interventions on a layer, M pairs of an image and an intervention, R routed units
of a batch, U those of an image, K chosen experts, N experts, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vimoe.analysis.changes import Changes
from vimoe.analysis.partial_forward import LayerRecord, PartialForward
from vimoe.analysis.temperatures import losses_on_grid
from vimoe.errors import DataError, VimoeError
from vimoe.metrics.base import Batches, Metric, batches, metric_of, signature
from vimoe.models.frozen_trunk import Entry
from vimoe.moe import MoE, Routing
from vimoe.moe.autocast import in_type_of_autocast
from vimoe.moe.dispatch import combine
from vimoe.moe.ffn import as_linear
from vimoe.moe.orthogonal import orthogonal_slots
from vimoe.process import Alone, Process
from vimoe.terminal import track

KEPT_BYTES = 2**30  # of what the blocks before the first overruled layer give, and of labels, at most
_BROKEN = 1e6  # nats, of an image for which an intervention gives no finite loss
_ROWS = 128  # images that run through the rest of the model at a time: more would not stay in a CPU's cache
_HELD = 512  # times that an expert computes an image whose outputs are held at a time
_SCORES = 2**26  # of pixels and classes, of these images: fewer run where images have many


class Decision(Protocol):
    """Other decisions for a layer."""

    def __call__(self, layer: MoE, routing: Routing, images: Tensor) -> Routing:
        """Given the routing of a batch, and which (B,) of the images that are measured they are.

        In the last block it may be the routing of the first tokens alone, where nothing reads the others.
        """


@dataclass(frozen=True)
class Handed:
    """Each image gets the complete decisions (experts and gates) of another one.

    Attributes:
        experts, gates: (I, U, K) decisions of those who give.
        donors: number of the image that gives to each image that is measured.
    """

    experts: Tensor
    gates: Tensor
    donors: Tensor

    def __call__(self, layer: MoE, routing: Routing, images: Tensor) -> Routing:
        chosen, device = self.donors[images], routing.experts.device
        units = len(routing.experts) // len(images)
        experts, gates = (given[chosen, :units].flatten(0, 1).to(device) for given in (self.experts, self.gates))
        return replace(routing, experts=experts.to(routing.experts.dtype), gates=gates)


@dataclass(frozen=True)
class Frozen:
    """Every unit gets the same decision: experts (K,) and gates (K,), or (P, K) with one for each of P pools."""

    experts: Tensor
    gates: Tensor

    def __call__(self, layer: MoE, routing: Routing, images: Tensor) -> Routing:
        shape, device = routing.experts.shape, routing.experts.device
        experts, gates = self.experts.to(device, routing.experts.dtype), self.gates.to(device)
        if routing.kinds is not None:
            experts, gates = experts[routing.kinds], gates[routing.kinds]
        return replace(routing, experts=experts.expand(shape), gates=gates.expand(shape))


@dataclass(frozen=True)
class Without:
    """Rule an expert out: its units go to their next choice, if the router has one for them."""

    expert: int

    def __call__(self, layer: MoE, routing: Routing, images: Tensor) -> Routing:
        logits = routing.logits.clone()
        logits[:, self.expert] = -torch.inf
        return layer.router.route(logits, routing.batch)


@dataclass(frozen=True)
class Only:
    """Send every unit of an expert's pool to this expert alone, with the sum of the gates that it has."""

    expert: int

    def __call__(self, layer: MoE, routing: Routing, images: Tensor) -> Routing:
        return routing.only(self.expert)


Intervention = Decision | nn.Module  # a module takes the layer's place


@dataclass(frozen=True)
class Images:
    """Images of a loader: places (I,) in rising order, and labels (I,) by which another order is noticed."""

    places: np.ndarray
    labels: np.ndarray


class Subjects:
    """The images that interventions are measured on, read from a loader.

    What the blocks before the first layer give for them is kept from one reading to the next, where it is little. Else
    the loader is read again, and must give the same images.

    Several processes may share the images. Places, and numbers of images that are measured, are then those among all.

    Args:
        model: a classifier, or a segmenter; left in eval mode. It may change, but not before the first layer.
        loader: batches of (images, labels), or (images, masks); or of entries before the first layer.
        layers: names of the MoE layers that will be overruled, in forward order.
        most: keep nothing of more images than this; None for any number.
        metric: name of the metric that knows the labels; by default the model's own (`metric_of`).
        process: this one of the processes that share the images, whose `loader.batch_sampler` has its places
            (`vimoe.data.loaders.share`); by default all are for this one.

    Attributes:
        images: images of this process that are measured; None before the first reading, which means all of the
            loader's that have a label (`Metric.labelled`).
        given: number of images that the loader gave when it was last read for a measurement.
        features: {"before": the first block that runs} if the loader gives features in place of images, else None.

    Raises:
        DataError: if several processes share a loader that does not say so.
    """

    def __init__(
        self, model: nn.Module, loader: Batches, layers: Sequence[str], most: int | None = None,
        metric: str | None = None, process: Process | None = None,
    ) -> None:  # fmt: skip
        self.model, self.loader, self.layers, self.most = model, loader, layers, most
        self.metric, self.process = metric_of(model, metric), process or Alone()
        self.images: Images | None = None
        self.given = 0
        self._numbers: Tensor | None = None  # of the images, among all that are measured
        self._shares: list[range] | None = None  # places of the batches; None if they come one behind the other
        if self.process.count > 1:
            self._shares = getattr(loader, "batch_sampler", None)
            if not isinstance(self._shares, list):
                raise DataError(
                    f"a loader of {self.process.count} processes without places: expected its batch_sampler to be what "
                    f"vimoe.data.loaders.share gives; pass it to the DataLoader"
                )
        self.features: dict[str, str] | None = None
        self._partial: PartialForward | None = None
        self._kept: list[tuple[Entry, Tensor]] | None = []  # None once it is too much
        self._bytes = 0
        self._whole = False  # whether this is all there is to measure

    def batches(self, task: str = "") -> Iterator[tuple[range, Entry, Tensor]]:
        """Yield the places, entries and labels of the loader's batches."""
        shares, done = iter(self._shares or ()), 0
        for start, labels in batches(self.metric, self.loader, task):
            yield range(done, done + len(labels)) if self._shares is None else next(shares), start, labels
            done += len(labels)

    @contextmanager
    def keeping(self, start: Entry, labels: Tensor) -> Iterator[PartialForward]:
        """Record the input of the first MoE block during a forward of a batch, which computes what is read."""
        if self._partial is None:
            self._partial = PartialForward.find(self.model, self.layers, start[:2])
            self.features = {"before": start.cut.before} if start.cut else None
        with self._partial.entries(start) as found:
            yield self._partial
        if self._kept is None:
            return
        self._kept.append((found[-1], labels))
        self._bytes += found[-1].nbytes + labels.nbytes  # masks are as large as images
        count = sum(len(labels) for _, labels in self._kept)
        if self._bytes > KEPT_BYTES or (self.most is not None and count > self.most):
            self._kept = None

    def blocks_after(self, layer: str) -> int:
        """Return the number of blocks after a layer that each intervention runs; `keeping` has seen a batch."""
        assert self._partial
        return self._partial.blocks_after(layer)

    def choose(self, images: Images) -> None:
        """Set the images of all processes that are to be measured; `keeping` has seen all of the loader's."""
        own = np.arange(len(images.places))
        if self._shares is not None:
            own = np.flatnonzero(np.isin(images.places, [place for places in self._shares for place in places]))
        self.images, self._numbers = Images(images.places[own], images.labels[own]), torch.from_numpy(own)
        kept = self._kept or []
        self._whole = sum(len(labels) for _, labels in kept) == len(own)

    def records(
        self, layers: Sequence[str], size: int, task: str = ""
    ) -> Iterator[tuple[PartialForward, Tensor, dict[str, LayerRecord], Tensor, Tensor]]:
        """Run the untouched model on at most `size` images at a time.

        Yields:
            The partial forward, logits, records of these layers, labels, and numbers (B,) of the images.
        """
        done, known = 0, self._whole
        for start, labels in self._remembered(size, task) if known else self._read(size, task):
            with torch.no_grad(), nullcontext(self._partial) if known else self.keeping(start, labels) as partial:
                assert partial
                outputs, records = partial.forward(start, layers)
            numbers = torch.arange(done, done + len(labels))
            yield partial, outputs, records, labels, numbers if self._numbers is None else self._numbers[numbers]
            done += len(labels)

    def _remembered(self, size: int, task: str) -> Iterator[tuple[Entry, Tensor]]:
        for start, labels in track(self._kept or (), task):
            for at in range(0, len(labels), size):
                yield start[at : at + size], labels[at : at + size]

    def _read(self, size: int, task: str) -> Iterator[tuple[Entry, Tensor]]:
        self._kept, self._bytes = [], 0
        chosen, seen = self.images, 0
        places, signatures = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for there, start, labels in self.batches(task):
            rows = self.metric.labelled(labels).nonzero()[:, 0].cpu().numpy()
            if chosen:
                first, last = np.searchsorted(chosen.places, [there.start, there.stop])
                rows = (chosen.places[first:last] - there.start) // there.step
            places.append(there.start + there.step * rows)
            seen += len(start)
            if len(rows) < len(start):
                some = torch.from_numpy(rows).to(labels.device)
                start, labels = start[some], labels[some]
            signatures.append(signature(labels).cpu().numpy())
            if chosen and not np.array_equal(signatures[-1], chosen.labels[first:last]):
                raise DataError("the loader gives its images in another order each time: expected shuffle=False")
            for at in range(0, len(start), size):
                yield start[at : at + size], labels[at : at + size]
        found = Images(np.concatenate(places), np.concatenate(signatures))
        if chosen and len(found.places) != len(chosen.places):
            raise DataError("the loader gave fewer images when it was read again: expected the same each time")
        if not len(found.places):
            what = "has no labelled image" if seen else "is empty"
            raise DataError(f"the loader {what}: expected validation images with labels")
        self.images, self.given = chosen or found, seen
        self._whole = self._kept is not None


def measure(subjects: Subjects, plan: Mapping[str, Sequence[Intervention]], task: str = "") -> dict[str, Changes]:
    """Overrule one layer at a time and compare with the untouched model.

    Processes that share the images all call it, with the same plan.

    Args:
        subjects: the model and the images to measure on.
        plan: interventions on each layer, by module name.
        task: name of the progress bar; none is shown without it.

    Returns:
        Changes by layer, of the images of all processes; a column is an intervention, in the order of the plan.

    Raises:
        DataError: if the loader is empty, or gives other images when it is read again.
        VimoeError: if the loss of the untouched model is not finite.
    """
    layers: dict[str, Any] = {name: subjects.model.get_submodule(name) for name in plan}
    most = max((layer.config.num_experts for layer in layers.values()), default=1)
    measured: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []  # numbers, scores before, and after by layer
    for partial, logits, records, labels, index in subjects.records(list(plan), max(1, _HELD // most), task):
        base = _scores(subjects.metric, logits, labels)
        if not (losses := base[:, 0]).isfinite().all():
            raise VimoeError(f"the model's loss is {float(losses.sum())}: expected a model whose outputs are finite")
        after: dict[str, Tensor] = {}
        size = max(1, min(_ROWS, _SCORES // logits[0].numel()))
        for name, interventions in plan.items():
            scores = base.repeat(len(interventions), 1, 1)
            with torch.no_grad():
                for columns, rows, y in _outputs(layers[name], records[name], interventions, index, size):
                    outputs = partial.rest(name, records[name], rows, y)
                    scores[columns, rows] = _scores(subjects.metric, outputs, labels[rows])
            scores = scores.nan_to_num(nan=_BROKEN, posinf=_BROKEN)  # what breaks the model must not seem harmless
            after[name] = scores.transpose(0, 1).cpu()
        measured.append((index, base.cpu(), after))
    batches_of_all = [batch for share in subjects.process.gather(measured) for batch in share]
    order = torch.cat([index for index, _, _ in batches_of_all]).argsort()
    untouched = torch.cat([base for _, base, _ in batches_of_all])[order]
    return {
        name: _changes(untouched, torch.cat([after[name] for _, _, after in batches_of_all])[order]) for name in plan
    }


def _scores(metric: Metric, outputs: Tensor, labels: Tensor) -> Tensor:
    """(B, 2 + M) loss of each image, share of it that is right, and its losses by temperature."""
    scores = torch.stack(metric.of_each_image(outputs, labels), dim=1)
    return torch.cat([scores, losses_on_grid(outputs, labels)], dim=1) if metric.calibrates else scores


def _changes(before: Tensor, after: Tensor) -> Changes:
    """Changes from scores (I, 2 + M) of the untouched model to those (I, V, 2 + M) of the overruled one."""
    loss, right = (after[..., :2] - before[:, None, :2]).double().numpy().transpose(2, 0, 1)
    return Changes(loss, right, after[..., 2:].numpy(), before[:, 2:].numpy(), before[:, :2].double().numpy())


def _outputs(
    layer: MoE, record: LayerRecord, interventions: Sequence[Intervention], index: Tensor, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Compute the other outputs of the layer, for at most `size` images at a time.

    Yields:
        Interventions (M,), images (M,) of the batch whose decisions they change, and outputs (M, T, D) for them.
    """
    assert record.x is not None
    x, others = record.x, _Others(layer, record.x)
    for v, module in enumerate(interventions):
        if isinstance(module, nn.Module):
            y = (
                others.shared.view(x.shape)
                if module is layer.shared and others.shared is not None
                else as_linear(module)(x)
            )
            for rows in torch.arange(len(x), device=x.device).split(size):
                yield torch.full_like(rows, v), rows, y[rows]
    own = [others.of_images(each) for each in (others.routing.experts, others.routing.gates)]
    changed: list[tuple[Tensor, ...]] = []
    for v, decision in enumerate(interventions):
        if not isinstance(decision, nn.Module):
            routing = decision(layer, others.routing, index)
            experts, gates = (others.of_images(each) for each in (routing.experts, routing.gates))
            differs = (experts != own[0]) | (gates != own[1])
            rows = differs.flatten(1).any(dim=1).nonzero()[:, 0]
            changed.append((torch.full_like(rows, v), rows, experts[rows], gates[rows].to(own[1].dtype)))
    if changed:
        columns, images, experts, gates = (torch.cat(each) for each in zip(*changed, strict=True))
        for at in torch.arange(len(images), device=x.device).split(size):
            if len(at):
                yield columns[at], images[at], others(images[at], experts[at], gates[at])


class _Others:
    """Outputs of a layer for a batch by other decisions. Each expert computes each unit once, when it is asked for."""

    def __init__(self, layer: MoE, x: Tensor) -> None:
        x = in_type_of_autocast(x)
        self.layer, self.x, self.shape = layer, x, x.shape
        self.routing = layer.router(x)
        self.units = len(self.routing.experts) // len(x)  # of an image
        self.x_RTD = x.reshape(len(x) * self.units, self.routing.tokens_per_unit, x.shape[2])
        self.shared = None if layer.shared is None else layer.shared(x).view(self.x_RTD.shape)
        self.none = len(self.x_RTD) * layer.config.num_experts  # row of the table for empty slots
        self.known = torch.zeros(self.none + 1, dtype=torch.bool, device=x.device)
        self.known[self.none] = True
        self.table: Tensor = x.new_empty(self.none + 1, *self.x_RTD.shape[1:])  # by unit, then by expert
        self.table[self.none] = 0

    def of_images(self, decisions: Tensor) -> Tensor:
        """(R, K) to (B, U, K)."""
        return decisions.reshape(self.shape[0], self.units, -1)

    def __call__(self, images: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """Return outputs (M, T, D) for (M,) images of the batch by decisions (M, U, K)."""
        config = self.layer.config
        experts, gates, batch = experts.flatten(0, 1), gates.flatten(0, 1), (len(images), self.shape[1])
        other = replace(self.routing, experts=experts, gates=gates, batch=batch)
        if self.layer.router.mixes:
            return self.layer.router.compute(self.x[images], other, self.layer.experts, self.layer.shared)
        if config.orthogonal != "none":
            other = other.by_gate
        units = (images[:, None] * self.units + torch.arange(self.units, device=images.device)).flatten()
        number = config.num_experts
        row = (units[:, None] * number + other.experts).masked_fill(other.experts < 0, self.none)
        wanted = row.unique()
        new = wanted[~self.known[wanted]]
        if len(new):
            new = new[(new % number).argsort(stable=True)]
            load = torch.bincount(new % number, minlength=number)
            self.table[new] = self.layer.experts(self.x_RTD[new // number], torch.arange(len(new)).to(new), load)
            self.known[new] = True
        shared = None if self.shared is None else self.shared[units]
        table = self.table
        if shared is not None and config.orthogonal != "none":
            table = orthogonal_slots(table[row], shared, other, config).flatten(0, 1)
            row = torch.arange(len(table), device=row.device).view(row.shape)
        mix = shared is not None and config.combine == "mix"
        return combine(table, other.gates, row, shared, mix).view(len(images), *self.shape[1:])
