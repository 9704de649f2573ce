"""A run folder: settings, model folder and measurements of one training, readable without this software.

One training at a time may write to it (`locked`).
"""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import filelock

from vimoe.config.command_line import read_settings
from vimoe.config.settings import Settings
from vimoe.config.yaml_reader import write_yaml
from vimoe.errors import ConfigError, FolderError, beside, first_line
from vimoe.files import HOLDER, LOCK, discard, is_own, read_text, temporary_folder, write_bytes, write_text
from vimoe.files import write_json as write_json

SCHEMA = 1  # version of the JSON that --json prints and summary.json holds
CONFIG, MODEL, VALIDATION = "config.yaml", "model", "validation.txt"
ROUTING, ROUTING_BEFORE, SUMMARY = "routing.json", "routing-before-pruning.json", "summary.json"
DIAGNOSIS, TASKS = "diagnosis.json", "tasks.json"
TRUST, TRUST_WEIGHTS = "trust.json", "trust.safetensors"
CHECKPOINT = Path("checkpoints", "last.pt")  # until the training has finished
FIGURES, EXAMPLES = "figures", "examples-{}.png"  # a sheet of images for each MoE layer
EXPERT_MAPS = "expert-maps.png"  # segmentation only


@dataclass(frozen=True)
class Run:
    """A run folder that holds a run.

    Attributes:
        path: the folder.
        settings: settings of the training.
    """

    path: Path
    settings: Settings

    @property
    def model(self) -> Path:
        """Path of the model folder."""
        return self.path / MODEL

    def validation(self) -> list[str]:
        """Return the names of the images that were split off train for validation; [] if the data has its own split."""
        listed = self.path / VALIDATION
        if not listed.exists():
            return []
        try:
            return [_name(line.removesuffix(b"\r")) for line in listed.read_bytes().removesuffix(b"\n").split(b"\n")]
        except (OSError, ValueError) as error:
            raise FolderError(f"{listed} cannot be read: {first_line(error)}; restore it, or train again") from error


def check_new(path: str | Path) -> Path:
    """Return the path of a run to be made. Raises FolderError if something exists there."""
    path = Path(path)
    _check_idle(path)
    if (path / CHECKPOINT).exists() and not (path / SUMMARY).exists():
        raise FolderError(
            f"--out {path} holds an unfinished run: go on with --resume {path}, remove it, or name another folder"
        )
    if path.exists() and (not path.is_dir() or any(not is_own(inside) for inside in path.iterdir())):
        raise FolderError(f"--out {path} already exists: expected a new folder; name another one")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise FolderError(
            f"--out {path} cannot be created: {there} is {'not writable' if there.is_dir() else 'no folder'}; name "
            f"another one"
        )
    return path


def new_run(path: str | Path) -> Path:
    """Create an empty folder for a run. Raises FolderError if that fails."""
    path = check_new(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"--out {path} cannot be created: {error.strerror}; name another one") from error
    return path


