"""A first study.yaml: one ViMoE against its dense ViT and against a dense ViT of equal activated parameters."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vimoe.config.moe import MoEConfig
from vimoe.config.settings import Settings
from vimoe.config.yaml_reader import write_yaml
from vimoe.data.data_path import absolute, check_there
from vimoe.errors import ConfigError, FolderError
from vimoe.files import write_text
from vimoe.study.plan import FILE, Study

SEEDS, SEARCH_SEED = [0, 1, 2, 3, 4], 100
LOCAL = "local-dir:"

HEAD = """\
# Does the ViMoE beat its dense ViT? Each arm is trained at every rate on the search's seed; at the rate that is best on
# validation it is trained on all seeds and scored on test. Change what you like before the first training, not later.
"""


def write_first(folder: Path, settings: Settings, given: dict[str, list[str]]) -> Path:
    """Write study.yaml for settings of `vimoe train` into a folder, which may be new, and return its path.

    Args:
        folder: folder of the study.
        settings: settings of the ViMoE.
        given: names of the settings that were given, by section; the study has no others.

    Raises:
        FolderError: if the folder has a study.yaml.
        ConfigError: if the settings have no MoE layer, no data, or a seed.
        DataError: if the data are not there.
    """
    path = folder / FILE
    if folder.is_file():
        raise FolderError(f"{folder} is a file: expected a folder, which may be new; name another")
    if path.exists():
        raise FolderError(f"{path} is there: expected a folder without one; name another, or leave --new out")
    if not settings.data.path:
        raise ConfigError("--new needs data.path: expected your images; name them, for example --data.path photos")
    check_there(settings.data.path)
    if settings.moe.layers == "none":
        raise ConfigError("moe.layers='none' with --new: expected MoE layers, for the arm vimoe; name them")
    if "seed" in given["train"]:
        raise ConfigError("train.seed with --new: expected none, since a study has seeds of its own; leave it out")
    chosen = {
        section: {name: asdict(getattr(settings, section))[name] for name in names} for section, names in given.items()
    }
    paths = _take_paths(chosen)
    chosen["train"]["epochs"] = settings.train.epochs
    rate = chosen["train"].pop("lr", settings.train.lr)
    moe = {**chosen.pop("moe"), "layers": settings.moe.layers}
    if settings.train.train_only == "moe":  # a dense arm has the same FFNs, under no such name
        chosen["train"]["train_only"] = settings.moe.layers
    data = chosen.pop("data")
    folder.mkdir(parents=True, exist_ok=True)
    wide = _width(settings.moe)
    of_wide = {"about": f"FFNs of {wide} times the width, so as many activated parameters as the ViMoE",
               "moe": {"layers": moe["layers"], "num_experts": 0, "num_shared_experts": wide}}  # fmt: skip
    parts = [
        {"paths": paths, "control": "dense", "seeds": SEEDS,
         "search": {"rates": [float(f"{rate / 3:.1g}"), rate, float(f"{3 * rate:.1g}")], "seeds": [SEARCH_SEED]}},
        {"base": {name: values for name, values in chosen.items() if values}},
        {"data": {_name_of(settings.data.path): {"data": data}}},
        {"arms": {
            "dense": {"about": "the ViT, trained alike", "moe": {"layers": "none"}},
            **({"dense-wide": of_wide} if wide > 1 else {}),
            "vimoe": {"about": "the ViMoE", "moe": moe, "after": ["analyze"]},
        }},
        {"contrasts": {
            f"beats-{arm}": {"question": f"Is it better than {arm}, by its routes?", "of": "vimoe", "against": arm,
                             "margin": 0.5, "routes": 0.01}
            for arm in ("dense", *(["dense-wide"] if wide > 1 else []))
        }},
    ]  # fmt: skip
    write_text(path, HEAD + "\n" + "\n".join(write_yaml(part) for part in parts))
    Study(folder).check(paths)
    return path


def _width(moe: MoEConfig) -> int:
    """Return how many FFNs a token activates in a layer; 1 if its experts are no whole FFNs, or all are mixed."""
    whole = moe.experts == "ffn" and moe.expert_width is None and moe.router not in ("soft", "smear", "expert_choice")
    return moe.num_shared_experts + moe.top_k if whole and moe.num_experts else 1


def _take_paths(chosen: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the paths of data and model by variable, whose names take their places in the settings."""
    data, model = chosen["data"], chosen["model"]
    paths = {}
    if "path" in data:
        paths["DATA"], data["path"] = absolute(data["path"]), "${DATA}"
    if str(model.get("name", "")).startswith(LOCAL):
        there = Path(model["name"].removeprefix(LOCAL))
        paths["MODEL"], model["name"] = str(there.resolve()), f"{LOCAL}${{MODEL}}"
    return paths


def _name_of(path: str) -> str:
    """Return a name for the data of a path, of the characters that a cell's name may have."""
    return re.sub(r"[^\w-]+", "-", Path(path).stem).strip("-") or "data"
