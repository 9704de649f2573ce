"""Orthogonal outputs of the experts of a token (`moe.orthogonal`): Gram-Schmidt over their changes.

The experts change one shared expert S. With E_1, ..., E_K the experts of a token x in the order of falling gates, each
E_k(x) becomes S(x) + w_k, where

    d_k = E_k(x) - S(x)        w_k = d_k - sum over j < k of (d_k . w_j) / (w_j . w_j + EPSILON) w_j

So the first expert's output stays as it is, and changes of zero stay zero and have finite gradients: experts that start
as the dense FFN keep its function. "normalized" puts w_k / sqrt(w_k . w_k + EPSILON) in the place of w_k.

The idea is that of OMoE (Feng et al., arXiv 2501.10062), whose full text was not at hand: Gram-Schmidt over the outputs
of the experts of a token, without a loss. The formula is that of MOORE (Hendawy et al., arXiv 2311.11385), which is
"normalized" without the epsilons, over whole outputs of experts in the order of their indices.

Axes: R rows that are routed (images or tokens), K slots of a row, U tokens of a row, S filled slots in the order of
their experts, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vimoe.config.moe import MoEConfig
from vimoe.errors import ConfigError
from vimoe.moe.experts import Experts
from vimoe.moe.routing import Routing

EPSILON = 1e-12  # about the square of what rounding in float32 leaves of a difference of outputs


def check(config: MoEConfig, experts: Experts, shared: nn.Module | None) -> None:
    """Raise ConfigError if outputs are to be orthogonal, and these experts do not change the shared expert."""
    if config.orthogonal != "none" and not any(module is shared for module in experts.reads):
        raise ConfigError(
            f"orthogonal={config.orthogonal!r} with experts={config.experts!r}: expected experts that change the "
            f"shared expert, such as 'lora'; leave it out"
        )


def orthogonal_outputs(y_SUD: Tensor, shared_RUD: Tensor, routing: Routing, config: MoEConfig) -> Tensor:
    """(S, U, D) to the same: the outputs of the experts, made orthogonal.

    Args:
        y_SUD: outputs of the experts.
        shared_RUD: output of the shared expert.
        routing: decisions, with the slots of a row in any order.
        config: settings of the layer.
    """
    ordered = routing.by_gate
    slots_RKUD = orthogonal_slots(ordered.by_slot(y_SUD), shared_RUD, ordered, config)
    return slots_RKUD.flatten(0, 1).index_select(0, ordered.places(y_SUD.shape[0]))


def orthogonal_slots(y_RKUD: Tensor, shared_RUD: Tensor, ordered: Routing, config: MoEConfig) -> Tensor:
    """(R, K, U, D) to the same: the outputs of the experts in their slots, made orthogonal; in float32 at least.

    Args:
        y_RKUD: outputs of the experts; anything where a slot is empty.
        shared_RUD: output of the shared expert.
        ordered: decisions, with the slots of a row by falling gate (`Routing.by_gate`).
        config: settings of the layer.
    """
    precise = torch.promote_types(y_RKUD.dtype, torch.float32)
    filled_RK = (ordered.experts >= 0)[..., None, None]
    base_RUD = shared_RUD.to(precise)
    found: list[Tensor] = []
    for change_RUD in ((y_RKUD.to(precise) - base_RUD[:, None]) * filled_RK).unbind(dim=1):
        for other_RUD in found:
            change_RUD = change_RUD - _dot(change_RUD, other_RUD) / (_dot(other_RUD, other_RUD) + EPSILON) * other_RUD
        found.append(change_RUD)
    if config.orthogonal == "normalized":
        found = [change_RUD / (_dot(change_RUD, change_RUD) + EPSILON).sqrt() for change_RUD in found]
    return torch.stack([base_RUD + change_RUD for change_RUD in found], dim=1).to(y_RKUD.dtype)


def _dot(a_RUD: Tensor, b_RUD: Tensor) -> Tensor:
    """(R, U, D) and the same to (R, U, 1)."""
    return (a_RUD * b_RUD).sum(dim=-1, keepdim=True)