@contextmanager
def made_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` if the block succeeds, and is deleted if it fails."""
    path = check_new(path)
    target = path.resolve()  # a folder cannot be renamed over a link
    if target == Path.cwd():
        raise FolderError(f"--out {path} is the working directory, which cannot be replaced: name another one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"--out {path} cannot be created: {error.strerror}; name another one") from error
    with temporary_folder(target.parent) as folder:
        try:
            yield folder
        except FolderError as error:
            raise FolderError(str(error).replace(str(folder), str(path))) from error
        if target.is_dir() and not is_locked(target):
            for left in filter(is_own, list(target.iterdir())):  # by a process that was killed; others stay
                discard(left)
        try:
            folder.rename(target)  # replaces an empty folder only: fails if something was put there meanwhile
        except OSError as error:
            raise FolderError(f"--out {path} cannot be created: {error.strerror}; name another one") from error


def open_run(path: str | Path) -> Run:
    """Read the folder of a finished run. Raises FolderError if it holds none."""
    path = _folder(path)
    if not (path / CONFIG).is_file():
        raise FolderError(f"{path} has no {CONFIG}: expected a run folder of vimoe train")
    if not (path / MODEL).is_dir():
        _check_idle(path)
        if not (path / CHECKPOINT).exists():
            raise FolderError(
                f"{path} has no {MODEL}/: expected a run folder of vimoe train; train again with another --out"
            )
        raise FolderError(
            f"{path} has no {MODEL}/: its training did not finish; go on with: vimoe train --resume {path}"
        )
    return Run(path, _settings(path))


def open_unfinished(path: str | Path) -> Run:
    """Read the folder of a training that is to be resumed, and change nothing in it.

    Raises:
        FolderError: if it is no run folder, has finished, has no checkpoint, or is being trained.
    """
    path = _folder(path)
    _check_idle(path)
    if not (path / CONFIG).is_file():
        raise FolderError(f"{path} has no {CONFIG}: expected the run folder of a stopped training; name that")
    if (path / SUMMARY).exists():
        raise FolderError(f"{path} is finished: expected a stopped run; train with another --out")
    if not (path / CHECKPOINT).exists():
        raise FolderError(
            f"{path} has no {CHECKPOINT}: expected the run folder of a stopped training; train with another --out"
        )
    return Run(path, _settings(path))


def _folder(path: str | Path) -> Path:
    if not str(path):  # for example an unset shell variable; pathlib would read it as the working directory
        raise FolderError("an empty path: expected a run folder; name it")
    path = Path(path)
    if path.is_file():
        remedy = f"name {path.parent}" if (path.parent / CONFIG).is_file() else "check the path"
        raise FolderError(f"{path} is a file: expected a run folder; {remedy}")
    if not path.is_dir():
        raise FolderError(f"{path}: no such run; {beside(path)}")
    return path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock an existing run folder for this process; the lock of a killed process is released by the system.

    Raises:
        FolderError: if another process holds the lock.
    """
    lock = filelock.FileLock(folder / LOCK, timeout=0.2)  # `is_locked` takes the lock for a moment to see if it can
    try:
        lock.acquire()
    except filelock.Timeout:
        raise _busy(folder) from None
    except (OSError, NotImplementedError) as error:
        raise FolderError(f"{folder} cannot be locked: {error}; fix its permissions, or name another one") from error
    try:
        with suppress(OSError):  # a full disk: this file only serves the message that other processes print
            (folder / HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        discard(folder / HOLDER)
        discard(folder / LOCK)
        lock.release()


def is_locked(folder: Path) -> bool:
    """Return True if a process holds the lock of a folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            return False
    except filelock.Timeout:
        return True
    except (OSError, NotImplementedError):  # for example on a read-only file system
        return False


def _busy(folder: Path) -> FolderError:
    holder = "another process"
    with suppress(OSError):
        holder = (folder / HOLDER).read_text(encoding="utf-8") or holder
    return FolderError(f"{folder} is being trained by {holder}: expected an idle folder; wait for it")


def _check_idle(path: Path) -> None:
    if is_locked(path):
        raise _busy(path)


def _settings(path: Path) -> Settings:
    try:
        return read_settings(read_text(path / CONFIG))
    except (ConfigError, FolderError) as error:
        raise FolderError(f"{path / CONFIG} cannot be read: {error}; restore it, or train again") from error


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on."""
    from vimoe import __version__  # that of a checkout which is not installed, too

    names = ("torch", "torchvision", "timm", "accelerate", "numpy", "scipy", "scikit-learn")
    others = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), "vimoe": __version__, **others}


def write_settings(path: Path, settings: Settings) -> None:
    """Write the run's config.yaml, with the sections and names of the flags."""
    write_text(path / CONFIG, write_yaml(settings.to_dict()))


def write_validation(path: Path, names: Collection[str]) -> None:
    """Write the run's validation.txt: one name per line, in its bytes on disk, whatever the locale.

    A name with a line end or quote is written as a JSON string. Without names no file is written.
    """
    if not names:
        return
    write_bytes(path / VALIDATION, b"".join(_line(name) + b"\n" for name in sorted(names)))


def _line(name: str) -> bytes:
    try:
        line = os.fsencode(name)
    except UnicodeEncodeError:  # a name inside an archive or table with letters that this locale lacks
        return json.dumps(name).encode()
    return json.dumps(name).encode() if any(mark in line for mark in (b"\n", b"\r", b'"')) else line


def _name(line: bytes) -> str:
    return str(json.loads(line)) if line.startswith(b'"') else os.fsdecode(line)
