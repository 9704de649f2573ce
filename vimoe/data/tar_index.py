"""The images in a tar file, found without unpacking it, and each read from its bytes in the file."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vimoe.data.image_files import is_hidden, kind_of_junk
from vimoe.errors import DataError, first_line

COMPRESSED_START = (b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")
LARGEST_LABEL = 1 << 20  # bytes; a larger .cls or .json file is no label
Parts = tuple[str, ...]  # path of a member: its folders and its file name


@dataclass(frozen=True, slots=True)
class Member:
    """A `Packed` image: a range of bytes in a file.

    Args:
        file: the file.
        name: name of the image within the file.
        offset, size: range in bytes.
        header: bytes that make an image file of the range, in front of it.
    """

    file: Path
    name: str
    offset: int
    size: int
    header: bytes = b""

    @property
    def path(self) -> Path:
        return self.file / self.name

    def stream(self) -> BinaryIO:
        file = self.file.open("rb")  # opened for each image: threads and processes must not share a file position
        if os.fstat(file.fileno()).st_size < self.offset + self.size:
            file.close()
            raise EOFError(f"{self.file.name} ends within it")
        part = io.BufferedReader(_Part(file, self.offset, self.size))
        if not self.header:
            return part
        with part:
            return io.BytesIO(self.header + part.read())


class _Part(io.RawIOBase):
    """A range of an open file, as a file of its own, without the descriptor by which a decoder could read the rest."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size, self.at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        some = self.file.read(max(0, min(len(buffer), self.size - self.at)))
        buffer[: len(some)] = some
        self.at += len(some)
        return len(some)

    def close(self) -> None:
        self.file.close()
        super().close()


@dataclass
class Contents:
    """Images and labels in a tar file.

    Attributes:
        images: images by path.
        labels: labels of WebDataset samples by key (`sample_key`).
        explicit: True if a label was a .cls file.
    """

    images: dict[Parts, Member] = field(default_factory=dict)
    labels: dict[Parts, str] = field(default_factory=dict)
    explicit: bool = False


def sample_key(parts: Parts) -> tuple[Parts, str]:
    """Return the key that all members of a WebDataset sample share, and the ending of this one in small letters.

    >>> sample_key(("train", "0001.seg.PNG"))
    (('train', '0001'), '.seg.png')
    """
    stem, dot, ending = parts[-1].partition(".")
    return (*parts[:-1], stem), (dot + ending).lower()


def index_tar(archive: Path, junk: Counter[str]) -> Contents:
    """Find the images and labels in a tar file.

    Args:
        archive: the file.
        junk: number of other members by kind; added to.

    Raises:
        DataError: if the file is compressed, damaged or cut short.
    """
    contents = Contents()
    try:
        with archive.open("rb") as file:
            if file.read(6).startswith(COMPRESSED_START):
                raise DataError(
                    f"{archive} is compressed, so an image can only be read after all before it: expected a plain "
                    f"tar file; decompress it, or unpack it into a folder"
                )
            for parts, member in _members(archive, file, junk):
                _add(contents, parts, member, junk)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:  # ValueError: a damaged header
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{archive} cannot be read as a tar file ({first_line(error)}): expected a whole one; copy it again"
        ) from error
    return contents


def _members(archive: Path, file: BinaryIO, junk: Counter[str]) -> Iterator[tuple[Parts, Member]]:
    """Yield the regular files in an archive. Nothing is unpacked, so a malicious name does no harm."""
    sizes: dict[str, tuple[int, int]] = {}
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while info := tar.next():
            # tarfile keeps every member that it has seen, which would fill the memory for millions
            tar.members.clear()  # type: ignore[attr-defined]
            parts = tuple(part for part in info.name.split("/") if part not in ("", "."))
            if info.isdir():
                continue
            if info.isreg() and not info.issparse():
                sizes[info.name] = info.offset_data, info.size
            target = info.linkname if info.islnk() else info.name
            if target not in sizes or ".." in parts or not parts:
                junk["links and special files"] += 1
            elif any(map(is_hidden, parts)):
                junk["hidden files"] += 1
            else:
                yield parts, Member(archive, "/".join(parts), *sizes[target])
        end = tar.offset
    file.seek(end)
    # tarfile stops silently at a damaged header, and at the end of the first of two archives
    if file.read(1 << 20).strip(b"\0"):
        raise DataError(
            f"{archive} is damaged at byte {end}, or holds several archives: expected one whole tar file; copy it again"
        )


def _add(contents: Contents, parts: Parts, member: Member, junk: Counter[str]) -> None:
    key, ending = sample_key(parts)
    if not kind_of_junk(parts[-1]):
        contents.images[parts] = member  # of several members with one name the last counts, as in unpacking
    elif ending in (".cls", ".json") and member.size <= LARGEST_LABEL and (label := _label(member, ending)):
        contents.explicit |= ending == ".cls"
        if ending == ".cls" or key not in contents.labels:
            contents.labels[key] = label
    else:
        junk[kind_of_junk(parts[-1])] += 1


def _label(member: Member, ending: str) -> str:
    """Return the text of a .cls file, or the field "label" of a .json file; "" if there is none."""
    with member.stream() as file:
        text = file.read().decode("utf-8-sig", "replace").strip()
    if ending == ".cls":
        return text
    try:
        label = json.loads(text)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return str(label).strip() if isinstance(label, (int, str)) and not isinstance(label, bool) else ""
