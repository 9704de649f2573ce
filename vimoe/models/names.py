"""Names of models (`model.name`), checked and looked up without torch and timm, which take seconds to import."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from vimoe.config.layers import Layers
from vimoe.config.model import FAMILIES, ModelConfig
from vimoe.errors import ConfigError, beside, nearest
from vimoe.models.folder_config import CONFIG, WEIGHTS, model_of_run, read_config
from vimoe.models.hub import find_folder

SOURCES = ("local-dir", "hf-hub")  # as timm names them
FFN_NAME = re.compile(r"(\w+\.)*\w+\.\d+\.(\w+\.)*\w*mlp\w*")  # in every model of timm


def vimoe_folder(config: ModelConfig, files: Collection[str] = (CONFIG,)) -> Path | None:
    """Return the model folder of vimoe that the name means, with these files if it is on the hub.

    It is None for any other name, and for a folder in timm's own format, which timm builds.

    Raises:
        FolderError: if its config.json is damaged or names code, or the hub cannot be reached.
    """
    folder = _folder(config, files)
    return folder if folder and "vimoe" in read_config(folder / CONFIG) else None


def segmenter_folder(config: ModelConfig) -> Path | None:
    """Return the model folder that the name means, weights and all, if it holds a whole segmenter; else None."""
    folder = vimoe_folder(config)
    holds = folder and read_config(folder / CONFIG)["vimoe"].get("segmentation")
    return vimoe_folder(config, (CONFIG, WEIGHTS)) if holds else None


def _folder(config: ModelConfig, files: Collection[str] = (CONFIG,)) -> Path | None:
    """Return the folder with a config.json that a name with a source means, downloaded if it is on the hub."""
    source, _, place = config.name.partition(":")
    if config.family[0] != "timm" or source not in SOURCES:
        return None
    if source == "hf-hub":
        repo, _, revision = place.partition("@")  # as timm writes it
        folder = find_folder(f"hf-hub:{repo}", files, revision or None)
    else:
        folder = Path(place)
    return folder if (folder / CONFIG).is_file() else None


def check_layer_names(config: ModelConfig, *selections: Layers) -> None:
    """Raise an error for a module name in `moe.layers` or `train.train_only` that no FFN of the model can have.

    Blocks are counted if timm's source text says how many there are, as it does for each ViT. Names with wildcards,
    folders, and models of other families, are left to surgery, which sees the model.

    Raises:
        ConfigError: if a module name is none.
        SurgeryError: if there are not as many blocks.
    """
    if config.family[0] != "timm" or ":" in config.name:  # a folder may hold a ViT of another family
        return
    for selection in selections:
        selection.check_names(FFN_NAME, _depth(config))


def _depth(config: ModelConfig) -> int | None:
    """Return the number of blocks of a model of timm, as the function that builds it gives it; None if unknown."""
    if "depth" in config.args:
        return None
    architecture = re.escape(config.name.partition(".")[0])
    body = re.search(rf"^def {architecture}\((?:.*\n)(?:(?:[ )].*)?\n)*", _timm_source(), re.MULTILINE)
    depths = re.findall(r"\bdepth=(\d+)\b", body[0]) if body else []
    return int(depths[0]) if len(depths) == 1 else None


def check_name(config: ModelConfig, segmentation: bool = False) -> None:
    """Raise ConfigError, with the nearest known name, for an unknown model, tag, family, source or folder.

    A timm name must stand in timm's source text; `create` finds out if timm can build it. Names
    within other families are left to these.

    Args:
        config: settings whose name is checked.
        segmentation: accept the folder of a segmenter too.
    """
    family, name = config.family
    if family != "timm":
        return
    source, colon, _ = name.partition(":")
    if colon and source not in SOURCES:
        known = [*FAMILIES, *SOURCES]
        raise ConfigError(
            f"model.name={name!r}: unknown source {source!r}; {nearest(source, known)}, or import what registers it"
        )
    if colon:
        _check_folder(config, segmentation)
        return
    architecture, _, tag = name.partition(".")
    timm_models = sys.modules.get("timm.models")
    if timm_models and timm_models.is_model(architecture) and not tag:  # also one that the caller has registered
        return
    source = _timm_source()
    if not any(said in source for said in (f"\ndef {architecture}(", f"'{architecture}'", f'"{architecture}"')):
        if meant := _meant(name):
            raise ConfigError(f"model.name={name!r}: timm has no such model; did you mean {meant!r}?")
        vits = re.findall(r"^def ((?:vit|deit|eva|beit)\w*)\(", source, re.MULTILINE)
        raise ConfigError(f"model.name={name!r}: timm has no such model; {nearest(architecture, vits)}")
    if tag and not any(said in source for said in (f".{tag}'", f'.{tag}"')):
        tagged = re.findall(rf"['\"]({re.escape(architecture)}\.[\w.]+)['\"]", source)
        raise ConfigError(f"model.name={name!r}: timm has no such weights; {nearest(name, tagged)}")


def _meant(place: str) -> str | None:
    """Return the name of the model in a folder, or in that of a run; None if there is none."""
    for folder in (Path(place), model_of_run(Path(place))):
        if folder and (folder / CONFIG).is_file():
            return f"{'local-dir' if 'architecture' in read_config(folder / CONFIG) else 'transformers'}:{folder}"
    return None


@functools.cache
def _timm_source() -> str:
    """Return the text of timm's models: it has each model's name as a function or string, each tag in a string."""
    spec = find_spec("timm")
    assert spec is not None and spec.submodule_search_locations
    models = Path(spec.submodule_search_locations[0], "models")
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(models.glob("*.py")))


def _check_folder(config: ModelConfig, segmentation: bool) -> None:
    name, folder = config.name, _folder(config)
    if folder is None:
        place = name.partition(":")[2]
        remedy = beside(Path(place)) if name.startswith("local-dir:") else "check the name"
        if name.startswith("local-dir:") and (meant := _meant(place)):
            remedy = f"did you mean {meant!r}?"
        raise ConfigError(f"model.name={name!r}: no model folder there; {remedy}")
    values = read_config(folder / CONFIG)
    if "architecture" not in values:
        other = f"use transformers:{name.partition(':')[2]}" if "model_type" in values else "check the path"
        raise ConfigError(f"model.name={name!r}: expected a model folder of vimoe or timm, which it is not; {other}")
    if values.get("vimoe", {}).get("segmentation") and not segmentation:
        raise ConfigError(
            f"model.name={name!r} holds a segmenter, ViT and decoder: expected a ViT that classifies images; train "
            f"with --data.task segmentation, or use vimoe.load in Python"
        )
