"""The user's cache: scan results, decoded images and features. It may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path

import PIL

from vimoe.errors import FolderError, first_line

MADE_BY = f"vimoe 2, Pillow {PIL.__version__}"  # another version of Pillow may decode differently


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
    """Create a folder in `cache_folder` and return its path.

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
    return folder
