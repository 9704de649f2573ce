"""Calibration: what a dense model computes for some training images at each FFN that will become a mixture.

Starts of experts and routers that are given (`moe.init`, `moe.router`) read it. Axes: B images of a batch, T tokens of
an image, D channels, R rows (images, or some of their tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.errors import DataError, SurgeryError, expect
from vimoe.models.interface import find_backbone
from vimoe.moe import MoE
from vimoe.moe.start import Calibration

TOKENS_OF_AN_IMAGE = 16  # that are kept with token routing: neighbouring tokens are alike

Batches = Iterable[tuple[Tensor, Any]]  # (images, labels), the same each time


def calibrate(model: nn.Module, layers: Mapping[str, MoE], images: Batches | None) -> dict[str, Calibration]:
    """Run the dense model over images, and return what each new layer has to know of them, by the FFN's name.

    Args:
        model: the dense model; its mode stays.
        layers: new MoE layers by the name of the FFN that each will replace.
        images: batches of (images, labels), the same in the same order each time.

    Raises:
        SurgeryError: if there are no images.
        DataError: if they are no pairs of tensors.
    """
    if images is None:
        needed = next(layer.config for layer in layers.values() if layer.needs_images)
        raise SurgeryError(
            f"init={needed.init!r} and router={needed.router!r} are computed from training images: expected some; pass "
            f"images=[(images, labels), ...]"
        )
    backbone = find_backbone(model)
    pooled, labels = list[Tensor](), list[Tensor]()
    features: dict[str, list[Tensor]] = {name: [] for name in layers}
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    seen = 0
    with ExitStack() as stack:
        for name, layer in layers.items():

            def keep(x: Tensor, name: str = name, layer: MoE = layer) -> None:
                image, kept = _features(layer, x, seen)
                rows[name].append(image + seen)
                features[name].append(kept)

            stack.enter_context(_inputs_of(model.get_submodule(name), keep))
        if backbone.classifiers:
            stack.enter_context(_inputs_of(backbone.classifiers[0], lambda x: pooled.append(x.float().cpu())))
        for batch, targets in pairs(images):
            output = _run(model, batch)
            if not backbone.classifiers:
                pooled.append(output.float().cpu())
            labels.append(torch.as_tensor(targets))
            seen += len(batch)
    if not seen:
        raise DataError("no images to start experts or routers from: expected at least 2")
    classes = torch.cat(labels) if labels[0].ndim == 1 and not labels[0].is_floating_point() else None

    def inputs(name: str) -> Callable[[], Iterator[Tensor]]:
        return lambda: _again(model, name, images)

    return {
        name: Calibration(
            features=torch.cat(features[name]),
            image=torch.cat(rows[name]),
            labels=classes,
            pooled=torch.cat(pooled),
            num_classes=backbone.num_classes,
            inputs=inputs(name),
        )
        for name in layers
    }


def _features(layer: MoE, x_BTD: Tensor, seen: int) -> tuple[Tensor, Tensor]:
    """Return the number (R,) in the batch of the image of each row, and (R, D) what the router reads of it."""
    images, tokens = x_BTD.shape[:2]
    if layer.config.routing == "image":
        return torch.arange(images), layer.router.feature(x_BTD).float().cpu()
    kept = min(tokens, TOKENS_OF_AN_IMAGE)
    random = torch.rand(images, tokens, generator=torch.Generator().manual_seed(seen))
    chosen_BK = random.topk(kept).indices.to(x_BTD.device)
    rows = x_BTD.gather(1, chosen_BK[..., None].expand(-1, -1, x_BTD.shape[2])).flatten(0, 1)
    return torch.arange(images).repeat_interleave(kept), rows.float().cpu()


def _again(model: nn.Module, name: str, images: Batches) -> Iterator[Tensor]:
    """Yield the input (B, T, D) of an FFN for each batch."""
    found: list[Tensor] = []
    with _inputs_of(model.get_submodule(name), found.append):
        for batch, _ in pairs(images):
            _run(model, batch)
            yield found.pop()


def pairs(images: Batches) -> Iterator[tuple[Tensor, Any]]:
    """Yield the batches. Raises DataError for one that is no pair of images and labels."""
    for pair in images:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DataError(f"images have a batch of type {type(pair).__name__}: expected (images, labels)")
        expect("images", pair[0], Tensor, "give batches of (images, labels)")
        yield pair[0], pair[1]


@torch.no_grad()
def _run(model: nn.Module, images: Tensor) -> Tensor:
    weight, training = next(model.parameters()), [module for module in model.modules() if module.training]
    try:
        output: Tensor = model.eval()(images.to(weight.device, weight.dtype))
    finally:
        for module in training:
            module.training = True
    return output


@contextmanager
def _inputs_of(module: nn.Module, take: Callable[[Tensor], Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _module, args: _void(take(args[0].detach())))
    try:
        yield
    finally:
        handle.remove()


def _void(_: Any) -> None:
    """Return nothing: what a hook returns replaces its input."""
