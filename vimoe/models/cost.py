"""Cost of a model: parameters, activated parameters and multiply-adds, counted on a copy without weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vimoe.errors import VimoeError, expect, first_line
from vimoe.models.interface import find_backbone
from vimoe.models.reading import ignoring_hooks, set_reading, tokens_read
from vimoe.moe import MoE, ffn


@dataclass(frozen=True)
class Cost:
    """Figures for one image.

    Attributes:
        params: all parameters.
        activated_params: parameters that one image or token uses: the dense part, and of each MoE layer the router, k
            experts (if their number varies, `Router.experts_per_token`) and the shared expert.
        macs: multiply-adds of matrix products and convolutions in one forward pass of one image (half of the flops of
            torch's counter; the papers' "FLOPs").
        computed_macs: multiply-adds that the model's forward computes, which are fewer where its last block leaves out
            tokens that nobody reads (`vimoe.set_reading`).
        moe_layers: names of the MoE layers.
    """

    params: int
    activated_params: int
    macs: int
    computed_macs: int
    moe_layers: tuple[str, ...]

    def __str__(self) -> str:
        layers = f", {len(self.moe_layers)} MoE layers" if self.moe_layers else ""
        computed = f" ({self.computed_macs / 1e9:.3f} G computed)" if self.computed_macs != self.macs else ""
        return (
            f"{self.params / 1e6:.2f} M parameters, {self.activated_params / 1e6:.2f} M activated, "
            f"{self.macs / 1e9:.3f} G multiply-adds{computed}{layers}"
        )


def count(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Cost:
    """Count a model as it stands; nothing is computed and no memory taken for weights.

    Args:
        model: a model of images of a known family, dense or with MoE layers, on any device.
        input_size: (channels, height, width) in pixels; by default that of the model.

    Raises:
        VimoeError: if the model is none, or does not take the size.

    >>> import timm, vimoe
    >>> print(vimoe.count(timm.create_model("test_vit", num_classes=4)))
    0.31 M parameters, 0.31 M activated, 0.038 G multiply-adds
    """
    expect("model", model, nn.Module, "build one, such as by timm.create_model")
    narrow = tokens_read(model) is not None
    model = meta_copy(model).eval().requires_grad_(False)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    params = sum(p.numel() for p in model.parameters())
    idle = sum(_idle_params(layer) for layer in layers.values())
    macs = _macs(model, layers.values(), input_size)
    computed = _macs(set_reading(model), layers.values(), input_size) if narrow else macs
    return Cost(params, params - round(idle), macs, computed, tuple(layers))


def _macs(model: nn.Module, layers: Iterable[MoE], input_size: tuple[int, int, int] | None) -> int:
    """Return the multiply-adds of a model without weights for one image."""
    routed = 0.0

    def count_instead(layer: MoE, args: tuple[Tensor]) -> None:
        nonlocal routed
        routed += _moe_macs(layer, layer.grid.tokens(args[0]).shape[1])

    images = meta_images(model, 1, input_size)
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(count_instead).remove)
        stack.enter_context(ignoring_hooks())
        stack.enter_context(torch.no_grad())
        counter = stack.enter_context(FlopCounterMode(display=False))
        try:
            find_backbone(model).run(images)
        except VimoeError:
            raise
        except Exception as error:  # whatever a model raises for images that it does not take
            if input_size is None:
                size = tuple(images.shape[1:])
                raise VimoeError(
                    f"the model does not run on images of shape {size} alone: {first_line(error)}; use one that does, "
                    f"such as its image encoder"
                ) from error
            raise VimoeError(
                f"input_size={input_size}: the model does not take it ({first_line(error)}); expected such as "
                f"{find_backbone(model).input_size}"
            ) from error
    return counter.get_total_flops() // 2 + round(routed)


def meta_images(model: nn.Module, number: int, input_size: tuple[int, int, int] | None = None) -> Tensor:
    """Return images of the model's size and type for a copy without weights."""
    dtype = next(model.parameters()).dtype
    sides = input_size if isinstance(input_size, (tuple, list, torch.Size)) else ()
    if input_size is not None and (len(sides) != 3 or not all(isinstance(n, int) and n > 0 for n in sides)):
        raise VimoeError(
            f"input_size={input_size}: expected (channels, height, width), such as {find_backbone(model).input_size}"
        )
    return torch.empty(number, *(input_size or find_backbone(model).input_size), device="meta", dtype=dtype)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy with shapes and no weights, made without copying the weights first.

    Routing depends on weights and data, so its MoE layers compute their shared expert alone, or nothing. Hooks are left
    out: they are the user's, and may not expect tensors without values.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if isinstance(module, MoE):
            module.forward = _alone(module)  # type: ignore[method-assign, assignment]
    return copied


def _alone(layer: MoE) -> Callable[[Tensor], Tensor]:
    """Return a forward that computes the layer's shared expert alone, or nothing."""
    shared, grid = layer.shared, layer.grid
    return torch.empty_like if shared is None else lambda x: grid.placed(shared(grid.tokens(x)), x.shape)


def _moe_macs(layer: MoE, tokens: int) -> float:
    """Return the multiply-adds of the router and the routed experts for one image."""
    decisions = 1 if layer.config.routing == "image" else tokens
    shared = 0 if layer.shared is None else ffn.macs(layer.shared)
    return decisions * layer.router.macs + layer.router.compute_macs(tokens, layer.experts, shared)


def _idle_params(layer: MoE) -> float:
    """Return the number of parameters of the experts that one image or token does not use."""
    all_of_them = sum(p.numel() for p in layer.experts.parameters())
    return all_of_them - layer.experts.activated_params(layer.router.experts_per_token)
