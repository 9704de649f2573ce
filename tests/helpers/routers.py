"""Routers of tests."""

from __future__ import annotations

import torch
from helpers.layers import DIM, HIDDEN
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
