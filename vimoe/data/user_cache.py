"""The user's cache: scan results, decoded images and features. It may be deleted when no run begins or reads it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import PIL

from vimoe.errors import FolderError, first_line
from vimoe.files import TEMPORARY, discard

MADE_BY = f"vimoe 3, Pillow {PIL.__version__}"  # another version of Pillow may decode differently
STALE = 24 * 60 * 60  # seconds without a write, after which an unfinished file is of a process that was killed


def cache_folder() -> Path:
    """Return the cache folder: vimoe/ in $XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        FolderError: if there is no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vimoe"
    except RuntimeError as error:  # of pathlib
        raise FolderError(f"no cache folder ({first_line(error)}): expected one; set XDG_CACHE_HOME") from error


def make_cache_folder(name: str, cache: str) -> Path:
    """Create a folder in `cache_folder` and return its path. What killed processes left in it is deleted after a day.

    Args:
        name: name of the folder.
        cache: value of `DataConfig.cache`, for the message.

    Raises:
        FolderError: if it cannot be created.
    """
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(
            f"data.cache={cache!r}: {folder} cannot be created ({error.strerror}); set XDG_CACHE_HOME to another "
            f"folder, or use data.cache=memory"
        ) from error
    for path in folder.glob(f"{TEMPORARY}*"):
        with suppress(OSError):  # another process may have deleted it
            if path.suffix != ".lock" and time.time() - path.stat().st_mtime > STALE:
                discard(path)
    return folder
