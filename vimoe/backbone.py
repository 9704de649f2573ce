"""A dense ViT from its settings, built by timm."""

from __future__ import annotations

import timm
import torch
from torch import nn

from vimoe.config import ModelConfig
from vimoe.errors import ConfigError, nearest


def create(config: ModelConfig, num_classes: int | None = None) -> nn.Module:
    """Builds the dense model.

    Args:
        config: what to build.
        num_classes: overrides `config.num_classes`.

    Raises:
        ConfigError: for a name that timm does not know, weights that cannot be had, or arguments that it refuses.
    """
    check_name(config)
    wanted = {"img_size": config.img_size, "num_classes": num_classes or config.num_classes}
    kwargs = {"drop_path_rate": config.drop_path_rate, **{k: v for k, v in wanted.items() if v}, **config.args}
    try:
        return timm.create_model(config.name, pretrained=config.pretrained, **kwargs)
    except (OSError, RuntimeError, TypeError, AssertionError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        remedy = (
            "; where its weights cannot be downloaded, use --model.pretrained false, or --model.name local-dir:FOLDER"
            if config.pretrained
            else f"; look at the arguments {sorted(kwargs)}"
        )
        raise ConfigError(f"timm could not build {config.name!r}: {reason}{remedy}") from error


def create_without_weights(config: ModelConfig) -> nn.Module:
    """The dense model on the meta device: shapes for `plan` and `count`, no memory and no download."""
    check_name(config)
    from dataclasses import replace

    with torch.device("meta"):
        return create(replace(config, pretrained=False))


def check_name(config: ModelConfig) -> None:
    """Raises ConfigError, with the nearest known name, where timm has no such model."""
    name = config.name
    if ":" in name:  # a folder or hub repository in timm's format says its architecture itself
        return
    if not timm.is_model(name.partition(".")[0]):
        vits = [known for known in timm.list_models() if known.startswith(("vit", "deit", "eva", "beit"))]
        raise ConfigError(f"model.name={name!r}: timm has no such model; {nearest(name, vits)}")
