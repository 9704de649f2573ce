"""Files: written whole or not at all, read in UTF-8, and deleted only if they are vimoe's own.

No other module of vimoe deletes files. An unfinished file or folder has a name that begins with `TEMPORARY`, and only
these and the files of a lock are deleted. A file with a final name is renamed to a temporary one first, by the function
that wrote it.
"""

from __future__ import annotations

import codecs
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from vimoe.errors import FolderError

TEMPORARY = ".vimoe-tmp-"  # the final name is not part of it: that may have all 255 bytes that a name can have
LOCK, HOLDER = ".vimoe-lock", ".vimoe-locked-by"  # of a locked run folder; only filelock writes to the first
UMASK = os.umask(0o077)  # it can be read only by setting it, which threads that make files would notice later
os.umask(UMASK)


def set_usual_mode(path: Path) -> None:
    """Give a file or folder that was made for its owner alone the mode that the user's umask lets a new one have."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~UMASK)


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that gets the name `path` if the block succeeds, and is deleted if it fails.

    Raises:
        FolderError: if it cannot be written. A file that was at `path` is kept.
    """
    temporary = None
    if not path.parent.is_dir():
        raise FolderError(f"{path.parent}: no such folder, so {path.name} cannot be written into it; create it first")
    try:
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        set_usual_mode(temporary)
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise FolderError(
            f"{path} could not be written: {error.strerror or error}; make room, or name another folder"
        ) from error
    finally:
        if temporary is not None:
            discard(temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with written_whole(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all. Surrogate escapes (from odd file names) become their bytes again."""
    write_bytes(path, text.encode(errors="surrogateescape"))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as JSON, with unrounded numbers."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_text(path: Path) -> str:
    """Return a UTF-8 text with its line ends unchanged, whatever the locale.

    Raises:
        FolderError: if the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
    except UnicodeDecodeError as error:
        raise FolderError(f"{path} cannot be read: {error.reason} at byte {error.start}; save it in UTF-8") from error


def read_names(path: Path) -> list[str]:
    """Return the file names in a user's list, one per line, as the file system spells them.

    Blanks around a name are dropped. Lines end at newlines only; str.splitlines would also split at characters that a
    name may contain.

    Raises:
        FolderError: if the list cannot be read.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
    return [os.fsdecode(name) for line in lines if (name := line.strip(b" \t\r"))]


def in_utf8(name: str) -> str:
    """Return a file name decoded as UTF-8, so that it is the same text in every locale."""
    return os.fsencode(name).decode(errors="surrogateescape")


def one_line(name: str) -> str:
    r"""Return a name, as a JSON string if it holds a line end or a quote, so that it stays on one line.

    >>> one_line("two\nlines.png"), one_line("plain.png")
    ('"two\\nlines.png"', 'plain.png')
    """
    return json.dumps(name) if any(mark in name for mark in '\n\r"') else name


def printable(name: str) -> str:
    r"""Return a name with U+FFFD for each character that no font can draw (line ends, bytes that are not UTF-8).

    >>> printable("two\nlines") == "two\ufffdlines"
    True
    """
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in name)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, which is deleted after the block unless it was renamed.

    Raises:
        FolderError: if it cannot be created.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
        set_usual_mode(folder)
    except OSError as error:
        raise FolderError(f"no folder can be created in {parent}: {error.strerror}; name another one") from error
    try:
        yield folder
    finally:
        discard(folder)


def rename(temporary: Path, path: Path) -> None:
    """Give a temporary folder its final name; a folder that had this name is deleted after that.

    Raises:
        OSError: if the file system refuses. A folder that had the name is kept.
    """
    if not path.exists():
        temporary.rename(path)
        return
    with temporary_folder(path.parent) as aside:
        old = path.rename(aside / path.name)
        try:
            temporary.rename(path)
        except OSError:
            old.rename(path)
            raise


def is_own(path: Path) -> bool:
    """Return True for the name of a temporary file or of a lock, such as a killed process leaves behind."""
    return path.name in (LOCK, HOLDER) or path.name.startswith(TEMPORARY)


def discard(path: Path) -> None:
    """Delete a file or folder of vimoe's own (`is_own`), and nothing else."""
    assert is_own(path), f"{path} is not vimoe's to delete"
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def discard_leftovers(*folders: Path) -> None:
    """Delete the unfinished files that killed processes left in these folders, but not in folders below."""
    for folder in folders:
        for path in list(folder.glob(f"{TEMPORARY}*")):
            discard(path)


def discard_file(path: Path) -> None:
    """Delete a file that the caller has written, and its folder if that is then empty. A missing file is no error."""
    with suppress(FileNotFoundError):
        discard(path.rename(path.with_name(f"{TEMPORARY}{path.name[:32]}")))
    with suppress(OSError):
        path.parent.rmdir()


def discard_folder(path: Path) -> None:
    """Delete a folder that the caller has made, such as that of a finished run. A missing folder is no error."""
    temporary = path.with_name(f"{TEMPORARY}{path.name[-32:]}")
    discard(temporary)  # of a process that was killed here
    with suppress(FileNotFoundError):
        discard(path.rename(temporary))


def in_units(size: float) -> str:
    """Return a number of bytes as text.

    >>> in_units(56_700), in_units(1.2e9)
    ('57 kB', '1.20 GB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1e3:.0f} kB"
