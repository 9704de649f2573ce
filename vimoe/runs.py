"""A run is one folder: its settings, its model folder, and what was measured. Readable without this software."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import yaml

from vimoe.errors import ConfigError, FolderError, beside
from vimoe.files import write_json as write_json
from vimoe.files import write_text as write_text
from vimoe.options import Settings, read_settings

SCHEMA = 1  # of what --json prints and summary.json holds
CONFIG, MODEL, VALIDATION = "config.yaml", "model", "validation.txt"
ROUTING, ROUTING_BEFORE, SUMMARY = "routing.json", "routing-before-pruning.json", "summary.json"
FIGURES, EXAMPLES = "figures", "examples-{}.png"  # a sheet of images for each MoE layer
EXPERT_MAPS = "expert-maps.png"  # of a segmentation


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    settings: Settings

    @property
    def model(self) -> Path:
        """Its model folder."""
        return self.path / MODEL

    def validation(self) -> list[str]:
        """Files that were split off train for validation; none where the data has a validation folder."""
        listed = self.path / VALIDATION
        return listed.read_text().splitlines() if listed.exists() else []


def check_new(path: str | Path) -> Path:
    """Raises FolderError where something is there already."""
    path = Path(path)
    if (path / CONFIG).exists() and not (path / SUMMARY).exists():
        raise FolderError(
            f"--out {path} holds a run that did not finish: go on with --resume {path}, remove it, or name another one"
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FolderError(f"--out {path} is there already: expected a new folder; name another one")
    return path


def new_run(path: str | Path) -> Path:
    """An empty folder for a run. Raises FolderError where it cannot be made."""
    path = check_new(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"--out {path} cannot be made: {error.strerror}; name another one") from error
    return path


def open_run(path: str | Path) -> Run:
    """Reads a run folder. Raises FolderError where it is none, or was not finished."""
    path = Path(path)
    if not path.is_dir():
        raise FolderError(f"{path}: no such run; {beside(path)}")
    if not (path / CONFIG).is_file():
        raise FolderError(f"{path} has no {CONFIG}: expected a folder that vimoe train made")
    if not (path / MODEL).is_dir():
        raise FolderError(
            f"{path} has no {MODEL}/: its training did not finish; go on with: vimoe train --resume {path}"
        )
    return Run(path, _settings(path))


def open_unfinished(path: str | Path) -> Run:
    """Reads a run folder whose training is to go on, and clears away what a kill left half-written.

    Raises:
        FolderError: where it is no run, or is finished.
    """
    path = Path(path)
    if not path.is_dir():
        raise FolderError(f"{path}: no such run; {beside(path)}")
    if not (path / CONFIG).is_file():
        raise FolderError(f"{path} has no {CONFIG}: expected the run folder of a training that was stopped; name that")
    if (path / SUMMARY).exists():
        raise FolderError(f"{path} is finished: expected a run that was stopped; train with another --out")
    for leftover in path.rglob(".*-*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return Run(path, _settings(path))


def _settings(path: Path) -> Settings:
    try:
        return read_settings((path / CONFIG).read_text())
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise FolderError(f"{path / CONFIG} cannot be read: {error}; restore it, or train again") from error


def versions() -> dict[str, str]:
    """Of Python and of the libraries that figures depend on."""
    names = ("vimoe", "torch", "torchvision", "timm", "accelerate", "numpy", "scipy", "scikit-learn")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def write_settings(path: Path, settings: Settings) -> None:
    """Writes the run's config.yaml, with the sections and names that the flags have."""
    values = {**asdict(settings), "moe": settings.moe.to_dict()}
    write_text(path / CONFIG, yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False))
