"""A dense ViT from its settings, built by timm.

torch and timm take seconds to import, so names are checked without them.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimoe.config.model import ModelConfig
from vimoe.errors import ConfigError, beside, first_line, nearest
from vimoe.files import read_text

if TYPE_CHECKING:
    from torch import nn

SOURCES = ("local-dir", "hf-hub")  # as timm names them
FFN_NAME = re.compile(r"(\w+\.)*(\w*blocks\w*|(post_)?network)\.\d+\.(\w+\.)*\w*mlp")  # in every model of timm


def create(config: ModelConfig, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """Builds the dense model.

    Args:
        config: what to build.
        num_classes: overrides `config.num_classes`; 0 leaves the classifier out.
        overrides: further arguments of timm.create_model, before those of `config`.

    Raises:
        ConfigError: for a name that timm does not know, weights that cannot be had, or arguments that it refuses.
    """
    import timm

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
    import torch

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

    A name that timm's source does not have is refused; whether timm builds one that it has, `create` sees.

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
    timm_models = sys.modules.get("timm.models")
    if timm_models and timm_models.is_model(architecture) and not tag:  # also one that the caller has registered
        return
    source = _timm_source()
    if not any(said in source for said in (f"\ndef {architecture}(", f"'{architecture}'", f'"{architecture}"')):
        vits = re.findall(r"^def ((?:vit|deit|eva|beit)\w*)\(", source, re.MULTILINE)
        raise ConfigError(f"model.name={name!r}: timm has no such model; {nearest(architecture, vits)}")
    if tag and not any(said in source for said in (f".{tag}'", f'.{tag}"')):
        tagged = re.findall(rf"['\"]({re.escape(architecture)}\.[\w.]+)['\"]", source)
        raise ConfigError(f"model.name={name!r}: timm has no such weights; {nearest(name, tagged)}")


@functools.cache
def _timm_source() -> str:
    """The text of timm's models, which has the name of each as a function or string, and each tag in a string."""
    spec = find_spec("timm")
    assert spec is not None and spec.submodule_search_locations
    models = Path(spec.submodule_search_locations[0], "models")
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(models.glob("*.py")))


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
