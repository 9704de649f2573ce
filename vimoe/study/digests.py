"""Digests by which a result is found again: of settings, of the files at a path, and of the package's code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vimoe.data.user_cache import cache_folder
from vimoe.errors import ConfigError, FolderError
from vimoe.files import read_text, write_json

SHOWS_NOTHING = ("report", "demo", "bench", "study")  # parts of vimoe on which no figure of a cell depends
MEASURES = "study/one_cell.py"  # but for this file
AFTER_ALONE = ("analysis",)  # nor one of a cell that is trained and scored alone


def digest(values: Any) -> str:
    """Return 12 hexadecimal digits that depend on all of these plain values, and not on the order of names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def digest_of_path(value: str) -> str:
    """Return the digest of a file or of all files in a folder, by name and content; of a text that is no path.

    Linked files and folders count as what they lead to. The digest is kept in the user's cache: files of the same
    names, sizes and times of modification are not read again.

    Raises:
        ConfigError: if the folder has no file.
    """
    path = Path(value)
    if not path.exists():
        return digest(value)
    files = {"": path} if path.is_file() else {f.relative_to(path).as_posix(): f for f in sorted(_files(path))}
    if not files:
        raise ConfigError(f"{value}: expected files in this folder, and there is none; check the path")
    stats = [file.stat() for file in files.values()]
    seen = digest([[name, s.st_size, s.st_mtime_ns] for name, s in zip(files, stats, strict=True)])
    kept = None
    with suppress(FolderError):  # no home folder
        kept = cache_folder() / "digests" / f"{digest(str(path.resolve()))}.json"
    with suppress(FolderError, ValueError, TypeError, KeyError):
        known = json.loads(read_text(kept)) if kept else {}
        if known["seen"] == seen:
            return str(known["digest"])
    total = hashlib.sha256()
    for name, file in files.items():
        total.update(json.dumps(name).encode())
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    found = total.hexdigest()[:12]
    with suppress(OSError, FolderError):
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {"seen": seen, "digest": found})
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, through links too, each folder once."""
    known = {folder.resolve()}
    for place, folders, files in os.walk(folder, followlinks=True):
        yield from (Path(place, name) for name in files if Path(place, name).is_file())
        for name in list(folders):
            if (there := Path(place, name).resolve()) in known:
                folders.remove(name)
            known.add(there)


def code_version(after: bool = True) -> str:
    """Return the digest of the package's modules that a cell's figures may depend on.

    Args:
        after: whether the cell has steps after its training (`Cell.after`).
    """
    spec = importlib.util.find_spec("vimoe")
    assert spec and spec.origin
    package = Path(spec.origin).parent
    passed_over = SHOWS_NOTHING if after else (*SHOWS_NOTHING, *AFTER_ALONE)
    files = sorted(path.relative_to(package) for path in package.rglob("*.py"))
    return digest([
        [file.as_posix(), hashlib.sha256((package / file).read_bytes()).hexdigest()]
        for file in files if file.parts[0] not in passed_over or file.as_posix() == MEASURES
    ])  # fmt: skip
