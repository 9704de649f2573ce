"""One image: its place in a file, archive or table, and its pixels as a model sees them."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from vimoe.errors import DataError, first_line

# Pillow's names of the formats that are read. Not all others are safe: for an EPS file Pillow starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
LARGEST = 1 << 30  # bytes of an image file; some decoders read all of it. An image of Pillow's pixel limit has half.
THIN = 16  # side ratio above which evaluation cuts the longer side
Stamp = tuple[int, int]  # size in bytes and modification time in ns of a file

# Let one text or colour profile of a PNG be as large as Pillow lets all of them together be. By default Pillow refuses
# an image for 1 MB of either.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
# Pillow warns from half of its pixel limit on. (Catching the warning where it is raised is not safe in threads.)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Packed(Protocol):
    """An image inside of another file: a member of an archive, or a row of a table.

    It knows the position of its bytes but holds neither them nor an open file, so any process can copy it.
    """

    @property
    def path(self) -> Path:
        """Name of the image in messages, lists and the cache: the path of the file, followed by the name inside."""

    @property
    def file(self) -> Path | None:
        """File whose size and time change when the image does; None if that is unknown."""

    def stream(self) -> BinaryIO:
        """Open the image as an image file, to be closed by the caller. May raise anything (`reason`)."""


Source = Path | Packed


def source_path(source: Source) -> Path:
    """Return the path of an image; for one inside of another file, the path of that file and the name inside."""
    return source if isinstance(source, Path) else source.path


def name_within(folder: Path, source: Source) -> str:
    """Return an image's name in lists and in the cache: its path from the data folder, or all of it if elsewhere.

    >>> name_within(Path("photos"), Path("photos/cat/1.jpg"))
    'cat/1.jpg'
    """
    path, depth = source_path(source), len(folder.parts)
    inside = path.parts[:depth] == folder.parts  # ten times as fast as relative_to
    return "/".join(path.parts[depth:]) if inside else str(path)


def open_image(source: Source | Image.Image) -> Image.Image:
    """Return an image as RGB, rotated by its EXIF tag, on white if transparent; of an animation the first frame.

    Raises:
        DataError: if it cannot be read, with its name and the reason.
    """
    if isinstance(source, Image.Image):
        return source
    try:
        with open_bytes(source) as file:
            return decode(file)
    except Exception as error:  # the errors of decoders on damaged files have no common class
        raise _unreadable(source, error) from error


@contextmanager
def undecoded(source: Source) -> Iterator[Image.Image]:
    """Yield an image of one of `FORMATS` with only its header read. May raise anything (`reason`)."""
    with open_bytes(source) as file:
        yield _header(file)


def image_size(source: Source) -> tuple[int, int]:
    """Return (height, width) of the result of `open_image`.

    The header alone is read, but for a PNG with metadata behind its pixels.

    Raises:
        DataError: errors of `open_image`.
    """
    try:
        with open_bytes(source) as file:
            opened = _header(file)
            size = opened.size
            if isinstance(opened, TiffImagePlugin.TiffImageFile):  # Pillow 13 gives the size when turned
                size = opened.tag_v2[ExifTags.Base.ImageWidth], opened.tag_v2[ExifTags.Base.ImageLength]
            whole = isinstance(opened, PngImagePlugin.PngImageFile) and _ends_with_pixels(file)
            tags = Image.Image.getexif(opened) if whole else opened.getexif()  # a PNG's own getexif decodes it
            turned = tags.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            width, height = reversed(size) if turned else size
    except Exception as error:  # see open_image
        raise _unreadable(source, error) from error
    return height, width


def reason(error: Exception) -> str:
    """Return the reason that an image cannot be read, in a few words."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; shrink it"
    text = (isinstance(error, OSError) and error.strerror) or first_line(error)
    if "MAX_TEXT" in text:  # Pillow's message names its variable, which means nothing to a user
        most = PngImagePlugin.MAX_TEXT_MEMORY >> 20
        return f"a text or a colour profile of more than {most} MB; save it again without metadata"
    return text


def is_thin(size: tuple[int, int]) -> bool:
    """Return True if one side of a (width, height) is more than `THIN` times the other."""
    return max(size) > THIN * min(size)


def identity(source: Source | Image.Image) -> bytes:
    """Return bytes that differ between images, and change when a file is changed.

    Raises:
        DataError: if the file is missing.
    """
    if isinstance(source, Image.Image):
        return digest(BytesIO(source.tobytes())) + repr(source.size).encode()
    path, file = source_path(source), source if isinstance(source, Path) else source.file
    try:
        if file is None:
            with open_bytes(source) as opened:
                return digest(opened)
        status = file.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): expected an image") from error
    return f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape")


def open_bytes(source: Source) -> BinaryIO:
    """Open the bytes of an image file. May raise anything (`reason`)."""
    if not isinstance(source, Path):
        return source.stream()
    stamp(source)  # refuses, for example, a pipe that nobody writes to
    return source.open("rb")


def digest(file: BinaryIO) -> bytes:
    """Return a hash (16 bytes) of an open file, read in pieces."""
    file.seek(0)
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()  # type: ignore[arg-type]


def stamp(file: Path) -> Stamp:
    """Return size and modification time of a regular file. Raises DataError for any other, OSError if missing."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError("not a regular file")
    return status.st_size, status.st_mtime_ns


def decode(file: BinaryIO) -> Image.Image:
    """Return an open image file as RGB, as `open_image` does. May raise anything (`reason`)."""
    image = _header(file)
    ImageOps.exif_transpose(image, in_place=True)
    # convert would clip all values above 255 instead of scaling; Pillow has those of a PGM of 16 bits in 32
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        values = np.asarray(image).astype("uint32")
        values[values == image.info.get("transparency")] = 2**16 - 1
        image = Image.fromarray(((values + 128) // 257).astype("uint8"))  # rounded
    if image.mode in ("I", "F"):
        raise DataError(f"32 bits a pixel (mode {image.mode}), whose white level is unknown")
    if image.has_transparency_data:  # convert would show the hidden colours of transparent pixels
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _header(file: BinaryIO) -> Image.Image:
    start, size = file.read(12), file.seek(0, os.SEEK_END)
    if size > LARGEST:
        raise DataError(f"{size / 1e9:.1f} GB that begin with {start!r}: more than {LARGEST / 1e9:.1f} GB; shrink it")
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise DataError(f"no known image format, it begins with {start!r}" if start else "the file is empty") from error
    if "exif" in image.info:  # damaged metadata say nothing of the pixels; Pillow raises once, and then has no tags
        with suppress(Exception):
            image.getexif()
    return image


def _ends_with_pixels(file: BinaryIO) -> bool:
    """Return True if nothing follows the pixels of an open PNG, such as metadata."""
    start, kinds = file.tell(), [b""]
    file.seek(8)  # behind the signature
    while len(head := file.read(8)) == 8 and (kinds[-1] != b"IDAT" or head[4:] == b"IDAT"):
        kinds.append(head[4:])
        file.seek(int.from_bytes(head[:4]) + 4, os.SEEK_CUR)  # the chunk, and its check sum
    file.seek(start)
    return head[4:] == b"IEND"


def _unreadable(source: Source, error: Exception) -> DataError:
    return DataError(f"{source_path(source)} cannot be read as an image ({reason(error)}): expected a whole one")
