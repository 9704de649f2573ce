"""Forward and training steps of a module: what is timed, in which types, and the memory that it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vimoe import process
from vimoe.config.bench import ModelBench
from vimoe.errors import ConfigError
from vimoe.models.inference import optimize
from vimoe.models.precision import warn_of_slow_bfloat16
from vimoe.moe import MoE
from vimoe.moe.routing import Routing


def step_of(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    training: bool,
    autocast: bool,
    backward: Callable[[Tensor], None],
) -> Callable[[], None]:
    """Return a function that runs a module once, to be timed.

    Args:
        module: module to run; put into training or evaluation mode here.
        inputs: arguments of its forward.
        training: True for forward and backward pass, False for the forward pass without gradient.
        autocast: True to compute under autocast to bfloat16.
        backward: function that runs the backward pass from the module's output.
    """

    def forward() -> None:
        with torch.no_grad(), autocast_of(autocast):  # no inference mode: what a layer keeps could not be trained then
            module(*inputs)

    def step() -> None:
        for tensor in (*inputs, *module.parameters()):
            tensor.grad = None
        with autocast_of(autocast):
            result = module(*inputs)
        backward(result)

    module.train(training)
    return step if training else forward


def autocast_of(autocast: bool) -> torch.autocast:
    """Return autocast to bfloat16 on this process's device, switched on or off."""
    return torch.autocast(process.device().type, torch.bfloat16, enabled=autocast)


def activations(compute: Callable[[], Tensor], without: list[Tensor], casts: bool = False) -> int:
    """Return the number of bytes that a forward pass keeps for the backward pass, each storage once.

    Args:
        compute: forward pass; returns its output.
        without: tensors that do not count, such as weights.
        casts: True to leave out tensors of the same shapes too: an autocast keeps its copies of weights.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    shapes = {tuple(sorted(tensor.shape)) for tensor in without} if casts else set()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tuple(sorted(tensor.shape)) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()  # held, so that no storage is freed and its address used again
    del result
    return sum(kept.values())


def optimised(modules: Mapping[str, nn.Module], *names: str) -> dict[str, nn.Module]:
    """Return copies of the named modules after `vimoe.optimize`, by name."""
    return {f"{name}, optimised": optimize(copy.deepcopy(modules[name])) for name in names}


def forced_experts(load: Literal["balanced", "zipf"], rows: int, num_experts: int, top_k: int) -> Tensor:
    """Return (R, K) experts for R images or tokens.

    Args:
        load: "balanced" for equal loads, "zipf" for expert i with 1 / (i + 1) of the load of expert 0.
        rows: number R of images or tokens.
        num_experts: number of experts to choose from.
        top_k: number K of experts for each.
    """
    draw = np.random.default_rng(0)
    if load == "balanced":
        first = draw.permutation(np.arange(rows) % num_experts)
        return torch.from_numpy((first[:, None] + np.arange(top_k)) % num_experts)
    shares = 1 / np.arange(1, num_experts + 1)
    return torch.from_numpy(
        np.stack([draw.choice(num_experts, top_k, replace=False, p=shares / shares.sum()) for _ in range(rows)])
    )


def force_routing(layer: MoE, experts_RK: Tensor) -> None:
    """Force a layer to use these experts. The gates stay those of the router's own choice, so the cost is unchanged.

    Raises:
        ConfigError: if its router sends no rows to experts.
    """
    if layer.router.mixes:
        raise ConfigError(
            f"moe.router={layer.router.config.router!r}: expected a router that sends tokens to experts, because the "
            f"benchmark forces a load on them; leave it out"
        )

    def overrule(router: nn.Module, args: Any, routing: Routing) -> Routing:
        return replace(routing, experts=experts_RK)

    layer.router.register_forward_hook(overrule)


def warn_if_slow(bench: ModelBench) -> None:
    """Log a warning where this machine emulates the bfloat16 that a benchmark asks for."""
    if type_of_products(bench) == torch.bfloat16:
        setting = "bench.precision=bf16" if bench.precision == "bf16" else "bench.dtype=bfloat16"
        warn_of_slow_bfloat16(setting, "leave it out to time float32")


def type_of_products(bench: ModelBench) -> torch.dtype:
    """Return the type in which matrix products are computed."""
    dtype: torch.dtype = getattr(torch, bench.dtype) if bench.precision == "no" else torch.bfloat16
    return dtype
