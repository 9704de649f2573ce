"""What changes, image by image, when an MoE layer is overruled: other decisions, or a dense FFN in its place.

All interventions on a layer are computed in one forward: up to the layer's block the images run once, there they are
repeated for each intervention. So an intervention costs the rest of the model, and images are read from disk once.

Axes: I images, B images of a batch, V interventions on a layer, U routed units of an image, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.errors import DataError, VimoeError
from vimoe.evaluate import Batches, batches_of
from vimoe.moe import MoE, Routing
from vimoe.segmentation.legend import IGNORE
from vimoe.segmentation.segmenter import Segmenter
from vimoe.surgery import block_name

_BROKEN = 1e6  # nats, of an image for which an intervention gives no finite loss
_ROWS = 512  # images that run through the rest of the model at a time
_SCORES = 2**26  # of pixels and classes, of these images: fewer run where images have many


class Decision(Protocol):
    """Other decisions for a layer."""

    def __call__(self, layer: MoE, routing: Routing, images: Tensor) -> Routing:
        """Given the routing of a batch, and which (B,) of the images that are measured they are."""


@dataclass(frozen=True)
class Handed:
    """Each image gets the complete decisions (experts and gates) of another one.

    Attributes:
        experts, gates: (I, U, K) decisions of those who give.
        donors: who gives to each image that is measured.
    """

    experts: Tensor
    gates: Tensor
    donors: Tensor

    def __call__(self, layer: MoE, routing: Routing, images: Tensor) -> Routing:
        chosen, device = self.donors[images], routing.experts.device
        experts = self.experts[chosen].flatten(0, 1).to(device, routing.experts.dtype)
        return replace(routing, experts=experts, gates=self.gates[chosen].flatten(0, 1).to(device))


@dataclass(frozen=True)
class Frozen:
    """Every unit gets the same decision: experts (K,) and gates (K,)."""

    experts: Tensor
    gates: Tensor

    def __call__(self, layer: MoE, routing: Routing, images: Tensor) -> Routing:
        shape, device = routing.experts.shape, routing.experts.device
        experts = self.experts.to(device, routing.experts.dtype).expand(shape)
        return replace(routing, experts=experts, gates=self.gates.to(device).expand(shape))


@dataclass(frozen=True)
class Without:
    """An expert cannot be chosen: its units go to their next choice."""

    expert: int

    def __call__(self, layer: MoE, routing: Routing, images: Tensor) -> Routing:
        logits = routing.logits.clone()
        logits[:, self.expert] = -torch.inf
        return layer.router.decide(logits, routing.batch)


@dataclass(frozen=True)
class Images:
    """Which images of a loader: places (I,) in rising order, and labels (I,) by which another order is noticed."""

    places: np.ndarray
    labels: np.ndarray


Intervention = Decision | nn.Module  # a module takes the layer's place


@dataclass(frozen=True)
class Changes:
    """What interventions on a layer change for each image: the loss in nats, and being right (-1, 0 or 1), (I, V)."""

    loss: np.ndarray
    right: np.ndarray


def measure(
    model: nn.Module,
    loader: Batches,
    plan: Mapping[str, Sequence[Intervention]],
    chosen: Images | None = None,
    task: str = "",
) -> tuple[dict[str, Changes], Images]:
    """Overrules one layer at a time and compares with the untouched model.

    Args:
        model: a classifier, or a segmenter; left in eval mode.
        loader: batches of (images, labels), or (images, masks).
        plan: for each layer, by module name, the interventions on it.
        chosen: the images to measure on; by default all.
        task: what to call this in a progress bar; none without it.

    Returns:
        For each layer the changes, a column an intervention in the order of the plan; and the images they are of, which
        another reading of the loader must give again.

    Raises:
        DataError: where the loader is empty, or gives other images than `chosen` says.
        VimoeError: where the loss of the untouched model is not finite.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in plan}
    seen, measured, places, classes = 0, 0, [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for x, labels in batches_of(model, loader, task):
        if chosen is not None:
            first, last = np.searchsorted(chosen.places, [seen, seen + len(x)])
            rows = torch.from_numpy(chosen.places[first:last] - seen).to(x.device)
            seen, x, labels = seen + len(x), x[rows], labels[rows]
            if not np.array_equal(signature(labels), chosen.labels[first:last]):
                raise DataError("the loader gives its images in another order each time: expected shuffle=False")
        if not len(x):
            continue
        index = torch.arange(measured, measured + len(x))
        measured += len(x)
        places.append(index.numpy())
        classes.append(signature(labels))
        with torch.no_grad():
            logits = model(x)
            base = _losses(logits, labels)
        rows_at_once = max(1, min(_ROWS, _SCORES // logits[0].numel()))
        if not base[0].isfinite().all():
            raise VimoeError(f"the model's loss is {float(base[0].sum())}: expected a model whose outputs are finite")
        for name, interventions in plan.items():
            size = max(1, rows_at_once // max(1, len(interventions)))
            for part in zip(*(each.split(size) for each in (x, labels, index, *base)), strict=True):
                groups = [interventions[i : i + rows_at_once] for i in range(0, len(interventions), rows_at_once)]
                columns = [_changes(model, name, group, *part) for group in groups]
                found[name].append(
                    (torch.cat([c[0] for c in columns], dim=1), torch.cat([c[1] for c in columns], dim=1))
                )
    if chosen is not None and measured != len(chosen.places):
        raise DataError("the loader gave fewer images when it was read again: expected the same each time")
    if not measured:
        raise DataError("the loader is empty: expected validation images")
    changes = {
        name: Changes(*(torch.cat(column).double().numpy() for column in zip(*parts, strict=True)))
        for name, parts in found.items()
    }
    return changes, chosen or Images(np.concatenate(places), np.concatenate(classes))


def _changes(
    model: nn.Module, name: str, interventions: Sequence[Intervention], x: Tensor, labels: Tensor, index: Tensor,
    loss: Tensor, right: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, V) change of the loss and of being right."""
    with torch.no_grad(), overruled(model, name, interventions, index):
        several = labels.repeat(len(interventions), *[1] * (labels.ndim - 1))
        other_loss, other_right = _losses(model(x), several)
    other_loss = other_loss.nan_to_num(nan=_BROKEN, posinf=_BROKEN)  # what breaks the model must not seem harmless
    columns = ((other_loss.view(-1, len(x)) - loss).T, (other_right.view(-1, len(x)) - right).T)
    return columns[0].cpu(), columns[1].cpu()


def _losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) of each image the loss, and the share of it that is right: 0 or 1, or of its pixels that are not void."""
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE if labels.ndim > 1 else -100, reduction="none")
    right = (logits.argmax(dim=1) == labels).float()
    if labels.ndim == 1:
        return loss, right
    counted = labels != IGNORE
    pixels = counted.flatten(1).sum(dim=1).clamp(min=1)
    return loss.flatten(1).sum(dim=1) / pixels, (right * counted).flatten(1).sum(dim=1) / pixels


def signature(labels: Tensor) -> np.ndarray:
    """(B,) a number for each image by which to know it again: its class, or the sum of its mask."""
    return (labels if labels.ndim == 1 else labels.flatten(1).sum(dim=1)).cpu().numpy()


@contextmanager
def overruled(model: nn.Module, name: str, interventions: Sequence[Intervention], index: Tensor) -> Iterator[None]:
    """While it holds, a forward of B images gives V x B outputs: those of the first intervention, of the second, ...

    Args:
        model: with an MoE layer of that name.
        name: of the layer.
        interventions: V of them.
        index: (B,) which of the images that are measured will come.
    """
    layer: Any = model.get_submodule(name)
    count = len(interventions)

    def repeat(_block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].repeat(count, *[1] * (args[0].ndim - 1)), *args[1:])

    def decide(_router: nn.Module, _args: Any, routing: Routing) -> Routing:
        parts = []
        units = len(routing.experts) // count
        batch = (routing.batch[0] // count, routing.batch[1])
        for v, intervention in enumerate(interventions):
            rows = slice(v * units, (v + 1) * units)
            part = replace(
                routing, logits=routing.logits[rows], gates=routing.gates[rows], experts=routing.experts[rows],
                batch=batch,
            )  # fmt: skip
            parts.append(part if isinstance(intervention, nn.Module) else intervention(layer, part, index))
        gates, experts = (torch.cat([getattr(part, key) for part in parts]) for key in ("gates", "experts"))
        return replace(routing, gates=gates, experts=experts)

    def compute(_layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        pairs = zip(interventions, args[0].chunk(count), output.chunk(count), strict=True)
        return torch.cat([module(x) if isinstance(module, nn.Module) else y for module, x, y in pairs])

    def spread(_decoder: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        most = max(map(len, args[0]))  # maps of blocks before the layer's are of the images, others of all repetitions
        return ([each.repeat(most // len(each), 1, 1, 1) for each in args[0]],)

    with ExitStack() as stack:
        for handle in (
            *([model.decoder.register_forward_pre_hook(spread)] if isinstance(model, Segmenter) else []),
            _block(model, name).register_forward_pre_hook(repeat),
            layer.router.register_forward_hook(decide),
            layer.register_forward_hook(compute),
        ):
            stack.callback(handle.remove)
        yield


def _block(model: nn.Module, name: str) -> nn.Module:
    """The block that holds the layer."""
    inside = block_name(model, name)
    assert inside  # surgery converts nothing else
    return model.get_submodule(inside)
