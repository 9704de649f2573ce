"""Parameter groups: experts are treated as the parent's FFN was, routers have a rate and decay of their own.

Experts' matrices have another decay where one is asked for. Stacked biases (N, F) are biases: no weight decay. An
expert that is idle in a step has a gradient of zero, not none: AdamW still moves it by what is left of its momentum
and decays its weights, as it does any weight with zero gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError
from vimoe.moe.layer import moe_layers


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that are to be trained; timm's schedules read the groups' `lr_scale`."""
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, weight_decay=config.weight_decay)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups of parameters, each with its weight_decay and lr_scale; every trainable parameter is in exactly one."""
    vit: Any = model
    no_decay = set(vit.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    for name, layer in moe_layers(model).items():
        no_decay |= {f"{name}.experts.{part}" for part, role in layer.experts.roles.items() if not role.matrix}
    groups = param_groups_layer_decay(
        model, config.weight_decay, no_weight_decay_list=no_decay, layer_decay=config.layer_decay
    )
    layers = moe_layers(model).values()
    routers = {id(p) for layer in layers for p in layer.router.parameters()}
    experts = [layer.experts for layer in layers]
    matrices = {id(e.get_parameter(name)) for e in experts for name, role in e.roles.items() if role.matrix}
    own_decay = matrices if config.expert_weight_decay is not None else set()
    result: list[dict[str, Any]] = []
    for group in groups:
        kind = {key: value for key, value in group.items() if key in ("weight_decay", "lr_scale")}
        router_kind = {
            "weight_decay": config.router_weight_decay,
            "lr_scale": kind["lr_scale"] * config.router_lr_scale,
        }
        expert_kind = {**kind, "weight_decay": config.expert_weight_decay}
        result.append({**kind, "params": [p for p in group["params"] if id(p) not in routers | own_decay]})
        result.append({**router_kind, "params": [p for p in group["params"] if id(p) in routers]})
        result.append({**expert_kind, "params": [p for p in group["params"] if id(p) in own_decay]})
    return [group for group in result if group["params"]]


def freeze_all_but(model: nn.Module, layers: Sequence[str]) -> None:
    """Leaves only the named layers and the classifier to be trained. Raises ConfigError where none is named."""
    if not layers:
        raise ConfigError("train.train_only='moe': the model has no MoE layer; set moe.layers, or train_only='all'")
    model.requires_grad_(False)
    vit: Any = model
    head = vit.get_classifier()  # DeiT's distilled models have two
    parts = [model.get_submodule(name) for name in layers]
    for module in (*parts, *(head if isinstance(head, tuple) else [head])):
        module.requires_grad_(True)
