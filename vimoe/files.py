"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vimoe.errors import FolderError

TEMPORARY = ".vimoe-tmp-"  # begins the name of all that is not finished; the final name may leave no room for more


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the name `path` when the block ends well, and is gone when it does not.

    Raises:
        FolderError: where it cannot be written; what was at `path` before is as it was.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        raise FolderError(
            f"{path} could not be written: {error.strerror or error}; make room, or name another folder"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with written_whole(path) as file:
        file.write(text.encode())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes figures, unrounded."""
    write_text(path, json.dumps(values, indent=2) + "\n")
