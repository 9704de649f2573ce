"""Every image opened once before training; the outcome for whole images is remembered in the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

from vimoe.data.images import Source, decode, digest, name_within, open_bytes, reason, stamp
from vimoe.data.user_cache import MADE_BY, cache_folder
from vimoe.errors import FolderError, first_line
from vimoe.files import read_text, write_text
from vimoe.terminal import track

UNKNOWN = (-1, -1)  # stamp of an image for which no file's time says when it changes; it is not remembered
Entry = tuple[int, int, str, int, int]  # of a whole image: stamp of its file (bytes, ns), hash, width, height

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedImages:
    """Outcome of opening images.

    Args:
        folder: data folder, or the file that holds all images.
        digests: hash of the bytes of each whole image.
        sizes: (width, height) of each whole image.
        errors: reason for each image that cannot be read.
    """

    folder: Path
    digests: dict[Source, str] = field(default_factory=dict)
    sizes: dict[Source, tuple[int, int]] = field(default_factory=dict)
    errors: dict[Source, str] = field(default_factory=dict)

    def __str__(self) -> str:
        first = [f"{name_within(self.folder, source)} ({why})" for source, why in list(self.errors.items())[:3]]
        rest = [f"{len(self.errors) - 3} more"] if len(self.errors) > 3 else []
        total = len(self.digests) + len(self.errors)
        return f"{len(self.errors)} of {total} images cannot be read: {', '.join([*first, *rest])}"


def check_images(sources: Sequence[Source], folder: Path) -> CheckedImages:
    """Read and decode images, in threads because Pillow decodes without the GIL.

    Whole images are remembered in the user's cache by path, size and modification time. Others are tried again in each
    call, because permissions and mounts can be repaired without a new modification time.

    Args:
        sources: images in `folder`.
        folder: data folder or file; it has one cache file.
    """
    names = [name_within(folder, source) for source in sources]
    known = _read_cache(folder)
    fresh: dict[str, Entry] = {}
    checked = CheckedImages(folder)

    def check(source: Source, name: str) -> Entry | str:
        try:
            file = source if isinstance(source, Path) else source.file
            current = stamp(file) if file else None
            entry = known.get(name)
            if entry and entry[:2] == current:
                return entry
            with open_bytes(source) as opened:
                size = decode(opened).size
                return *(current or UNKNOWN), digest(opened).hex(), *size
        except Exception as error:  # the errors of decoders on damaged files have no common class
            return reason(error)

    try:
        with ThreadPool() as pool:
            results = pool.imap(lambda item: check(*item), zip(sources, names, strict=True), chunksize=16)
            shown = track(results, "scanning images", len(sources))
            for source, name, result in zip(sources, names, shown, strict=True):
                if isinstance(result, str):
                    checked.errors[source] = result
                else:
                    _, _, checked.digests[source], *size = result
                    checked.sizes[source] = size[0], size[1]
                    if result[:2] != UNKNOWN:
                        fresh[name] = result
    finally:  # also after an interruption, so that the work so far is kept
        others = known.keys() - fresh.keys()  # images of another role or class, deleted or damaged ones
        entries = {**{name: known[name] for name in others if _is_valid(folder / name, known[name])}, **fresh}
        if entries != known:
            _write_cache(folder, entries)
    return checked


def _is_valid(path: Path, entry: Entry) -> bool:
    """Return True if the file of a remembered image exists; for one inside of a file, if that file is unchanged."""
    holder = next((file for file in path.parents if file.is_file()), None)
    return stamp(holder) == entry[:2] if holder else path.exists()


def _cache_file(folder: Path) -> Path:
    whole = folder.resolve()
    return cache_folder() / f"{whole.name[:50]}-{hashlib.blake2b(os.fsencode(whole), digest_size=8).hexdigest()}.json"


def _read_cache(folder: Path) -> dict[str, Entry]:
    """Return the remembered images of a folder; {} if the file is missing, damaged or of another version."""
    try:
        stored = json.loads(read_text(_cache_file(folder)))
        files = stored["files"] if stored["made_by"] == MADE_BY else {}
        return {
            name: (int(size), int(time), str(digest), int(width), int(height))
            for name, (size, time, digest, width, height) in files.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _write_cache(folder: Path, entries: dict[str, Entry]) -> None:
    try:
        path = _cache_file(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"made_by": MADE_BY, "folder": str(folder.resolve()), "files": entries}))
    except (OSError, FolderError) as error:
        logger.warning("the scan of %s is not remembered, the next one starts anew: %s", folder, first_line(error))
