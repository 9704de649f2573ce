"""The losses that follow from the routings of a step, weighted by the settings of their names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vimoe.config.train import TrainConfig
from vimoe.moe import MoE, Routing
from vimoe.moe.losses import (
    balance_loss,
    entropy_loss,
    importance_loss,
    mutual_loss,
    orthogonal_loss,
    router_z_loss,
    variance_loss,
)
from vimoe.process import Process

LOSSES = {  # of records, by the setting that is the weight
    "z_loss": router_z_loss,
    "importance_loss": importance_loss,
    "entropy_loss": entropy_loss,
    "variance_loss": variance_loss,
    "orthogonal_loss": orthogonal_loss,
    "mutual_loss": mutual_loss,
}
OF_BATCH = (balance_loss, importance_loss, variance_loss)  # of a mean over the rows, so that all of the batch matters


def auxiliary_losses(
    routings: list[Routing], config: TrainConfig, taught: Tensor | None = None, over: Process | None = None
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """Return the weighted sum of the routers' losses, and each by name; the balance loss is always among them.

    Args:
        routings: decisions of a step.
        config: weights of the losses.
        taught: `route_loss`.
        over: processes that share the batch, for the losses of `OF_BATCH`; by default this one has all of it.
    """
    if not routings:
        return 0.0, {}
    parts = {"balance_loss": (balance_loss(routings, over), config.balance_loss)}
    for name, loss in LOSSES.items():
        if weight := getattr(config, name):
            parts[name] = (loss(routings, over) if loss in OF_BATCH else loss(routings), weight)
    if taught is not None and config.route_loss:
        parts["route_loss"] = (taught, config.route_loss)
    total = sum(weight * loss for loss, weight in parts.values())
    return total, {name: loss for name, (loss, _) in parts.items()}


def route_loss(routings: list[Routing], layers: Mapping[str, MoE], targets: Tensor) -> Tensor | None:
    """Return the mean loss of the routers that classes train (`Router.label_loss`); None where there are none."""
    decided = [(layers[routing.layer].router, routing.logits) for routing in routings]
    losses = [router.label_loss(logits, targets) for router, logits in decided if router.supervised]
    return torch.stack(losses).mean() if losses else None
