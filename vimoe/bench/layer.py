"""Cost of an MoE layer beside dense FFNs.

Axes: B images, T tokens of an image, D channels, F hidden units, N experts, k of them for a token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from vimoe import process
from vimoe.bench.result import Benchmark, machine, peak_gemm
from vimoe.bench.step import (
    activations,
    autocast_of,
    force_routing,
    forced_experts,
    optimised,
    step_of,
    type_of_products,
    warn_if_slow,
)
from vimoe.bench.timing import Timing, compare, interleaved
from vimoe.config.bench import LayerBench
from vimoe.config.moe import STARTS, MoEConfig
from vimoe.errors import ConfigError
from vimoe.models.inference import set_backend
from vimoe.moe import MoE, ffn
from vimoe.moe.grouped_linear import BACKENDS, Backend, unfit_for_grouped_mm
from vimoe.moe.router import TokenLayout


class Beside(nn.Module):
    """Sum of separate FFNs: those that a token passes in an MoE layer."""

    def __init__(self, ffns: Sequence[nn.Module]) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(ffns)

    def forward(self, x_BTD: Tensor) -> Tensor:
        first, *others = self.ffns
        return sum((other(x_BTD) for other in others), first(x_BTD))


@dataclass(frozen=True)
class LayerCase:
    """Contestants in the shape of a layer: dense FFNs (the floor), and the MoE layer with each backend.

    Attributes:
        x: input (B, T, D).
        experts: forced experts (R, K).
        layers: contestants by name, in `x`'s type and on its device.
        floor: names of the dense contestants, which do the activated arithmetic without routing.
        macs: activated multiply-adds of one token.
        autocast: True if the layers compute under autocast.
        left_out: reason why torch cannot compute a contestant here, by name.
    """

    x: Tensor
    experts: Tensor
    layers: dict[str, nn.Module]
    floor: tuple[str, ...]
    macs: int
    autocast: bool = False
    left_out: dict[str, str] = field(default_factory=dict)


def layer_case(bench: LayerBench, moe: MoEConfig, backends: Sequence[Backend] = BACKENDS) -> LayerCase:
    """Return the contestants that `bench` asks for.

    Raises:
        ConfigError: if the MoE config has no experts.
    """
    if not moe.num_experts:
        raise ConfigError("moe.num_experts=0: expected experts to time; the dense control is in the table anyway")
    torch.manual_seed(0)
    dtype, device = getattr(torch, bench.dtype), process.device()
    dense = Mlp(bench.dim, bench.hidden).to(device, dtype)
    width = STARTS.find(moe.init)(moe).width(bench.hidden)
    passed = [ffn.read(dense)] * moe.num_shared_experts + [ffn.divide(dense, width)[0]] * moe.top_k
    beside = Beside([ffn.build(dense, weights) for weights in passed])
    floor: dict[str, nn.Module] = {"dense FFNs side by side": beside}
    if len(passed) > 1:
        hidden = moe.num_shared_experts * bench.hidden + moe.top_k * width
        floor["one dense FFN of that width"] = Mlp(bench.dim, hidden).to(device, dtype)
    rows = bench.images * (bench.tokens if moe.routing == "token" else 1)
    experts_RK = forced_experts(bench.load, rows, moe.num_experts, moe.top_k).to(device)
    x = torch.randn(bench.images, bench.tokens, bench.dim, device=device).to(dtype)
    computed = x.new_empty(0, dtype=type_of_products(bench))
    ours: dict[str, nn.Module] = {}
    left_out: dict[str, str] = {}
    for backend in backends:
        layer = MoE(copy.deepcopy(dense), moe, TokenLayout(1, True))
        weight = layer.experts.weights(0)["fc1.weight"][None]
        if backend == "grouped_mm" and (why := unfit_for_grouped_mm(computed, weight)):
            left_out[f"vimoe {backend}"] = why
            continue
        force_routing(layer, experts_RK)
        ours[f"vimoe {backend}"] = set_backend(layer, backend)
    layers, autocast = {**floor, **ours}, bench.precision != "no"
    return LayerCase(x, experts_RK, layers, tuple(floor), sum(map(ffn.macs, beside.ffns)), autocast, left_out)


def layer_seconds(case: LayerCase, training: bool, rounds: int) -> dict[str, np.ndarray]:
    """Return the seconds of each layer in each round, (rounds,) by name.

    Args:
        case: contestants; in the forward pass the MoE layer and a floor run in their optimised form too.
        training: True for forward and backward pass to all weights and x, False for the forward pass without gradient.
        rounds: number of rounds.
    """
    x = case.x.clone().requires_grad_(training)
    dy = torch.randn_like(case.x, dtype=torch.bfloat16 if case.autocast else None)
    fast = {} if training or case.autocast else optimised(case.layers, case.floor[0], "vimoe auto")
    layers = case.layers | fast
    steps = {
        name: step_of(layer, (x,), training, case.autocast, lambda y: y.backward(dy)) for name, layer in layers.items()
    }
    return interleaved(steps, rounds, what="training" if training else "forward")


def time_layers(case: LayerCase, training: bool, rounds: int) -> list[Timing]:
    """Return the timing of each layer against the floor; arguments as for `layer_seconds`."""
    seconds = layer_seconds(case, training, rounds)
    flops = 2 * case.macs * case.x.shape[:2].numel() * (3 if training else 1)
    return compare(seconds, case.floor, dict.fromkeys(seconds, flops))


def layer_memory(case: LayerCase) -> dict[str, int]:
    """Return the bytes that each layer keeps for its backward pass, its input among them."""
    # no leaf, as what a norm before the layer gives: an autocast would keep one copy of a leaf for all who read it
    x = case.x.clone().requires_grad_() * 1
    with autocast_of(case.autocast):
        return {
            name: activations(lambda layer=layer: layer.train()(x), list(layer.parameters()), case.autocast)  # type: ignore[misc]
            for name, layer in case.layers.items()
        }


def bench_layer(bench: LayerBench, moe: MoEConfig, backends: Sequence[Backend] = BACKENDS) -> Benchmark:
    """Return the result of `vimoe bench layer`; "auto" must be among the backends."""
    warn_if_slow(bench)
    case = layer_case(bench, moe, backends)
    shape = (
        f"{bench.images} x {bench.tokens} tokens, D {bench.dim}, F {bench.hidden}, N {moe.num_experts}, k {moe.top_k}"
    )
    return Benchmark(
        of=f"{shape}, {moe.num_shared_experts} shared, {moe.routing} routing, {bench.load} load, {bench.words}",
        timings={name: time_layers(case, name == "training", bench.rounds) for name in ("forward", "training")},
        bytes_kept=layer_memory(case),
        peak_gflops=peak_gemm(type_of_products(bench), case.x.device),
        machine=machine(),
        left_out=case.left_out,
    )
