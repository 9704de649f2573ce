"""The config.json of a model folder, read and checked without torch. Nothing that it names is ever run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vimoe.config.moe import MoEConfig
from vimoe.errors import FolderError, VimoeError, first_line, nearest
from vimoe.files import read_text

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1  # of the "vimoe" section
SECTION = ("format", "layers", "segmentation", "family", "arguments")  # its entries
FORMS: dict[str, type] = {
    "architecture": str,
    "model_args": dict,
    "pretrained_cfg": dict,
    "vimoe": dict,
    "label_names": list,
}
PREPARED_FORMS: dict[str, type] = {  # of the entries of "pretrained_cfg" that are read, each of which may be null
    "mean": list, "std": list, "crop_pct": float, "crop_mode": str, "interpolation": str, "label_names": list,
}  # fmt: skip
CODE = ("auto_map", "custom_pipelines", "trust_remote_code")  # entries by which transformers' folders name code


def read_config(path: Path) -> dict[str, Any]:
    """Return the values of a config.json, of timm's or with a "vimoe" section.

    Raises:
        FolderError: if it is no JSON object, has not the form of one, is of a newer version, or names code.
    """
    try:
        values = json.loads(read_text(path), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # a number of more digits than Python reads is a ValueError too
        raise FolderError(f"{path} is no JSON object: {first_line(error)}; save the model again") from error
    if not isinstance(values, dict):
        raise FolderError(f"{path} is no JSON object: it holds a {type(values).__name__}; save the model again")
    _check_forms(path, values, FORMS)
    prepared = values.get("pretrained_cfg", {})
    _check_forms(path, {name: value for name, value in prepared.items() if value is not None}, PREPARED_FORMS)
    if code := _code_in(values):
        raise FolderError(f"{path} names code ({code!r}), which vimoe never runs: expected none; take it out")
    section: dict[str, Any] = values.get("vimoe", {"format": FORMAT})
    if type(section.get("format")) is not int or section["format"] != FORMAT:
        raise FolderError(
            f"{path} has a 'vimoe' section of format {str(section.get('format'))[:40]}: expected {FORMAT}; update "
            f"vimoe, or save the model again"
        )
    if unknown := [name for name in section if name not in SECTION]:
        raise FolderError(f"{path}: unknown entry {unknown[0]!r} of 'vimoe': {nearest(unknown[0], SECTION)}")
    return values


def model_of_run(folder: Path) -> Path | None:
    """Return the model folder in a run folder; None if it is none."""
    return folder / "model" if (folder / "model" / CONFIG).is_file() else None


def read_section(path: Path) -> dict[str, Any]:
    """Return the "vimoe" section of a config.json; one without layers for timm's own. Raises as `read_config`."""
    section: dict[str, Any] = read_config(path).get("vimoe", {"format": FORMAT, "layers": {}})
    return section


def layers_of(path: Path, section: dict[str, Any]) -> dict[str, MoEConfig]:
    """Return the settings of each MoE layer and widened FFN by its module name, as a section of a config.json has them.

    Raises:
        FolderError: if they are none.
    """
    try:
        return {name: MoEConfig.from_dict({**values, "layers": [name]}) for name, values in section["layers"].items()}
    except (KeyError, TypeError, AttributeError, VimoeError) as error:
        raise FolderError(f"{path}: the 'vimoe' section does not fit the backbone: {error}") from error


def _check_forms(path: Path, values: dict[str, Any], forms: dict[str, type]) -> None:
    """Raise FolderError for a value of another type than its entry has."""
    for name, form in forms.items():
        if name in values and not isinstance(values[name], (int, float) if form is float else form):
            found = " ".join(str(values[name]).split())[:40]
            raise FolderError(f"{path}: {name!r} is {found}: expected a {form.__name__}; save the model again")


def _refuse(constant: str) -> None:
    """Raise ValueError for NaN and Infinity, which Python reads and JSON has not."""
    raise ValueError(f"it has {constant}, which is no number")


def _code_in(values: Any) -> str | None:
    """Return the first entry of `CODE` at any depth of a JSON value."""
    if isinstance(values, dict):
        return next((name for name in values if name in CODE), None) or _code_in(list(values.values()))
    return next(filter(None, map(_code_in, values)), None) if isinstance(values, list) else None
