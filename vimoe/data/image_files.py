"""Image files in folders, recognised by their names; everything else is counted as junk."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from vimoe.errors import DataError, beside, counted

ENDINGS = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")  # copies and thumbnails that macOS and Synology leave beside the images


def find_images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Find the image files in a folder and its subfolders; links to folders are not followed, since they may loop.

    Args:
        folder: an existing folder.

    Returns:
        The files, sorted, and the number of other files and folders by kind.

    Raises:
        DataError: if a folder cannot be listed.
    """
    files: list[Path] = []
    junk: Counter[str] = Counter()
    for root, folders, names in os.walk(folder, onerror=_cannot_list):
        if not folders and not names:
            junk["empty folders"] += 1
        entered = [name for name in folders if not is_hidden(name) and not Path(root, name).is_symlink()]
        junk["hidden folders"] += sum(map(is_hidden, folders))
        junk["links to folders"] += sum(not is_hidden(name) for name in folders) - len(entered)
        folders[:] = entered  # os.walk then enters only these
        files += [Path(root, name) for name in names if not kind_of_junk(name)]
        junk.update(filter(None, map(kind_of_junk, names)))
    return sorted(files), +junk


def kind_of_junk(name: str) -> str:
    """Return the kind of a file that is no image by its name; "" for an image.

    >>> kind_of_junk("a.txt"), kind_of_junk(".DS_Store"), kind_of_junk("a.JPG")
    ('.txt files', 'hidden files', '')
    """
    if is_hidden(name):
        return "hidden files"
    ending = Path(name).suffix.lower()
    return "" if ending in ENDINGS else f"{ending} files" if ending else "files without an ending"


def is_hidden(name: str) -> bool:
    """Return True for the name of a file or folder that the system made, not the user."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def passed_over(junk: Mapping[str, int]) -> str:
    """Return a note on files with other endings, for a message that no image was found; "" if there are none."""
    others = {kind: count for kind, count in junk.items() if kind.startswith(".")}
    if not others:
        return ""
    files = [counted(count, kind.removesuffix("s")) for kind, count in others.items()]
    known = ", ".join(sorted(ENDINGS))
    were = "was" if sum(others.values()) == 1 else "were"
    return f" ({', '.join(files[:6])} {were} passed over; known endings are {known}; convert them)"


def list_images(paths: Iterable[str | Path]) -> list[Path]:
    """Return the given files, and the image files in the given folders and their subfolders.

    Raises:
        DataError: if a path is missing or empty, or a folder holds no image.
    """
    found: list[Path] = []
    for given in paths:
        if not str(given):  # for example an unset shell variable; pathlib would read it as the working directory
            raise DataError("an empty path: expected an image file or a folder; name it")
        path = Path(given)
        if path.is_dir():
            inside, junk = find_images(path)
            if not inside:
                raise DataError(f"{path} holds no image{passed_over(junk)}: expected files such as .jpg or .png")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file; {beside(path)}")
    return found


def _cannot_list(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} cannot be listed ({error.strerror}): expected a folder of images") from error
