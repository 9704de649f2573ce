"""Images: the files in a folder, one as a model sees it, and all of them tried once and remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from vimoe.errors import DataError, FolderError, first_line
from vimoe.files import read_text, write_text
from vimoe.terminal import track

ENDINGS = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
# Pillow's names of what has these endings. Others that it knows are not safe: of an EPS it starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
LARGEST = 1 << 30  # bytes of an image file, of which some decoders read all; the most pixels have half of it in RGB
THIN = 16  # side ratio above which evaluation cuts the longer side
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")  # copies and thumbnails that macOS and Synology leave beside the images
UNKNOWN = (-1, -1)  # the stamp of an image of which nothing says when it changes
MADE_BY = f"vimoe 2, Pillow {PIL.__version__}"  # another Pillow may read what this one does not
Stamp = tuple[int, int]  # of a file: bytes, modification time in ns
Entry = tuple[int, int, str, int, int]  # of a whole image in the cache: the stamp of its file, hash, width, height

logger = logging.getLogger(__name__)

# A text or a colour profile of PNG may be as large as Pillow lets all texts of an image be. (Without that it refuses
# images for 1 MB of either.)
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
# Pillow warns of each image from half of the pixels on that it refuses. (To catch the warning is not safe in threads.)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


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

    def stream(self) -> BinaryIO:
        """The image as an image file, to be closed. May raise anything: `open_image` gives the reason."""


Source = Path | Packed


@dataclass(frozen=True)
class Tried:
    """What trying images found.

    Args:
        folder: the data folder, or the file that holds them all.
        digests: a hash of the bytes of each whole image.
        sizes: (width, height) of each whole image.
        errors: why each of the others cannot be read.
    """

    folder: Path
    digests: dict[Source, str] = field(default_factory=dict)
    sizes: dict[Source, tuple[int, int]] = field(default_factory=dict)
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
        with _file(source) as file:
            return _decode(file)
    except Exception as error:  # what decoders raise on damaged files has no common class
        raise _unreadable(source, error) from error


@contextmanager
def undecoded(source: Source) -> Iterator[Image.Image]:
    """An image with its header read and no more, of one of `FORMATS`. May raise anything: `reason` puts it in words."""
    with _file(source) as file:
        yield _header(file)


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
        raise _unreadable(source, error) from error
    return height, width


def reason(error: Exception) -> str:
    """Why an image cannot be read, in a few words."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; shrink it"
    text = (isinstance(error, OSError) and error.strerror) or first_line(error)
    if "MAX_TEXT" in text:  # the name of a variable of Pillow
        most = PngImagePlugin.MAX_TEXT_MEMORY >> 20
        return f"a text or a colour profile of more than {most} MB; save it again without metadata"
    return text


def is_thin(size: tuple[int, int]) -> bool:
    """True for a (width, height) of which one is more than `THIN` times the other."""
    return max(size) > THIN * min(size)


def identity(source: Source | Image.Image) -> bytes:
    """What tells an image from others, and a file from what it was before it was changed.

    Raises:
        DataError: where it is gone.
    """
    if isinstance(source, Image.Image):
        return _digest(BytesIO(source.tobytes())) + repr(source.size).encode()
    file = source if isinstance(source, Path) else source.file
    try:
        if file is None:
            with _file(source) as opened:
                return _digest(opened)
        status = file.stat()
    except OSError as error:
        raise DataError(f"{place(source)} cannot be read ({error.strerror}): expected an image") from error
    return f"{place(source).absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape")


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


def passed_over(junk: Mapping[str, int]) -> str:
    """Words for the files without an image's ending, where a message says that there is no image; none without any."""
    files = [f"{count} {kind}" for kind, count in junk.items() if kind.startswith(".")]
    known = ", ".join(sorted(ENDINGS))
    return f" ({', '.join(files[:6])} were passed over, what is read is {known}; convert them)" if files else ""


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
            with _file(source) as opened:
                size = _decode(opened).size
                return *(stamp or UNKNOWN), _digest(opened).hex(), *size
        except Exception as error:  # as in open_image
            return reason(error)

    try:
        with ThreadPool() as pool:
            results = pool.imap(lambda item: attempt(*item), zip(sources, names, strict=True), chunksize=16)
            shown = track(results, "scanning images", len(sources))
            for source, name, result in zip(sources, names, shown, strict=True):
                if isinstance(result, str):
                    tried.errors[source] = result
                else:
                    _, _, tried.digests[source], *size = result
                    tried.sizes[source] = size[0], size[1]
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


def _unreadable(source: Source, error: Exception) -> DataError:
    return DataError(f"{place(source)} cannot be read as an image ({reason(error)}): expected a whole one")


def _file(source: Source) -> BinaryIO:
    if not isinstance(source, Path):
        return source.stream()
    _stamp(source)  # which refuses what is no file, such as a pipe that nobody writes to
    return source.open("rb")


def _digest(file: BinaryIO) -> bytes:
    """Hash of a file, which is read in pieces."""
    file.seek(0)
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()  # type: ignore[arg-type]


def _header(file: BinaryIO) -> Image.Image:
    start, size = file.read(12), file.seek(0, os.SEEK_END)
    if size > LARGEST:
        raise DataError(f"{size / 1e9:.1f} GB that begin with {start!r}: more than {LARGEST / 1e9:.1f} GB; shrink it")
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise DataError(f"no known image format, it begins with {start!r}" if start else "the file is empty") from error


def _decode(file: BinaryIO) -> Image.Image:
    image = _header(file)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # convert would clip what is above 255, and so nearly everything
        image = Image.fromarray(((np.asarray(image).astype("uint32") + 128) // 257).astype("uint8"))  # to the nearest
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


def _cannot_list(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} cannot be listed ({error.strerror}): expected a folder of images") from error


def _cache_file(folder: Path) -> Path:
    whole = folder.resolve()
    return cache_folder() / f"{whole.name[:50]}-{hashlib.blake2b(os.fsencode(whole), digest_size=8).hexdigest()}.json"


def _read_cache(folder: Path) -> dict[str, Entry]:
    """What is remembered of a folder; nothing where the file is missing, damaged or another version's."""
    try:
        stored = json.loads(read_text(_cache_file(folder)))
        files = stored["files"] if stored["made_by"] == MADE_BY else {}
        return {
            name: (int(size), int(time), str(digest), int(width), int(height))
            for name, (size, time, digest, width, height) in files.items()
        }
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write_cache(folder: Path, entries: dict[str, Entry]) -> None:
    try:
        path = _cache_file(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"made_by": MADE_BY, "folder": str(folder.resolve()), "files": entries}))
    except (OSError, RuntimeError, FolderError) as error:  # pathlib's RuntimeError: there is no home
        logger.warning("the scan of %s is not remembered, the next one starts anew: %s", folder, first_line(error))
