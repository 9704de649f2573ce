"""Computation of a model made faster, with the same results: backends of experts, and inference."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from torch import nn

from vimoe.errors import ConfigError, nearest
from vimoe.models.precision import warn_of_slow_bfloat16
from vimoe.models.timm_narrow import NarrowAttention
from vimoe.moe.ffn import has_hooks
from vimoe.moe.grouped_linear import BACKENDS, Backend
from vimoe.moe.layer import moe_layers
from vimoe.moe.packed import OPTIMIZED, PackedExperts, PackedLinear, can_pack, check_not_packed

Model = TypeVar("Model", bound=nn.Module)


_CALL_LINEARS = (Mlp, GluMlp, SwiGLU, Attention, NarrowAttention)  # others may read the weights of their linear maps


def set_backend(model: Model, backend: Backend) -> Model:
    """Choose the backend of the experts' products, in place, and return the model. It is not saved with it.

    Args:
        model: a model with MoE layers, or one such layer.
        backend: "auto" (by device and type, `vimoe.moe.grouped_linear.choose`), "loop", "grouped_mm"
            or "bmm" (padded to the largest load). `vimoe bench layer` shows what each costs.

    Raises:
        ConfigError: if there is no such backend.
        VimoeError: if the model is optimised.

    >>> import timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> vimoe.set_backend(model, "loop")(torch.randn(2, 3, 160, 160)).shape
    torch.Size([2, 1000])
    """
    check_not_packed(model)
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r}: {nearest(backend, BACKENDS)}")
    for layer in moe_layers(model).values():
        layer.experts.backend = backend
    return model


def optimize(model: nn.Module, dtype: torch.dtype | None = None, compile: bool = False) -> nn.Module:
    """Make a model, dense or with MoE layers, fast for inference, in place; it can then only be run.

    On a CPU, matrices of FFNs, experts and attention are stored once in the layout that products read, and activations
    are fused into the product before them. Parts with forward hooks are left alone, and so are experts that are no FFNs
    or whose weights the router reads (`Router.reads_weights`).
    Routers keep their float32 weights: in another type, too, only the tokens are rounded before the choice.

    Args:
        model: a model, best in the state that `vimoe.load` gives it.
        dtype: type of weights and tokens, such as torch.bfloat16; inputs are cast. By default the model's own.
        compile: use torch.compile, which then does the work of packing. It needs a C++ compiler on a CPU.

    Returns:
        The model, with `compile` inside of torch.compile's module.

    Raises:
        ConfigError: if the dtype is no floating point type.
        VimoeError: if the model is optimised already.

    >>> import timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with torch.inference_mode():
    ...     vimoe.optimize(model.eval())(torch.randn(2, 3, 160, 160)).shape
    torch.Size([2, 1000])
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype {dtype!r}: expected a floating point type, such as torch.bfloat16")
    check_not_packed(model)
    if dtype == torch.bfloat16:
        warn_of_slow_bfloat16("vimoe.optimize to torch.bfloat16", "leave dtype out")
    model.eval().requires_grad_(False)
    setattr(model, OPTIMIZED, True)
    if dtype is not None:
        _cast(model, dtype)
    if compile:
        return torch.compile(model)  # type: ignore[return-value]
    _pack(model)
    return model


def _pack(model: nn.Module) -> None:
    read = set[nn.Module]()  # by experts that stay as they are
    for layer in moe_layers(model).values():
        experts, packs = layer.experts, layer.experts.are_ffns and not layer.router.reads_weights
        if packs and can_pack(experts.weights(0)["fc1.weight"]) and not has_hooks(experts):
            layer.experts = PackedExperts(experts)  # type: ignore[assignment]
        else:
            read.update(experts.reads)
    for module in model.modules():
        if module in read:
            continue
        linears = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
        if type(module) not in _CALL_LINEARS or not all(can_pack(linear.weight) for linear in linears.values()):
            continue
        if any(has_hooks(child) for child in module.children()):
            continue
        acts: dict[str, nn.Module] = {}
        if isinstance(module, Mlp) and "fc1" in linears:
            acts["fc1"], module.act = module.act, nn.Identity()
        for name, linear in linears.items():
            setattr(module, name, PackedLinear(linear.weight, linear.bias, acts.get(name)))


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    routers = {layer: layer.router for layer in moe_layers(model).values()}
    for layer in routers:
        layer.router = nn.Identity()  # type: ignore[assignment]
    model.to(dtype)
    for layer, router in routers.items():
        layer.router = router

    def cast(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(as_type, args)), {name: as_type(value) for name, value in kwargs.items()}

    def as_type(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    model.register_forward_pre_hook(cast, with_kwargs=True)
