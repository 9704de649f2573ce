"""MoE layers whose experts are with two processes, beside the same layers in one: work of a process of a job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from helpers.layers import DIM, TOKENS, make
from helpers.parallel_work import full
from helpers.tiny import perturb_experts
from torch import Tensor, nn

import vimoe
from vimoe.config.moe import EXPERTS
from vimoe.config.parallel import ParallelConfig
from vimoe.moe.experts import Experts
from vimoe.moe.stacked_ffns import StackedFFNs
from vimoe.parallel.mesh import make_mesh
from vimoe.parallel.parallelize import parallelize


class Looped(StackedFFNs):
    """Experts with the inherited forward, the loop over `weights`."""

    forward = Experts.forward


EXPERTS.setdefault("looped", Looped)
UNEVEN, NONE = (3, 1), (2, 0)  # images of each process
AWAY = -1e9


def biased(*bias: float) -> Callable[[vimoe.MoE], None]:
    """Let a bias on the choice decide which experts are idle."""
    return lambda layer: layer.router.choice_bias.copy_(torch.tensor(bias))


# name: images of each process, settings of `helpers.layers.make`, change of the layer
CASES: dict[str, tuple[tuple[int, int], dict[str, Any], Callable[[vimoe.MoE], None] | None]] = {
    "tokens, two of four": ((2, 2), {"k": 2}, None),
    "tokens, one of four": (UNEVEN, {"k": 1}, None),
    "images": (UNEVEN, {"layout": "image by class token", "k": 1}, None),
    "images, two of four, no shared": ((2, 2), {"layout": "image by mean", "combine": "sum", "shared": 0}, None),
    "gated, with a norm": (UNEVEN, {"ffn": "swiglu, norm"}, None),
    "an idle expert": (UNEVEN, {"bias_update_rate": 0.1, "k": 1}, biased(0, AWAY, 0, 0)),
    "a process that gets nothing": (UNEVEN, {"bias_update_rate": 0.1, "k": 2}, biased(0, 0, AWAY, AWAY)),
    "a process without images": (NONE, {"k": 2}, None),
    "a process without images gets nothing": (NONE, {"bias_update_rate": 0.1}, biased(0, 0, AWAY, AWAY)),
    "experts choose": ((2, 2), {"router": "expert_choice", "k": 1}, None),
    "soft": (UNEVEN, {"router": "soft", "slots_per_expert": 2}, None),
    "cosine": (UNEVEN, {"router": "cosine"}, None),
    "sigmoid gates, all experts compute": ((2, 2), {"gate": "sigmoid", "router_gradient": "dense", "k": 1}, None),
    "lora": (UNEVEN, {"experts": "lora", "rank": 3}, None),
    "delta": (UNEVEN, {"experts": "delta", "delta_density": 0.2}, None),
    "adapter": (UNEVEN, {"experts": "adapter", "rank": 3}, None),
    "no forward of its own": (NONE, {"experts": "looped", "bias_update_rate": 0.1}, biased(0, 0, AWAY, AWAY)),
}


class Model(nn.Module):
    """A layer in a model: FSDP warns of a module whose output is a view."""

    def __init__(self, layer: vimoe.MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def model(case: str) -> Model:
    _, settings, change = CASES[case]
    made = perturb_experts(make(**settings)).double().train()
    if change is not None:
        change(made)
    return Model(made)


def inputs(images: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, TOKENS, DIM, generator=generator, dtype=torch.float64).requires_grad_() for n in images]


def loss(y: Tensor) -> Tensor:
    weights = torch.arange(y.numel(), dtype=y.dtype).cos().view_as(y)
    return (weights * y).sum()


def alone(case: str) -> dict[str, Tensor]:
    """Outputs, and gradients of the mean of the processes' losses."""
    made, parts = model(case), inputs(CASES[case][0])
    outputs = [made(x) for x in parts]
    torch.stack([loss(y) for y in outputs]).mean().backward()
    seen = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    seen |= {f"input {i}": x.grad for i, x in enumerate(parts)}
    return seen | {name: full(p.grad) for name, p in made.named_parameters() if p.grad is not None}


def together(case: str) -> dict[str, Tensor]:
    """The same by two processes, each of which returns its own output and gradient of its input."""
    rank = dist.get_rank()
    made, x = model(case), inputs(CASES[case][0])[rank]
    parallelize(made, make_mesh(ParallelConfig(expert=2)))
    y = made(x)
    loss(y).backward()
    seen = {f"output {rank}": y.detach(), f"input {rank}": x.grad / 2}  # of its own loss
    return seen | {name: full(p.grad) for name, p in made.named_parameters() if p.grad is not None}


def all_cases() -> dict[str, dict[str, Tensor]]:
    return {case: together(case) for case in CASES}
