"""Parameter groups: experts have the rate and decay of the parent's FFN, routers their own.

The matrices of experts get another decay if `expert_weight_decay` is set. Stacked biases (N, F) are biases: no weight
decay. An expert that is idle in a step has a gradient of zero, not none: AdamW still moves it by its remaining
momentum and decays its weights, like any weight with zero gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError
from vimoe.models.interface import find_backbone
from vimoe.moe.experts import Experts
from vimoe.moe.layer import moe_layers


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; timm's schedules read the groups' `lr_scale`."""
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, weight_decay=config.weight_decay)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return groups of parameters, each with its weight_decay and lr_scale; each trainable parameter is in one group.

    Vectors have no weight decay; roles tell the vectors of experts, axes those of other parts. The order of groups is
    fixed, because an optimiser's state in a checkpoint follows it.
    """
    backbone = find_backbone(model)
    depths, no_decay = backbone.layer_numbers(), backbone.no_weight_decay()
    by_role = {
        f"{name}.{part}": role.matrix
        for name, module in model.named_modules()
        if isinstance(module, Experts)
        for part, role in module.roles.items()
    }
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = by_role.get(name, p.ndim > 1 and name not in no_decay)
            groups.setdefault((depths[name], decays), []).append(p)
    deepest = max(depths.values())
    routers = {id(p) for layer in moe_layers(model).values() for p in layer.router.parameters()}
    matrices = {id(p) for name, p in model.named_parameters() if by_role.get(name)}
    own_decay = matrices if config.expert_weight_decay is not None else set()
    result: list[dict[str, Any]] = []
    for (depth, decays), parameters in groups.items():
        rate = config.layer_decay ** (deepest - depth)
        kind = {"weight_decay": config.weight_decay if decays else 0.0, "lr_scale": rate}
        router_kind = {
            "weight_decay": config.router_weight_decay,
            "lr_scale": kind["lr_scale"] * config.router_lr_scale,
        }
        expert_kind = {**kind, "weight_decay": config.expert_weight_decay}
        result.append({**kind, "params": [p for p in parameters if id(p) not in routers | own_decay]})
        result.append({**router_kind, "params": [p for p in parameters if id(p) in routers]})
        result.append({**expert_kind, "params": [p for p in parameters if id(p) in own_decay]})
    return [group for group in result if group["params"]]


def freeze_all_but(model: nn.Module, layers: Sequence[str]) -> None:
    """Leave only the named layers and the model's head to be trained. Raises ConfigError where none is named."""
    if not layers:
        raise ConfigError("train.train_only='moe': the model has no MoE layer; set moe.layers, or train_only='all'")
    trained, head = tuple(f"{name}." for name in layers), find_backbone(model).head()
    for name, p in model.named_parameters():
        p.requires_grad_(name in head or name.startswith(trained))
