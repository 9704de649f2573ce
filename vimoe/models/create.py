"""A dense ViT from its settings: names are checked, and the family builds it.

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

from vimoe.config.layers import Layers
from vimoe.config.model import FAMILIES, ModelConfig
from vimoe.errors import ConfigError, beside, first_line, nearest
from vimoe.files import read_text

if TYPE_CHECKING:
    from torch import nn

SOURCES = ("local-dir", "hf-hub")  # as timm names them
FFN_NAME = re.compile(r"(\w+\.)*(\w*blocks\w*|(post_)?network)\.\d+\.(\w+\.)*\w*mlp")  # in every model of timm


def create(
    config: ModelConfig, num_classes: int | None = None, *, img_size: tuple[int, int] | None = None,
    any_size: bool = False,
) -> nn.Module:  # fmt: skip
    """Build the dense ViT that `model.name` names, by its family.

    Args:
        config: settings of the model.
        num_classes: size of the classifier in place of `config.num_classes`; 0 for none.
        img_size: (height, width) in place of `config.img_size`.
        any_size: let the ViT take images of other sizes too, if it can.

    Raises:
        ConfigError: if the name is unknown, weights cannot be loaded, or arguments do not fit.
    """
    check_name(config)
    family, name = config.family
    try:
        model: nn.Module = FAMILIES.find(family).create(
            name,
            pretrained=config.pretrained,
            num_classes=config.num_classes if num_classes is None else num_classes,
            img_size=img_size or config.img_size,
            any_size=any_size,
            drop_path_rate=config.drop_path_rate,
            **config.args,
        )
    except TypeError as error:
        raise ConfigError(f"model.name={config.name!r}: {first_line(error)}; look at model.args") from error
    from vimoe.models.reading import set_reading  # it imports torch

    return set_reading(model, config.read)


def create_without_weights(config: ModelConfig) -> nn.Module:
    """Build the dense ViT on the meta device: shapes for `plan` and `count`, no memory and no download."""
    import torch

    with torch.device("meta"):
        return create(replace(config, pretrained=False))


def dense_segmenter(config: ModelConfig) -> Path | None:
    """Return the model folder that the name means if it holds a whole segmenter without MoE layers, else None."""
    source, _, place = config.name.partition(":")
    if source != "local-dir" or not (Path(place) / "config.json").is_file():
        return None
    section = _vimoe_section(config.name, Path(place))
    return Path(place) if section.get("segmentation") and not section.get("layers") else None


def check_layer_names(config: ModelConfig, *selections: Layers) -> None:
    """Raise ConfigError for a module name in `moe.layers` or `train.train_only` that no FFN of any timm model has.

    Names with wildcards, and models of other families, are left to surgery, which sees the model.
    """
    for selection in selections if config.family[0] == "timm" else ():
        selection.check_names(FFN_NAME)


def check_name(config: ModelConfig, segmentation: bool = False) -> None:
    """Raise ConfigError, with the nearest known name, for an unknown model, tag, family, source or folder.

    A timm name must stand in timm's source text; `create` finds out if timm can build it. Names
    within other families are left to these.

    Args:
        config: settings whose name is checked.
        segmentation: accept the folder of a dense segmenter too.
    """
    if segmentation and dense_segmenter(config):
        return
    family, name = config.family
    if family != "timm":
        return
    source, colon, place = name.partition(":")
    if colon and source not in SOURCES:
        known = [*FAMILIES, *SOURCES]
        raise ConfigError(
            f"model.name={name!r}: unknown source {source!r}; {nearest(source, known)}, or import what registers it"
        )
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
    """Return the text of timm's models: it has each model's name as a function or string, each tag in a string."""
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
            f"model.name={name!r} holds MoE layers, widened FFNs, a decoder or a ViT of another family: expected a "
            f"dense ViT in timm's format; start from the dense one, or use vimoe.load in Python"
        )


def _vimoe_section(name: str, folder: Path) -> dict[str, Any]:
    """Return the "vimoe" section of a model folder's config; empty for a plain timm folder."""
    config = folder / "config.json"
    try:
        section: dict[str, Any] = json.loads(read_text(config)).get("vimoe", {})
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.name={name!r}: {config} is no JSON ({error}); save the model again") from error
    return section
