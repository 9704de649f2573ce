"""Read the files of a run for a page about it. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vimoe.config.moe import MoEConfig
from vimoe.errors import FolderError, VimoeError
from vimoe.files import read_text
from vimoe.run_folder import CONFIG, SUMMARY

METRICS, LOAD = "metrics.csv", "load.csv"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise FolderError with the name of the file if the block cannot read or show its content."""
    try:
        yield
    except VimoeError:  # for example of a full disk
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, yaml.YAMLError) as error:
        raise FolderError(f"{path} is damaged ({error!r}); restore it, or make it again") from error


def read_config(run: Path) -> tuple[dict[str, str], str]:
    """Return the settings of a run by flag, and the model that they describe in words."""
    if not (run / CONFIG).is_file():
        raise FolderError(f"{run} has no {CONFIG}: expected a folder that vimoe train or vimoe prune made")
    with reading(run / CONFIG):
        config = yaml.safe_load(read_text(run / CONFIG))
        flat = {f"{section}.{name}": str(value) for section, v in config.items() for name, value in v.items()}
        return {"data.path": "?", **flat}, describe(config)


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, or an empty dictionary if there is no such file."""
    return json.loads(read_text(path)) if path.exists() else {}


def read_summary(run: Path) -> dict[str, Any]:
    """Return the content of a run's summary.json; an empty dictionary if there is none.

    Raises:
        FolderError: if it holds neither the score of a training nor those of a pruning.
    """
    path = run / SUMMARY
    with reading(path):
        values = read_json(path)
        if path.exists() and not values.keys() & {"val", "before"}:
            raise FolderError(
                f"{path} is damaged (it has neither 'val' nor 'before', the scores of a training and of a pruning); "
                f"restore it, or make it again"
            )
    return values


def _blocks(layers: Any) -> str:
    """Return `moe.layers` in words."""
    word, _, number = str(layers).partition(":")
    if word == "last" and number:
        return "the last block" if number == "1" else f"the last {number} blocks"
    if word == "every" and number:
        return "every block" if number == "1" else f"one block in {number}"
    return "every block" if word == "all" else f"blocks {layers}"


def describe(config: dict[str, Any]) -> str:
    """Describe in words the model that the settings of a run ask for."""
    moe, model = config["moe"], config["model"]["name"]
    if moe["layers"] == "none":
        return f"{model}, dense"
    where = _blocks(moe["layers"])
    if not moe["num_experts"]:
        return f"{model} with a dense FFN of {moe['num_shared_experts']} times the width in {where} (a control)"
    # runs of older versions have no kinds, and fuse nothing
    if (fuse := config.get("train", {}).get("fuse", "none")) != "none":
        return f"{model}, dense, with {moe['num_experts']} experts in {where} while it was trained ({fuse})"
    router, kind = (moe.get(name, getattr(MoEConfig, name)) for name in ("router", "experts"))
    experts = f"{moe['num_experts']} experts" if kind == MoEConfig.experts else f"{moe['num_experts']} {kind!r} experts"
    shared = f", {moe['num_shared_experts']} shared" if moe["num_shared_experts"] else ", none shared"
    # another router may choose another number of them
    chosen = f"{moe['top_k']} chosen" if router == MoEConfig.router else f"chosen by the router {router!r}"
    return f"{model} with a mixture of experts in {where}: {experts}{shared}, {chosen} for each {moe['routing']}"
