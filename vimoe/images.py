"""Images: the files in a folder, one as a model sees it, and all of them tried once and remembered."""

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
from typing import BinaryIO, NoReturn, Protocol

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vimoe.errors import DataError, FolderError, first_line
from vimoe.files import write_text
from vimoe.terminal import track

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")  # copies and thumbnails that macOS and Synology leave beside the images
UNKNOWN = (-1, -1)  # the stamp of an image of which nothing says when it changes
MADE_BY = f"vimoe 1, Pillow {PIL.__version__}"  # another Pillow may read what this one does not
Stamp = tuple[int, int]  # of a file: bytes, modification time in ns
Entry = tuple[int, int, str]  # of a whole image in the cache: the stamp of its file, hash

logger = logging.getLogger(__name__)


class Packed(Protocol):
    """An image that is no file of its own, but a part of one: a member of an archive, a row of a table.

    It says where its bytes are and holds none of them, nor an open file: so it can be copied into any process.
    """

    @property
    def path(self) -> Path:
        """What it goes by in messages, lists and the cache: its file, and its name within."""

    @property
    def file(self) -> Path | None:
        """The file whose size and time change when the image does; None where that is not known."""

    def read(self) -> bytes:
        """The image as the bytes of an image file. May raise anything: `open_image` gives the reason."""


Source = Path | Packed


@dataclass(frozen=True)
class Tried:
    """What trying images found.

    Args:
        folder: the data folder, or the file that holds them all.
        digests: a hash of the bytes of each whole image.
        errors: why each of the others cannot be read.
    """

    folder: Path
    digests: dict[Source, str] = field(default_factory=dict)
    errors: dict[Source, str] = field(default_factory=dict)

    def __str__(self) -> str:
        first = [f"{name_within(self.folder, source)} ({why})" for source, why in list(self.errors.items())[:3]]
        rest = [f"{len(self.errors) - 3} more"] if len(self.errors) > 3 else []
        all_files = len(self.digests) + len(self.errors)
        return f"{len(self.errors)} of {all_files} images cannot be read: {', '.join([*first, *rest])}"


def place(source: Source) -> Path:
    """Where an image is: its file, or what it goes by as a part of one."""
    return source if isinstance(source, Path) else source.path


def name_within(folder: Path, source: Source) -> str:
    """What an image is called in lists and in the cache: its path from the data folder; whole where it is elsewhere."""
    path, depth = place(source), len(folder.parts)
    inside = path.parts[:depth] == folder.parts  # relative_to says the same, ten times as slowly
    return "/".join(path.parts[depth:]) if inside else str(path)


def open_image(source: Source | Image.Image) -> Image.Image:
    """An RGB image, turned as its EXIF tag says, on white where it is transparent; of an animation the first frame.

    Raises:
        DataError: naming the file (and the part of it) and the reason, where it cannot be read.
    """
    if isinstance(source, Image.Image):
        return source
    try:
        with source.open("rb") if isinstance(source, Path) else BytesIO(source.read()) as file:
            return _decode(file)
    except Exception as error:  # what decoders raise on damaged files has no common class
        raise DataError(
            f"{place(source)} cannot be read as an image ({_reason(error)}): expected a whole one"
        ) from error


def undecoded(source: Source) -> Image.Image:
    """An image as Pillow opens it, with its header read and no more. May raise anything."""
    return Image.open(source if isinstance(source, Path) else BytesIO(source.read()))


def image_size(source: Source) -> tuple[int, int]:
    """(height, width) of the image that `open_image` would give, from its header alone.

    Raises:
        DataError: as `open_image`.
    """
    try:
        with undecoded(source) as opened:
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            width, height = reversed(opened.size) if turned else opened.size
    except Exception as error:  # as in open_image
        raise DataError(
            f"{place(source)} cannot be read as an image ({_reason(error)}): expected a whole one"
        ) from error
    return height, width


def identity(source: Source | Image.Image) -> bytes:
    """What tells an image from others, and a file from what it was before it was changed.

    Raises:
        DataError: where it is gone.
    """
    if isinstance(source, Image.Image):
        return _digest(source.tobytes()) + repr(source.size).encode()
    file = source if isinstance(source, Path) else source.file
    try:
        if file is None:
            return _digest(source.read())  # type: ignore[union-attr]  # a Path is a file
        status = file.stat()
    except OSError as error:
        raise DataError(f"{place(source)} cannot be read ({error.strerror}): expected an image") from error
    return f"{place(source).absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


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


def try_images(sources: Sequence[Source], folder: Path) -> Tried:
    """Reads and decodes images, in threads because Pillow decodes without the GIL.

    Those that were whole are remembered in the user's cache, by path, size and modification time. Others are tried
    again each time: permissions and mounts are mended without a new modification time.

    Args:
        sources: images in `folder`.
        folder: the data folder or file, which has one cache file.
    """
    names = [name_within(folder, source) for source in sources]
    known = _read_cache(folder)
    fresh: dict[str, Entry] = {}
    tried = Tried(folder)

    def attempt(source: Source, name: str) -> Entry | str:
        try:
            file = source if isinstance(source, Path) else source.file
            stamp = _stamp(file) if file else None
            entry = known.get(name)
            if entry and entry[:2] == stamp:
                return entry
            content = source.read_bytes() if isinstance(source, Path) else source.read()
            _decode(BytesIO(content))
            return *(stamp or UNKNOWN), hashlib.blake2b(content, digest_size=16).hexdigest()
        except Exception as error:  # as in open_image
            return _reason(error)

    try:
        with ThreadPool() as pool:
            results = pool.imap(lambda item: attempt(*item), zip(sources, names, strict=True), chunksize=16)
            shown = track(results, "scanning images", len(sources))
            for source, name, result in zip(sources, names, shown, strict=True):
                if isinstance(result, str):
                    tried.errors[source] = result
                else:
                    tried.digests[source] = result[2]
                    if result[:2] != UNKNOWN:
                        fresh[name] = result
    finally:  # what an interrupted scan has done is kept too
        others = known.keys() - fresh.keys()  # images of another role or a class, or gone, or damaged since
        entries = {**{name: known[name] for name in others if _is_there(folder / name, known[name])}, **fresh}
        if entries != known:
            _write_cache(folder, entries)
    return tried


def cache_folder() -> Path:
    """Where the outcomes of scans are kept: vimoe/ in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vimoe"


def make_cache_folder(name: str, cache: str) -> Path:
    """A folder in `cache_folder` for what `DataConfig.cache` keeps. Raises FolderError where it cannot be made."""
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(
            f"data.cache={cache!r}: {folder} cannot be made ({error.strerror}); name another folder in "
            f"XDG_CACHE_HOME, or use data.cache=memory"
        ) from error
    return folder


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


def _stamp(file: Path) -> Stamp:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError("not a regular file")
    return status.st_size, status.st_mtime_ns


def _is_there(path: Path, entry: Entry) -> bool:
    """Whether an image is a file still, or in a file that is what it was."""
    holder = next((file for file in path.parents if file.is_file()), None)
    return _stamp(holder) == entry[:2] if holder else path.exists()


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
