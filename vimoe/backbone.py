"""A dense ViT from its settings, built by timm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vimoe.config import ModelConfig
from vimoe.errors import ConfigError, beside, first_line, nearest
from vimoe.files import read_text

SOURCES = ("local-dir", "hf-hub")  # as timm names them


def create(config: ModelConfig, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """Builds the dense model.

    Args:
        config: what to build.
        num_classes: overrides `config.num_classes`; 0 leaves the classifier out.
        overrides: further arguments of timm.create_model, before those of `config`.

    Raises:
        ConfigError: for a name that timm does not know, weights that cannot be had, or arguments that it refuses.
    """
    check_name(config)
    classes = config.num_classes if num_classes is None else num_classes
    wanted = {"img_size": config.img_size, "num_classes": classes, **config.args, **overrides}
    kwargs = {"drop_path_rate": config.drop_path_rate, **{k: v for k, v in wanted.items() if v is not None}}
    try:
        return timm.create_model(config.name, pretrained=config.pretrained, **kwargs)
    except OSError as error:
        raise ConfigError(
            f"the weights of {config.name!r} cannot be had: {first_line(error)}; use --model.pretrained false, "
            f"or --model.name local-dir:FOLDER"
        ) from error
    except (RuntimeError, TypeError, AssertionError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"timm could not build {config.name!r}: {first_line(error)}; look at the arguments {sorted(kwargs)}"
        ) from error


def create_without_weights(config: ModelConfig) -> nn.Module:
    """The dense model on the meta device: shapes for `plan` and `count`, no memory and no download."""
    with torch.device("meta"):
        return create(replace(config, pretrained=False))


def dense_segmenter(config: ModelConfig) -> Path | None:
    """The model folder that the name means, where that holds a whole segmenter without MoE layers."""
    source, _, place = config.name.partition(":")
    if source != "local-dir" or not (Path(place) / "config.json").is_file():
        return None
    section = _vimoe_section(config.name, Path(place))
    return Path(place) if section.get("segmentation") and not section.get("layers") else None


def check_name(config: ModelConfig, segmentation: bool = False) -> None:
    """Raises ConfigError, with the nearest known name, where there is no such model, tag, source or folder.

    Args:
        config: whose name it is.
        segmentation: whether it may be the folder of a dense segmenter too.
    """
    if segmentation and dense_segmenter(config):
        return
    name, (source, colon, place) = config.name, config.name.partition(":")
    if colon and source not in SOURCES:
        raise ConfigError(f"model.name={name!r}: unknown source {source!r}; {nearest(source, SOURCES)}")
    if source == "local-dir" and colon:
        _check_folder(name, Path(place))
    if colon:
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        vits = [known for known in timm.list_models() if known.startswith(("vit", "deit", "eva", "beit"))]
        raise ConfigError(f"model.name={name!r}: timm has no such model; {nearest(architecture, vits)}")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        raise ConfigError(f"model.name={name!r}: timm has no such weights; {nearest(name, tagged)}")


def _check_folder(name: str, folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"model.name={name!r}: no model folder there; {beside(folder)}")
    if _vimoe_section(name, folder):
        raise ConfigError(
            f"model.name={name!r} holds MoE layers, widened FFNs or a decoder: expected a dense ViT in timm's format; "
            f"start from the dense one, or use vimoe.load in Python"
        )


def _vimoe_section(name: str, folder: Path) -> dict[str, Any]:
    """What vimoe notes in a model folder's config; nothing where that is a plain timm folder."""
    config = folder / "config.json"
    try:
        section: dict[str, Any] = json.loads(read_text(config)).get("vimoe", {})
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.name={name!r}: {config} is no JSON ({error}); save the model again") from error
    return section
