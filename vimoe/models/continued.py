"""A model folder of vimoe as the model to start from: its MoE layers stay as they are, and settings say so."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import fields, replace

import torch
from torch import nn

from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.settings import Settings
from vimoe.errors import ConfigError
from vimoe.models.cost import count
from vimoe.models.folder_config import CONFIG, WEIGHTS, layers_of, read_section
from vimoe.models.interface import find_backbone
from vimoe.models.model_folder import load, rebuild, rebuild_parent
from vimoe.models.names import vimoe_folder
from vimoe.models.reading import set_reading
from vimoe.models.upcycling import Plan, sites

logger = logging.getLogger(__name__)


def continued(
    config: ModelConfig, num_classes: int | None = None, any_size: bool = False,
    img_size: tuple[int, int] | None = None,
) -> nn.Module:  # fmt: skip
    """Return the model of the model folder that `model.name` means, in float32, with its MoE layers.

    Args:
        config: settings of the model. `pretrained` loads the weights; all others but `num_classes` and `read` are the
            folder's.
        num_classes: size of a new classifier of random weights, if it is another than the folder's.
        any_size: refused, as the ViT takes images of the size that it was trained with.
        img_size: (height, width) in place of `config.img_size`, refused likewise if it is another than the folder's.

    Raises:
        ConfigError: if other settings or no classes are asked for, or a segmentation is to start from a model that
            classifies images.
        FolderError: if the folder is damaged.
    """
    if any_size:
        raise ConfigError(
            f"model.name={config.name!r} is a model folder that classifies images: expected a segmenter, or a dense "
            f"ViT in timm's format, for a segmentation; name one"
        )
    folder = vimoe_folder(config, (CONFIG, WEIGHTS) if config.pretrained else (CONFIG,))
    assert folder is not None
    model = load(folder) if config.pretrained else rebuild(folder)
    backbone = find_backbone(model)
    height, width = backbone.input_size[1:]
    asked = img_size or (config.img_size and (config.img_size, config.img_size))
    if asked not in (None, (height, width)) or config.drop_path_rate or config.args:
        raise ConfigError(
            f"model.name={config.name!r} is a model folder with an architecture of its own, for images of "
            f"{height}x{width}: expected no img_size, drop_path_rate and args of model; leave them out"
        )
    if num_classes == 0 and backbone.num_classes:
        raise ConfigError(
            f"model.name={config.name!r} is a model folder of {backbone.num_classes} classes: expected num_classes of "
            f"1 or more, as its classifier stays; leave it out"
        )
    if num_classes not in (None, backbone.num_classes):
        backbone.new_classifier(num_classes)
    return set_reading(model.float(), config.read)


def own_layers(config: ModelConfig) -> dict[str, MoEConfig]:
    """Return the settings of each MoE layer, and widened FFN, that the model of `model.name` has from the beginning.

    Only a model folder has some. Raises FolderError if it is damaged.
    """
    folder = vimoe_folder(config)
    return layers_of(folder / CONFIG, read_section(folder / CONFIG)) if folder else {}


def with_own_layers(settings: Settings, given: Collection[str] | None = None) -> Settings:
    """Return settings whose `moe` is what the model folder of `model.name` has; others are returned as they are.

    Where its layers differ in a setting, `moe` has that of the first one, and the log says so.

    Args:
        settings: settings of a run.
        given: names of the settings of `moe` that the user gave; by default those that have no default value.

    Raises:
        ConfigError: if a given setting contradicts the folder.
        FolderError: if the folder is damaged.
    """
    own, folder, asked = own_layers(settings.model), vimoe_folder(settings.model), settings.moe
    if not own or folder is None:
        return settings
    if given is None:
        given = [each.name for each in fields(asked) if getattr(asked, each.name) != each.default]
    first = next((config for config in own.values() if config.num_experts), next(iter(own.values())))
    found = replace(first, layers=tuple(own))
    for name in (name for name in given if name != "layers"):
        value, there = getattr(asked, name), getattr(found, name)
        if value != there:
            raise _contradiction(settings.model, name, value, f"{name}={there!r}, as they have")
    if "layers" in given and asked.layers != found.layers:
        with torch.device("meta"):
            model = rebuild(folder)
        if [site.name for site in asked.selection.select(sites(model))] != list(own):
            raise _contradiction(settings.model, "layers", asked.layers, f"its own, {', '.join(own)}")
    apart = [
        f.name for f in fields(first) if len({getattr(c, f.name) for c in own.values()}) > 1 and f.name != "layers"
    ]
    if apart:
        logger.info(
            "the MoE layers of %s differ in %s: settings note those of the first", settings.model.name, ", ".join(apart)
        )
    return replace(settings, moe=found)


def plan_of_own(config: ModelConfig) -> Plan | None:
    """Return the plan that a model folder with MoE layers is the result of; None for any other model."""
    own, folder = own_layers(config), vimoe_folder(config)
    if not own or folder is None:
        return None
    with torch.device("meta"):
        parent, model = rebuild_parent(folder), rebuild(folder)
    found = tuple(site for site in sites(parent) if site.name in own)
    return Plan(found, tuple(own[site.name] for site in found), count(parent), count(set_reading(model, config.read)))


def _contradiction(model: ModelConfig, name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(
        f"moe.{name}={value!r} with model.name={model.name!r}, which has MoE layers already: expected {expected}; "
        f"leave it out"
    )
