"""A run is one folder: its settings, its model folder, and what was measured. Readable without this software."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import yaml

from vimoe.config.command_line import read_settings
from vimoe.config.settings import Settings
from vimoe.errors import ConfigError, FolderError, beside, first_line
from vimoe.files import held_by, is_own, read_text, temporary_folder, write_bytes, write_text
from vimoe.files import write_json as write_json

SCHEMA = 1  # of what --json prints and summary.json holds
CONFIG, MODEL, VALIDATION = "config.yaml", "model", "validation.txt"
ROUTING, ROUTING_BEFORE, SUMMARY = "routing.json", "routing-before-pruning.json", "summary.json"
CHECKPOINT = Path("checkpoints", "last.pt")  # while it is not finished
TRAINED = "trained"  # what is done in a folder that is locked
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
        """Names of the images that were split off train for validation; none where the data has its own."""
        listed = self.path / VALIDATION
        if not listed.exists():
            return []
        try:
            return [_name(line.removesuffix(b"\r")) for line in listed.read_bytes().removesuffix(b"\n").split(b"\n")]
        except (OSError, ValueError) as error:
            raise FolderError(f"{listed} cannot be read: {first_line(error)}; restore it, or train again") from error


def check_new(path: str | Path) -> Path:
    """Raise FolderError where something is there already."""
    path = Path(path)
    _check_idle(path)
    if (path / CHECKPOINT).exists() and not (path / SUMMARY).exists():
        raise FolderError(
            f"--out {path} holds a run that did not finish: go on with --resume {path}, remove it, or name another one"
        )
    if path.exists() and (not path.is_dir() or any(not is_own(inside) for inside in path.iterdir())):
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


@contextmanager
def made_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes the new folder `path` when the block ends well, and is gone if not."""
    path = check_new(path)
    place = path.resolve()  # a link to a folder cannot be renamed over by its name
    if place == Path.cwd():
        raise FolderError(f"--out {path} is the working directory, whose place is to be taken: name another one")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"--out {path} cannot be made: {error.strerror}; name another one") from error
    with temporary_folder(place.parent) as folder:
        try:
            yield folder
        except FolderError as error:
            raise FolderError(str(error).replace(str(folder), str(path))) from error
        try:
            folder.rename(place)  # over an empty folder at most: the system refuses what was put there meanwhile
        except OSError as error:
            raise FolderError(f"--out {path} cannot be made: {error.strerror}; name another one") from error


def open_run(path: str | Path) -> Run:
    """Reads a run folder. Raises FolderError where it is none, or was not finished."""
    path = _folder(path)
    if not (path / CONFIG).is_file():
        raise FolderError(f"{path} has no {CONFIG}: expected a folder that vimoe train made")
    if not (path / MODEL).is_dir():
        _check_idle(path)
        if not (path / CHECKPOINT).exists():
            raise FolderError(
                f"{path} has no {MODEL}/: expected a folder that vimoe train made; train again with another --out"
            )
        raise FolderError(
            f"{path} has no {MODEL}/: its training did not finish; go on with: vimoe train --resume {path}"
        )
    return Run(path, _settings(path))


def open_unfinished(path: str | Path) -> Run:
    """Read the folder of a training that is to go on. Nothing in it is changed.

    Raises:
        FolderError: where it is no run, is finished, has no checkpoint, or is being trained.
    """
    path = _folder(path)
    _check_idle(path)
    if not (path / CONFIG).is_file():
        raise FolderError(f"{path} has no {CONFIG}: expected the run folder of a training that was stopped; name that")
    if (path / SUMMARY).exists():
        raise FolderError(f"{path} is finished: expected a run that was stopped; train with another --out")
    if not (path / CHECKPOINT).exists():
        raise FolderError(
            f"{path} has no {CHECKPOINT}: expected the run folder of a training that was stopped; train with another "
            f"--out"
        )
    return Run(path, _settings(path))


def _folder(path: str | Path) -> Path:
    if not str(path):  # an unset variable of a shell; pathlib takes it for the working directory
        raise FolderError("an empty path: expected a run folder; name it")
    path = Path(path)
    if path.is_file():
        remedy = f"name {path.parent}" if (path.parent / CONFIG).is_file() else "check the path"
        raise FolderError(f"{path} is a file: expected a run folder; {remedy}")
    if not path.is_dir():
        raise FolderError(f"{path}: no such run; {beside(path)}")
    return path


def _check_idle(path: Path) -> None:
    if holder := held_by(path):
        raise FolderError(f"{path} is being {TRAINED} by {holder}: expected a run at rest; wait for it")


def _settings(path: Path) -> Settings:
    try:
        return read_settings(read_text(path / CONFIG))
    except (ConfigError, FolderError) as error:
        raise FolderError(f"{path / CONFIG} cannot be read: {error}; restore it, or train again") from error


def versions() -> dict[str, str]:
    """Of Python and of the libraries that figures depend on."""
    names = ("vimoe", "torch", "torchvision", "timm", "accelerate", "numpy", "scipy", "scikit-learn")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def write_settings(path: Path, settings: Settings) -> None:
    """Writes the run's config.yaml, with the sections and names that the flags have."""
    write_text(path / CONFIG, yaml.safe_dump(settings.to_dict(), sort_keys=False))


def write_validation(path: Path, names: Collection[str]) -> None:
    """Write the run's validation.txt: a name a line, in the bytes that it has on disk, whatever the locale.

    A name that could be no line of its own is written as a JSON string. Without names there is no file.
    """
    if not names:
        return
    write_bytes(path / VALIDATION, b"".join(_line(name) + b"\n" for name in sorted(names)))


def _line(name: str) -> bytes:
    try:
        line = os.fsencode(name)
    except UnicodeEncodeError:  # the name of a member or row, in a locale that has no such letter
        return json.dumps(name).encode()
    return json.dumps(name).encode() if any(mark in line for mark in (b"\n", b"\r", b'"')) else line


def _name(line: bytes) -> str:
    return str(json.loads(line)) if line.startswith(b'"') else os.fsdecode(line)
