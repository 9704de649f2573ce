"""Calibration: what a dense model computes for some training images at each FFN that will become a mixture.

Starts of experts and routers that are given (`moe.init`, `moe.router`) read it. Axes: B images of a batch, T tokens of
an image, D channels, R rows (images, or some of their tokens).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.errors import DataError, SurgeryError, counted, expect
from vimoe.models.interface import Backbone, find_backbone
from vimoe.models.reading import tokens_read
from vimoe.moe.grid import Grid
from vimoe.moe.router import Router
from vimoe.moe.start import Calibration

TOKENS_OF_AN_IMAGE = 16  # that are kept with token routing: neighbouring tokens are alike

Batches = Iterable[tuple[Tensor, Any]]  # (images, labels), the same each time

logger = logging.getLogger(__name__)


def calibrate(model: nn.Module, routers: Mapping[str, Router], images: Batches) -> dict[str, Calibration]:
    """Run the dense model over images, and return what each new layer has to know of them, by the FFN's name.

    Args:
        model: the dense model; its mode stays.
        routers: router of each new layer, by the name of the FFN that the layer will replace.
        images: batches of (images, labels), the same in the same order each time.

    Raises:
        SurgeryError: if a router needs classes of images, and the labels are none.
        DataError: if the batches are no pairs of tensors, can be read once only, or hold fewer images than a layer has
            experts; or if a label is no class of the model.
    """
    if isinstance(images, Iterator):
        raise DataError(f"images={type(images).__name__}, which is read once: expected a list of batches, or a loader")
    backbone, read = find_backbone(model), tokens_read(model)
    pooled, labels = list[Tensor](), list[Tensor]()
    features: dict[str, list[Tensor]] = {name: [] for name in routers}
    rows: dict[str, list[Tensor]] = {name: [] for name in routers}
    seen, classed = 0, False
    with ExitStack() as stack:
        for name, router in routers.items():
            last = (backbone.block_of(name),) == backbone.blocks[-1:]
            routed = read if last and not router.needs_patches else None

            def keep(x: Tensor, name: str = name, router: Router = router, routed: int | None = routed) -> None:
                image, kept = _features(router, x[:, :routed], seen)
                rows[name].append(image + seen)
                features[name].append(kept)

            stack.enter_context(_tokens_of(model.get_submodule(name), keep))
        for classifier in backbone.classifiers[:1]:  # a segmenter does not call it
            stack.enter_context(_inputs_of(classifier, lambda x: pooled.append(_copy(x))))
        for batch, targets in pairs(images, backbone):
            label_B = _classes(targets)
            classed = label_B is not None
            _check_labels(label_B, len(batch), backbone.num_classes, routers)
            labels += [] if label_B is None else [label_B.long()]
            _run(model, batch)
            seen += len(batch)
    check_count(seen, max(router.config.num_experts for router in routers.values()))
    logger.info("%d training images: what the routers or experts of %d layers start from", seen, len(routers))
    label_I = torch.cat(labels) if classed else None

    def inputs(name: str) -> Callable[[], Iterator[Tensor]]:
        return lambda: _again(model, name, images)

    return {
        name: Calibration(
            features=torch.cat(features[name]),
            image=torch.cat(rows[name]),
            labels=label_I,
            pooled=torch.cat(pooled) if pooled else None,
            num_classes=backbone.num_classes,
            inputs=inputs(name),
        )
        for name in routers
    }


def _classes(targets: Any) -> Tensor | None:
    """Return the class (B,) of each image; None for other targets, such as masks, which would fill the memory."""
    try:
        label_B = torch.as_tensor(targets).cpu()
    except (RuntimeError, TypeError, ValueError):  # None, names, values by name: nothing that a tensor holds
        return None
    return label_B if label_B.ndim == 1 and not label_B.is_floating_point() else None


def _check_labels(label_B: Tensor | None, images: int, classes: int, routers: Mapping[str, Router]) -> None:
    """Raise an error for labels, None if they are no classes of images, that do not fit the model or a router."""
    taught = next((router.config.router for router in routers.values() if router.supervised), None)
    if taught and (label_B is None or not classes):
        raise no_classes(taught)
    if label_B is not None and len(label_B) != images:
        raise DataError(
            f"{counted(len(label_B), 'label')} for a batch of {counted(images, 'image')}: "
            f"expected one for each; correct them"
        )
    if label_B is not None and images and classes and not (label_B.min() >= 0 and label_B.max() < classes):
        raise DataError(
            f"labels from {label_B.min()} to {label_B.max()} for a model of {classes} classes: expected 0 to "
            f"{classes - 1}; build the model with num_classes"
        )


def check_count(images: int, experts: int) -> None:
    """Raise DataError if there are fewer images than experts to start from them."""
    if images < experts:
        raise DataError(
            f"{counted(images, 'image')} to start {experts} experts or their router from: "
            f"expected at least as many images as "
            f"experts; raise moe.calibration_images, give more images, or lower moe.num_experts"
        )


def no_classes(router: str) -> SurgeryError:
    """Return the error for a router that is taught by classes of images, where images have none."""
    return SurgeryError(
        f"router={router!r} without a class for each image: expected a classification; use router='centroids'"
    )


def _features(router: Router, x_BTD: Tensor, seen: int) -> tuple[Tensor, Tensor]:
    """Return the number (R,) in the batch of the image of each row, and (R, D) what the router reads of it."""
    images, tokens = x_BTD.shape[:2]
    if router.config.routing == "image":
        return torch.arange(images), _copy(router.feature(x_BTD))
    kept = min(tokens, TOKENS_OF_AN_IMAGE)
    random = torch.rand(images, tokens, generator=torch.Generator().manual_seed(seen))
    chosen_BK = random.topk(kept).indices.to(x_BTD.device)
    rows = x_BTD.gather(1, chosen_BK[..., None].expand(-1, -1, x_BTD.shape[2])).flatten(0, 1)
    return torch.arange(images).repeat_interleave(kept), _copy(rows)


def _copy(x: Tensor) -> Tensor:
    """Return a copy, because a view of a few tokens would keep all of them in memory."""
    return x.to("cpu", torch.float32, copy=True)


def _again(model: nn.Module, name: str, images: Batches) -> Iterator[Tensor]:
    """Yield the input (B, T, D) of an FFN for each batch."""
    found: list[Tensor] = []
    with _tokens_of(model.get_submodule(name), found.append):
        for batch, _ in pairs(images, find_backbone(model)):
            _run(model, batch)
            yield found.pop()


def pairs(images: Batches, backbone: Backbone) -> Iterator[tuple[Tensor, Any]]:
    """Yield the batches. Raises DataError for one that is no pair of images, as the model takes them, and labels."""
    for pair in images:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DataError(f"images have a batch of type {type(pair).__name__}: expected (images, labels)")
        expect("images", pair[0], Tensor, "give batches of (images, labels)")
        if backbone.has_images and pair[0].ndim != 4:
            raise DataError(
                f"images have a batch of shape {tuple(pair[0].shape)}: expected (images, channels, height, width); "
                f"give batches of (images, labels)"
            )
        yield pair[0], pair[1]


@torch.no_grad()
def _run(model: nn.Module, images: Tensor) -> None:
    weight, training = next(model.parameters()), [module for module in model.modules() if module.training]
    try:
        find_backbone(model.eval()).run(images.to(weight.device, weight.dtype))
    finally:
        for module in training:
            module.training = True


def _tokens_of(dense: nn.Module, take: Callable[[Tensor], Any]) -> AbstractContextManager[None]:
    """Take the input (B, T, D) of an FFN."""
    grid = Grid.of(dense)
    return _inputs_of(dense, lambda x: take(grid.tokens(x)))


@contextmanager
def _inputs_of(module: nn.Module, take: Callable[[Tensor], Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _module, args: _void(take(args[0].detach())))
    try:
        yield
    finally:
        handle.remove()


def _void(_: Any) -> None:
    """Return nothing: what a hook returns replaces its input."""
