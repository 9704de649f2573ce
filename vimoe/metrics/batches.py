"""Batches of a loader, checked, and on the model's device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.errors import DataError
from vimoe.models.interface import find_backbone, logits_of, unwrapped
from vimoe.terminal import track

Batches = Iterable[tuple[Tensor, Tensor]]


def forwards(model: nn.Module, loader: Batches, task: str = "") -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, labels) of each batch, in eval mode, without gradient, on the model's device and in its type.

    Args:
        model: a classifier.
        loader: batches of (images, labels).
        task: what to call this where it is shown how far it is (`vimoe.terminal`); not shown without it.
    """
    for images, labels in batches_of(model, loader, task):
        with torch.no_grad():
            yield logits_of(model, images), labels


def batches_of(model: nn.Module, loader: Batches, task: str = "") -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of each batch on the model's device and in its type, the model in eval mode; as `forwards`."""
    if isinstance(loader, Tensor) or not hasattr(loader, "__iter__"):
        raise DataError(f"the loader is of type {type(loader).__name__}: expected batches of (images, labels)")
    model.eval()
    weight = next(model.parameters())
    for batch in track(loader, task):
        images, labels = _pair(model, batch)
        if not len(images):
            continue
        yield images.to(weight.device, weight.dtype, non_blocking=True), labels.to(weight.device, torch.int64)


def _pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a batch. Raises DataError for what is none that the model takes."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else "")
        raise DataError(f"the loader gives {what}: expected pairs (images, labels); wrap it in one that gives these")
    for name, part in zip(("images", "labels"), batch, strict=True):
        if not isinstance(part, Tensor):
            raise DataError(f"the loader gives {name} of type {type(part).__name__}: expected a tensor; convert it")
    images, labels = batch
    if labels.is_floating_point() or labels.ndim not in (1, 3) or len(labels) != len(images):
        raise DataError(
            f"the loader gives labels of {labels.dtype} and shape {tuple(labels.shape)} for {len(images)} images: "
            f"expected whole numbers of shape ({len(images)},), or masks (images, height, width)"
        )
    backbone = find_backbone(unwrapped(model))
    if backbone.path or backbone.family is None:  # a segmenter, the rest of a model on features, or no ViT
        return images, labels
    channels, size = backbone.input_size[0], backbone.fixed_size
    if images.ndim != 4 or images.shape[1] != channels or labels.ndim != 1:
        raise DataError(
            f"the loader gives images of shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)}: "
            f"expected (images, {channels}, height, width) and (images,)"
        )
    if size is not None and images.shape[-2:] != size:
        raise DataError(
            f"the loader gives images of {tuple(images.shape[-2:])}: expected {size}, the model's "
            f"size; resize them, or build the model with img_size={images.shape[-1]}"
        )
    return images, labels
