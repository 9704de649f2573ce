"""Routers of tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers.layers import DIM, HIDDEN, Decide
from helpers.tiny import config, randomise
from timm.layers import Mlp
from torch import Tensor, nn

import vimoe
from vimoe.moe.router import TokenLayout

MANY = 4000  # tokens, where shares are estimated


def make(dense: nn.Module | None = None, **settings: object) -> vimoe.MoE:
    """A layer in training all of whose experts differ."""
    torch.manual_seed(0)
    dense = Mlp(DIM, HIDDEN) if dense is None else dense
    return randomise(vimoe.MoE(dense, config(**{"routing": "token", **settings}), TokenLayout(1, True))).train()


def routing_of(layer: vimoe.MoE, x: Tensor, seed: int = 0) -> vimoe.Routing:
    torch.manual_seed(seed)
    with vimoe.record(layer) as routings:
        layer(x)
    return routings[0]


GATES = [{}, {"gate": "choice"}, {"gate": "choice", "gate_weight": 1.0}, {"gate": "sigmoid"}]
SETTINGS = [
    {"shared": 1},
    {"shared": 0},
    {"shared": 1, "combine": "sum, normalised"},
    {"shared": 0, "combine": "sum"},
]


def softmax(scores: Tensor) -> Tensor:
    """Softmax as its definition reads."""
    return (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()


def top_k(weigh: Callable[[Tensor], Tensor] = softmax) -> Decide:
    """The decisions of the k best by score, for `helpers.reference`; `weigh` gives the router's own weights."""

    def decide(scores: list[Tensor], k: int) -> list[dict[int, Tensor]]:
        best = [sorted(range(len(row)), key=lambda i: -row[i].item())[:k] for row in scores]
        return [{i: weigh(row)[i] for i in chosen} for row, chosen in zip(scores, best, strict=True)]

    return decide
