"""Parameter groups, and which parameters are trained at all.

Experts have the rate and decay of the parent's FFN, routers their own. `expert_lr_scale` gives routed experts another
rate, and `expert_weight_decay` their matrices another decay. Stacked biases (N, F) are biases: no weight
decay. An expert that is idle in a step has a gradient of zero, not none: AdamW still moves it by its remaining
momentum and decays its weights, like any weight with zero gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from vimoe.config.layers import Layers
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError
from vimoe.models.interface import find_backbone
from vimoe.models.upcycling import sites
from vimoe.moe.experts import Experts
from vimoe.moe.layer import MoE, moe_layers
from vimoe.parallel.gradients import by_mesh


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; timm's schedules read the groups' `lr_scale`.

    It is torch's fused kernel, which reads and writes each weight once a step. On a CPU it takes every tensor for
    contiguous and does not look, so a model with a weight that is not, such as a slice, gets the other one. The groups
    of a checkpoint say whether theirs is fused, so a training that began without goes on without. Groups of a parallel
    model are divided by the meshes of their parameters.
    """
    groups = by_mesh(parameter_groups(model, config))
    fused = all(p.is_contiguous() for group in groups for p in group["params"])
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    optimizer.register_load_state_dict_post_hook(_tell_scaler)
    return optimizer


def _tell_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Let a gradient scaler know, after a checkpoint was loaded, if its kernel takes gradients that are still scaled.

    Only the fused one does; torch notes it where the optimizer is made, and not where another kernel is loaded.
    """
    optimizer._step_supports_amp_scaling = all(group["fused"] for group in optimizer.param_groups)  # type: ignore[attr-defined]


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
    layers = moe_layers(model).values()
    routers = {id(p) for layer in layers for p in layer.router.parameters()}
    experts = {id(p) for layer in layers for p in layer.experts.parameters()} - _shared(layers)
    result: list[dict[str, Any]] = []
    for (depth, decays), parameters in groups.items():
        rate = config.layer_decay ** (deepest - depth)
        decay = config.weight_decay if decays else 0.0
        own_decay = config.expert_weight_decay if decays else None
        # where experts are treated as other parameters they are in one group with them, as in older checkpoints
        apart = experts if config.expert_lr_scale != 1 or own_decay is not None else set()
        kinds = {
            "other": {"weight_decay": decay, "lr_scale": rate},
            "router": {
                "weight_decay": config.router_weight_decay if decays else 0.0,
                "lr_scale": rate * config.router_lr_scale,
            },
            "expert": {
                "weight_decay": decay if own_decay is None else own_decay,
                "lr_scale": rate * config.expert_lr_scale,
            },
        }
        members: dict[str, list[nn.Parameter]] = {kind: [] for kind in kinds}
        for p in parameters:
            members["router" if id(p) in routers else "expert" if id(p) in apart else "other"].append(p)
        result += [{**kinds[kind], "params": params} for kind, params in members.items() if params]
    return result


def trained_modules(model: nn.Module, trained: Layers, converted: Sequence[str] | None = None) -> list[str] | None:
    """Return the names of the modules that `train.train_only` leaves to be trained beside the head; None for all.

    Args:
        model: model to be trained.
        trained: `TrainConfig.trained`.
        converted: names of the layers that "moe" means; by default the MoE layers.

    Raises:
        ConfigError: if there is no MoE layer of which to train something.
        SurgeryError: if an index or pattern names no FFN.
    """
    layers = list(moe_layers(model))
    if trained.word == "all":
        return None
    if trained.word == "head":
        return []
    if trained.word not in ("moe", "experts"):
        return [site.name for site in trained.select(sites(model))]
    names = layers if trained.word == "experts" or converted is None else list(converted)
    if not names:
        raise ConfigError(
            f"train.train_only={trained.word!r}: the model has no MoE layer: expected one; set moe.layers, or name the "
            f"FFNs to train, such as train_only='last:2'"
        )
    return names if trained.word == "moe" else [f"{name}.{part}" for name in names for part in ("experts", "router")]


def freeze_all_but(model: nn.Module, modules: Sequence[str]) -> None:
    """Leave only the named modules and the model's head to be trained.

    Experts may hold the shared expert, such as a base of theirs; it is trained only if it is named, or its layer.
    """
    trained, head = tuple(f"{name}." for name in modules), find_backbone(model).head()
    apart = [layer for name, layer in moe_layers(model).items() if not f"{name}.shared.".startswith(trained)]
    shared = _shared(apart)
    for name, p in model.named_parameters():
        p.requires_grad_(name in head or (name.startswith(trained) and id(p) not in shared))


def _shared(layers: Iterable[MoE]) -> set[int]:
    """Return the identities of the shared experts' parameters."""
    return {id(p) for layer in layers if layer.shared is not None for p in layer.shared.parameters()}
