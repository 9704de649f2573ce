"""A model as a program of torch's own operators, for any number of images; and why it cannot become one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from vimoe.errors import SurgeryError, first_line
from vimoe.models.export.operators import PLAIN
from vimoe.models.interface import find_backbone, unwrapped
from vimoe.moe.layer import moe_layers
from vimoe.moe.packed import check_not_packed

TRACED = 2  # images of the trace; of one, torch would make a program for one image


def to_export(model: nn.Module) -> nn.Module:
    """Return a copy of a model as it is exported: on the CPU, in float32, in eval mode.

    Raises:
        VimoeError: if the model is optimised or of no known family.
    """
    model = unwrapped(model)
    check_not_packed(model)
    find_backbone(model).check_known("input_size")
    return copy.deepcopy(model).cpu().float().eval().requires_grad_(False)


def image_size(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images of an exported model; a segmenter's are its training crops.

    A ViT that takes any size gets the size of its data config: the one that it was built for, unless another is noted.
    """
    channels, height, width = find_backbone(model).data_config({})["input_size"]
    height, width = getattr(model, "crop", (height, width))
    return channels, height, width


def traced_images(model: nn.Module) -> Tensor:
    """Return images (B, channels, height, width) to trace a model with."""
    return torch.zeros(TRACED, *image_size(model))


def program_of(module: nn.Module, inputs: Tensor) -> ExportedProgram:
    """Return the program of a module with one input, whose first axis may have any size above 0.

    May raise anything: torch's tracing has no class of errors (`refusal`).
    """
    batch = {0: torch.export.Dim("images", min=1)}
    with redirect_stderr(StringIO()):  # where torch prints a graph before it raises
        program = torch.export.export(module, (inputs,), dynamic_shapes=(batch,), strict=False)
        return program.run_decompositions(dict(PLAIN))


def refusal(model: nn.Module, error: Exception, attempt: Callable[[nn.Module, Tensor], object]) -> SurgeryError:
    """Return the error for a model that cannot be exported: the first MoE layer that cannot, where it is one.

    Args:
        model: model as `to_export` gives it.
        error: error of its export.
        attempt: function that exports a module with this input; called for each MoE layer.
    """
    for name, layer in moe_layers(model).items():
        seen: list[Tensor] = []
        with layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])), torch.no_grad():
            model(traced_images(model))
        try:
            attempt(layer, seen[0])
        except Exception as own:
            kinds = f"moe.router={layer.config.router!r} and moe.experts={layer.config.experts!r}"
            ways = ", ".join(layer.densify_methods)
            remedy = f", or make the layer dense first by vimoe.densify (how={ways})" if ways else ""
            return SurgeryError(
                f"{name} with {kinds} cannot be exported: {_cause(own)}; expected kinds of vimoe's own{remedy}"
            )
    vit = type(find_backbone(model).vit).__name__
    return SurgeryError(f"{vit} cannot be exported: {_cause(error)}; expected a ViT that torch.export can trace")


def _cause(error: BaseException) -> str:
    """Return the first line of the error that began it all."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
