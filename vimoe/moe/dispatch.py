"""Two verbs: `dispatch` sorts what is routed by expert, `combine` brings the experts' outputs home.

Axes: B images, T tokens of an image, D channels, R routed units, K chosen experts, U tokens of a unit (T when whole
images are routed, 1 when tokens are), M = R * K * U rows sorted by expert. No unit is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimoe.moe.routing import Routing


def dispatch(x_BTD: Tensor, routing: Routing) -> tuple[Tensor, list[int], Tensor]:
    """Copies each unit to its experts.

    Returns:
        The rows (M, D) sorted by expert; how many rows each expert has; and the permutation for `combine`.
    """
    units, chosen = routing.experts.shape
    x_RUD = x_BTD.reshape(units, routing.tokens_per_unit, x_BTD.shape[-1])
    order = routing.experts.flatten().argsort(stable=True)
    counts: list[int] = (routing.load * routing.tokens_per_unit).tolist()
    return x_RUD[order // chosen].flatten(0, 1), counts, order


def combine(y_MD: Tensor, routing: Routing, order: Tensor) -> Tensor:
    """The sum of each unit's expert outputs, weighted by the gates: (B, T, D), in float32 at least as the gates are."""
    images, tokens = routing.batch
    units, chosen = routing.gates.shape
    dim = y_MD.shape[-1]
    home = torch.empty_like(order)
    home[order] = torch.arange(len(order), device=order.device)
    y_RKUD = y_MD.view(-1, routing.tokens_per_unit, dim)[home].view(units, chosen, routing.tokens_per_unit, dim)
    return (routing.gates.view(units, chosen, 1, 1) * y_RKUD).sum(dim=1).view(images, tokens, dim)
