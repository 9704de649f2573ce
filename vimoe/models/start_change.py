"""Change of a model at its start: how far new layers take the last block's output, before any training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.errors import DataError
from vimoe.models.calibration import Batches, pairs
from vimoe.models.interface import find_backbone

IMAGES = 8  # of standard normal values, where none are given


@dataclass(frozen=True)
class StartChange:
    """Root mean square of the change of the last block's output, relative to that of the output itself.

    Attributes:
        change: the ratio; None if it was not measured.
        note: images that it was measured on, or the reason why it was not measured.
    """

    change: float | None
    note: str

    def __str__(self) -> str:
        if self.change is None:
            return f"the change of the last block's output was not measured: {self.note}"
        return f"the last block's output changes by {self.change:.2%} (root mean square, {self.note})"


def measure_start(model: nn.Module, convert: Callable[[nn.Module], Any], images: Batches | None) -> StartChange:
    """Convert a copy of a model, and measure what that changes. The model and the state of random numbers stay.

    Args:
        model: dense model with weights.
        convert: function that converts a model in place; it may draw random numbers, from a fixed seed.
        images: batches of (images, labels), of which the first is used; None for 8 standard normal images.

    Raises:
        DataError: if there are none.
    """
    backbone = find_backbone(model)
    if not backbone.blocks:
        return StartChange(None, "it is not known which block comes last")
    weight = next(model.parameters())
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the conversion of the model itself warns
        torch.default_generator.manual_seed(0)  # torch.manual_seed would change those of all other devices
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(0)
        kind = " of standard normal values" if images is None else ""
        if images is None:
            images = [(torch.randn(IMAGES, *backbone.input_size), None)]
        first = next(pairs(images, backbone), None)
        if first is None:
            raise DataError("no images to measure a start on: expected some; leave images out")
        x = first[0].to(weight.device, weight.dtype)
        copied = copy.deepcopy(model).eval()
        before = _last_output(copied, x)
        convert(copied)
        change = (_last_output(copied, x) - before).square().mean().sqrt() / before.square().mean().sqrt()
    return StartChange(change.item(), f"{len(x)} images{kind}")


@torch.no_grad()
def _last_output(model: nn.Module, images: Tensor) -> Tensor:
    """Return the output of the last block, float32 at least."""
    found: list[Tensor] = []
    backbone = find_backbone(model)
    block = model.get_submodule(backbone.blocks[-1])
    handle = block.register_forward_hook(lambda _module, _args, output: found.append(backbone.tokens_of(output)))
    try:
        backbone.run(images)
    finally:
        handle.remove()
    return found[0].to(torch.promote_types(found[0].dtype, torch.float32))
