"""Image files: those in a folder, one as a model sees it, and all of them tried once and remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from vimoe.errors import DataError, FolderError, first_line
from vimoe.files import write_text

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")  # copies and thumbnails that macOS and Synology leave beside the images
MADE_BY = f"vimoe 1, Pillow {PIL.__version__}"  # another Pillow may read what this one does not
Entry = tuple[int, int, str]  # of a whole image in the cache: bytes, modification time in ns, hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tried:
    """What trying the image files of a folder found.

    Args:
        folder: the folder.
        digests: a hash of the bytes of each file that is a whole image.
        errors: why each of the others cannot be read.
    """

    folder: Path
    digests: dict[Path, str] = field(default_factory=dict)
    errors: dict[Path, str] = field(default_factory=dict)

    def __str__(self) -> str:
        first = [f"{file.relative_to(self.folder)} ({why})" for file, why in list(self.errors.items())[:3]]
        rest = [f"{len(self.errors) - 3} more"] if len(self.errors) > 3 else []
        all_files = len(self.digests) + len(self.errors)
        return f"{len(self.errors)} of {all_files} images cannot be read: {', '.join([*first, *rest])}"


def open_image(source: Path | Image.Image) -> Image.Image:
    """An RGB image, turned as its EXIF tag says, on white where it is transparent; of an animation the first frame.

    Raises:
        DataError: naming the file and the reason, where it cannot be read.
    """
    if isinstance(source, Image.Image):
        return source
    try:
        with source.open("rb") as file:
            return _decode(file)
    except Exception as error:  # what decoders raise on damaged files has no common class
        raise DataError(f"{source} cannot be read as an image ({_reason(error)}): expected a whole one") from error


def identity(source: Path | Image.Image) -> bytes:
    """What tells an image from others, and a file from what it was before it was changed.

    Raises:
        DataError: where the file is gone.
    """
    if isinstance(source, Image.Image):
        return hashlib.blake2b(source.tobytes(), digest_size=16).digest() + repr(source.size).encode()
    try:
        status = source.stat()
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror}): expected an image") from error
    return f"{source.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape")


def find_images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The image files in a folder and below, sorted, and a count of what else is there, by kind.

    Links to folders are not followed, so that a loop of them ends. Raises DataError for a folder that cannot be listed.
    """
    files: list[Path] = []
    junk: Counter[str] = Counter()
    for place, folders, names in os.walk(folder, onerror=_cannot_list):
        if not folders and not names:
            junk["empty folders"] += 1
        entered = [name for name in folders if not is_hidden(name) and not Path(place, name).is_symlink()]
        junk["hidden folders"] += sum(map(is_hidden, folders))
        junk["links to folders"] += sum(not is_hidden(name) for name in folders) - len(entered)
        folders[:] = entered
        images = [name for name in names if not kind_of_junk(name)]
        files += [Path(place, name) for name in images]
        junk.update(filter(None, map(kind_of_junk, names)))
    return sorted(files), +junk


def kind_of_junk(name: str) -> str:
    """What to count a file as that is no image by its name; nothing for one that is."""
    if is_hidden(name):
        return "hidden files"
    ending = Path(name).suffix.lower()
    return "" if ending in ENDINGS else f"{ending} files" if ending else "files without an ending"


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's, not the user's."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def try_images(files: Sequence[Path], folder: Path) -> Tried:
    """Opens and decodes image files, in threads because Pillow decodes without the GIL.

    Files that were whole are remembered in the user's cache, by path, size and modification time. Others are tried
    again each time: permissions and mounts are mended without a new modification time.

    Args:
        files: image files in `folder`.
        folder: the data folder, which has one cache file.
    """
    depth = len(folder.parts)
    names = ["/".join(file.parts[depth:]) for file in files]  # what relative_to gives, ten times as fast
    known = _read_cache(folder)
    fresh: dict[str, Entry] = {}
    tried = Tried(folder)

    def attempt(file: Path, name: str) -> Entry | str:
        try:
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):
                raise DataError("not a regular file")
            entry = known.get(name)
            if entry and entry[:2] == (status.st_size, status.st_mtime_ns):
                return entry
            content = file.read_bytes()
            _decode(BytesIO(content))
            return status.st_size, status.st_mtime_ns, hashlib.blake2b(content, digest_size=16).hexdigest()
        except Exception as error:  # as in open_image
            return _reason(error)

    console = Console(stderr=True)
    try:
        with ThreadPool() as pool:
            results = pool.imap(lambda item: attempt(*item), zip(files, names, strict=True), chunksize=16)
            shown = track(
                results, "scanning images", len(files), console=console, disable=not console.is_terminal, transient=True
            )
            for file, name, result in zip(files, names, shown, strict=True):
                if isinstance(result, str):
                    tried.errors[file] = result
                else:
                    tried.digests[file] = result[2]
                    fresh[name] = result
    finally:  # what an interrupted scan has done is kept too
        others = known.keys() - fresh.keys()  # files of another role or a class, or gone, or damaged since
        entries = {**{name: known[name] for name in others if (folder / name).exists()}, **fresh}
        if entries != known:
            _write_cache(folder, entries)
    return tried


def cache_folder() -> Path:
    """Where the outcomes of scans are kept: vimoe/ in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vimoe"


def _decode(file: BinaryIO) -> Image.Image:
    try:
        with Image.open(file) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:
        file.seek(0)
        start = file.read(12)
        raise DataError(f"no known image format, it begins with {start!r}" if start else "the file is empty") from error
    if image.mode.startswith("I;16"):  # convert would clip what is above 255, and so nearly everything
        image = Image.fromarray((np.asarray(image) / 257).round().astype("uint8"))
    if image.mode in ("I", "F"):
        raise DataError(f"32 bits a pixel (mode {image.mode}), of which nothing says what is white")
    if image.has_transparency_data:  # convert would show whatever colour the transparent pixels happen to have
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; shrink it"
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


def _cannot_list(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} cannot be listed ({error.strerror}): expected a folder of images") from error


def _cache_file(folder: Path) -> Path:
    whole = folder.resolve()
    return cache_folder() / f"{whole.name}-{hashlib.blake2b(os.fsencode(whole), digest_size=8).hexdigest()}.json"


def _read_cache(folder: Path) -> dict[str, Entry]:
    """What is remembered of a folder; nothing where the file is missing, damaged or another version's."""
    try:
        stored = json.loads(_cache_file(folder).read_text())
        files = stored["files"] if stored["made_by"] == MADE_BY else {}
        return {name: (int(size), int(time), str(digest)) for name, (size, time, digest) in files.items()}
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write_cache(folder: Path, entries: dict[str, Entry]) -> None:
    try:
        path = _cache_file(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"made_by": MADE_BY, "folder": str(folder.resolve()), "files": entries}))
    except (OSError, RuntimeError, FolderError) as error:  # pathlib's RuntimeError: there is no home
        logger.warning("the scan of %s is not remembered, the next one starts anew: %s", folder, first_line(error))
