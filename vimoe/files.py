"""Files: read and written in UTF-8, written whole or not at all, and deleted only where they are vimoe's own.

Nothing else in vimoe deletes. What is unfinished has a name that begins with `TEMPORARY`, and only such files and
folders are deleted; what has another name is moved to one first, by the function that wrote it.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import filelock
import yaml

from vimoe.errors import FolderError

TEMPORARY = ".vimoe-tmp-"  # short, and without the final name, which may have all of the 255 bytes that a name can have
LOCK, HOLDER = ".vimoe-lock", ".vimoe-locked-by"  # the first is filelock's own to write to


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that takes the name `path` when the block ends well, and is gone when it does not.

    Raises:
        FolderError: where it cannot be written; what was at `path` before is as it was.
    """
    temporary = None
    if not path.parent.is_dir():
        raise FolderError(f"{path.parent}: no such folder: expected one to write {path.name} into; make it first")
    try:
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
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
    """Write a file in UTF-8, whole or not at all. Bytes of file names that are not UTF-8 stay what they are."""
    write_bytes(path, text.encode(errors="surrogateescape"))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write figures, unrounded."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_text(path: Path) -> str:
    """Return a text in UTF-8, whatever the locale, with its line ends as they are.

    Raises:
        FolderError: where the file cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
    except UnicodeDecodeError as error:
        raise FolderError(f"{path} cannot be read: {error.reason} at byte {error.start}; save it in UTF-8") from error


def read_names(path: Path) -> list[str]:
    """Return the names in a user's list of files, a name a line, as the file system has them.

    Blanks around a name do not count; str.splitlines would cut names at other characters too.

    Raises:
        FolderError: where the list cannot be read.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
    return [os.fsdecode(name) for line in lines if (name := line.strip(b" \t\r"))]


def in_utf8(name: str) -> str:
    """Return the name of a file as UTF-8 has it, so that it is the same in every locale."""
    return os.fsencode(name).decode(errors="surrogateescape")


def printable(name: str) -> str:
    """Return a name with a mark in the place of what no font has: line ends, and bytes that are not UTF-8."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in name)


class _Strict(yaml.SafeLoader):  # type: ignore[misc]
    """A loader that refuses a key that stands twice, of which YAML would take the last without a word.

    A date is text, and 1e-3 a number, as in YAML 1.2.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # as it is written: merged keys come later
        known: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line, what = key.start_mark.line + 1, (key.tag, key.value)
            if what in known:
                raise yaml.YAMLError(f"{key.value!r} stands twice, in lines {known[what]} and {line}: expected it once")
            known[what] = line
        return node


_Strict.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), "-+0123456789")


def read_yaml(text: str) -> Any:
    """Return the plain values of a YAML text. Raises yaml.YAMLError, also for a key that stands twice."""
    return yaml.load(text, _Strict)  # noqa: S506  a SafeLoader with one more refusal


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent` that is gone when the block ends, unless it was renamed.

    Raises:
        FolderError: where it cannot be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
        folder.chmod(0o755)
    except OSError as error:
        raise FolderError(f"no folder can be made in {parent}: {error.strerror}; name another one") from error
    try:
        yield folder
    finally:
        discard(folder)


def rename(temporary: Path, path: Path) -> None:
    """Give a temporary folder its name. A folder that had it goes once the new one has it; may raise OSError."""
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


def discard(path: Path) -> None:
    """Delete a temporary file or folder of vimoe's, and nothing that has another name."""
    assert path.name.startswith(TEMPORARY), f"{path} is not vimoe's to delete"
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def discard_leftovers(*folders: Path) -> None:
    """Delete what killed processes left unfinished in these folders, and not below them."""
    for folder in folders:
        for path in list(folder.glob(f"{TEMPORARY}*")):
            discard(path)


def discard_file(path: Path) -> None:
    """Delete a file that the caller has written, and its folder if that is empty then; nothing where it is gone."""
    with suppress(FileNotFoundError):
        discard(path.rename(path.with_name(f"{TEMPORARY}{path.name[:32]}")))
    with suppress(OSError):
        path.parent.rmdir()


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder for this process alone; a process that is killed lets go of it.

    Args:
        folder: an existing folder.
        doing: what is done there, for the message that others get: "trained".

    Raises:
        FolderError: where another process holds it.
    """
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise FolderError(
            f"{folder} is being {doing} by {_holder(folder)}: expected one process; wait for it"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise FolderError(f"{folder} cannot be locked: {error}; mend its permissions, or name another one") from error
    try:
        with suppress(OSError):  # of a full disk: it is for a message
            (folder / HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        for name in (HOLDER, LOCK):
            with suppress(OSError):
                (folder / name).unlink()
        lock.release()


def held_by(folder: Path) -> str | None:
    """Return which process holds a folder (`locked`): "process 17 on host"; None where none does."""
    if (folder / LOCK).exists():
        try:
            with filelock.FileLock(folder / LOCK, timeout=0):
                return None
        except filelock.Timeout:
            return _holder(folder)
        except (OSError, NotImplementedError):  # such as a file system that nobody can write to
            return None
    return None


def is_own(path: Path) -> bool:
    """Return True for what a killed process of vimoe's leaves in a folder that it had just begun to use."""
    return path.name in (LOCK, HOLDER) or path.name.startswith(TEMPORARY)


def _holder(folder: Path) -> str:
    with suppress(OSError):
        return (folder / HOLDER).read_text(encoding="utf-8") or "another process"
    return "another process"


def in_units(size: float) -> str:
    """Return a number of bytes for the reader: "57 kB", "1.20 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1e3:.0f} kB"
