"""Capacity of experts: the most tokens of an image that each of them takes, those with the largest gates first.

Axes: B images, T tokens of an image, R = B * T rows, N experts, K slots of a row, S = K * T slots of an image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vimoe.moe.routing import Routing

_ROUNDING = 1e-6  # of the even share of an expert, whose terms 1/N are summed


def within_capacity(routing: Routing, factor: float) -> Tensor:
    """Return (R, N) bool, True for the chosen experts that have room for the row.

    An expert has room for ceil(C K T / N) tokens of an image: C times its share if tokens chose evenly. Where scores of
    -inf rule experts out, a token's share goes to the others, so that a pool of n experts for t of the tokens has room
    for ceil(C K t / n) at each. Experts take first choices before second ones; among these come first the tokens whose
    largest gate is larger: batch-prioritized routing (V-MoE, arXiv 2106.05974, algorithm 1).

    It departs from V-MoE in the pool of tokens: there they are those of a batch, here those of an image, so that an
    image's output depends on it alone. V-MoE also rounds capacities up to multiples of 4.

    Args:
        routing: decisions of which all slots are filled, with the router's own weights for gates.
        factor: C.
    """
    images, tokens = routing.batch
    n, k = routing.num_experts, routing.experts.shape[1]
    allowed_BTN = (routing.logits > -torch.inf).view(images, tokens, n).double()  # 1/3 in float32 is too inexact
    even_BN = (allowed_BTN / allowed_BTN.sum(dim=2, keepdim=True)).sum(dim=1)
    capacity_BN = (factor * k * even_BN - _ROUNDING).ceil()
    order_BT = routing.gates.detach().amax(dim=1).view(images, tokens).argsort(dim=1, descending=True, stable=True)
    experts_BTK = routing.experts.view(images, tokens, k)
    sorted_BTK = experts_BTK.gather(1, order_BT[..., None].expand_as(experts_BTK))
    chosen_BSN = F.one_hot(sorted_BTK.transpose(1, 2).reshape(images, k * tokens), n)  # all first choices, then second
    taken_BSN = chosen_BSN * (chosen_BSN.cumsum(dim=1) <= capacity_BN[:, None])
    taken_BTN = taken_BSN.view(images, k, tokens, n).sum(dim=1)
    back_BTN = order_BT[..., None].expand_as(taken_BTN)
    return torch.zeros_like(taken_BTN).scatter(1, back_BTN, taken_BTN).view(images * tokens, n).bool()
