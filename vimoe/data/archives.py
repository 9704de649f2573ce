"""Tar files, read in place: class folders as on disk, or WebDataset's samples of an image and its label."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vimoe.data.images import ENDINGS, Source, is_hidden, kind_of_junk
from vimoe.data.listing import LOOSE, ClassImages, Listing, in_order, is_split, split_in, table
from vimoe.errors import DataError, first_line, nearest
from vimoe.files import read_text
from vimoe.terminal import track

COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz", ".tbz2", ".tar.zst", ".tzst")
COMPRESSED_START = (b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")
CLASS_LISTS = ("classes.txt", "classnames.txt")
LARGEST_LABEL = 1 << 20  # bytes; more is some other .cls or .json file
Parts = tuple[str, ...]  # of the path of a member: its folders and its file name


@dataclass(frozen=True, slots=True)
class Member:
    """A `Packed` image: a part of a file that is an image file itself, or would be one with a header before it."""

    file: Path
    name: str
    offset: int
    size: int
    header: bytes = b""

    @property
    def path(self) -> Path:
        return self.file / self.name

    def stream(self) -> BinaryIO:
        file = self.file.open("rb")  # anew each time: an open file is not to be shared by threads or processes
        if os.fstat(file.fileno()).st_size < self.offset + self.size:
            file.close()
            raise EOFError(f"{self.file.name} ends within it")
        part = io.BufferedReader(_Part(file, self.offset, self.size))
        if not self.header:
            return part
        with part:
            return io.BytesIO(self.header + part.read())


class _Part(io.RawIOBase):
    """A part of an open file, as a file of its own. It has no number that a decoder could read the whole file by."""

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
class _Contents:
    images: dict[Parts, Member] = field(default_factory=dict)
    labels: dict[Parts, str] = field(default_factory=dict)  # of WebDataset's samples, by their key
    explicit: bool = False  # whether a label was a .cls file


def is_archive(path: Path) -> bool:
    """Whether a file is a tar file by its name, compressed or not."""
    return path.name.lower().endswith((".tar", *COMPRESSED))


def find_archives(folder: Path) -> list[Path]:
    """The tar files of which a folder consists, or its folders for each role; none where it has other folders.

    Because archives often lie beside what was unpacked from them.
    """
    folders = [path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)]
    if not all(is_split(path.name) for path in folders):
        return []
    beside = [path for path in sorted(folder.iterdir()) if path not in folders and not is_hidden(path.name)]
    inside = [path for place in folders for path in sorted(place.iterdir()) if not is_hidden(path.name)]
    if any(path.is_dir() for path in inside) or (folders and not any(map(is_archive, inside))):
        return []
    return [path for path in (*beside, *inside) if is_archive(path)]


def archives(root: Path, files: Sequence[Path]) -> Listing:
    """Tar files as one listing.

    Args:
        root: the data path: the file itself, or the folder that the files are in.
        files: the tar files.

    Raises:
        DataError: for one that is compressed, damaged or cut short; or a sample without a label, or with one that is
            not in the list of classes.
    """
    junk: Counter[str] = Counter()
    contents = {file: _index(file, junk) for file in track(files, "reading archives")}
    flat = all(len(parts) == 1 for inside in contents.values() for parts in inside.images)
    if any(inside.explicit or (flat and inside.labels) for inside in contents.values()):
        return _samples(root, contents, junk)
    return _folders(root, contents, junk)


def _folders(root: Path, contents: dict[Path, _Contents], junk: Counter[str]) -> Listing:
    """What unpacking all of them into one folder would give; train.tar into train/, and cat.tar without folders too."""
    entries: list[tuple[Parts, Source]] = []
    in_one_folder = _in_one_folder(parts for inside in contents.values() for parts in inside.images)
    for archive, inside in contents.items():
        split = _split(root, archive)
        above = in_one_folder or (split is not None and all(is_split(parts[0]) for parts in inside.images))
        for parts, member in inside.images.items():
            parts = parts[1:] if above else parts
            if len(parts) == 1 and len(contents) > 1 and not split_in(archive.stem):
                parts = (archive.stem, *parts)
            entries.append(((split, *parts) if split else parts, member))
    entries.sort(key=lambda entry: entry[0])

    def find(split: str | None, junk: Counter[str]) -> ClassImages:
        found: ClassImages = {}
        for parts, member in entries:
            if split is not None and parts[0] != split:
                continue
            within = parts[1:] if split is not None else parts
            if len(within) > 1:
                found.setdefault(within[0], []).append(member)
            else:
                junk[LOOSE] += 1
        return found

    splits = tuple(sorted({parts[0] for parts, _ in entries if len(parts) > 1}))
    return Listing(str(root), root, splits, find, junk=junk)


def _in_one_folder(images: Iterable[Parts]) -> bool:
    """Whether a folder was packed with its name, `photos/cat/1.jpg`, rather than what is in it."""
    tops = {parts[0] if len(parts) > 2 else "" for parts in images}
    return len(tops) == 1 and not any(not top or is_split(top) for top in tops)


def _split(root: Path, archive: Path) -> str | None:
    """The split that an archive is of, by its folder or its name; none for the only one."""
    if archive == root:
        return None
    return archive.parent.name if archive.parent != root else split_in(archive.stem)


def _samples(root: Path, contents: dict[Path, _Contents], junk: Counter[str]) -> Listing:
    names = _class_list(root if root.is_dir() else root.parent)
    rows: list[tuple[str | None, str, Source]] = []
    unlabelled: list[Member] = []
    classes: dict[str, str] = {}  # by label
    splits = {archive: _split(root, archive) for archive in contents}
    for archive, inside in contents.items():
        if not splits[archive] and any(splits.values()):
            junk["archives without a role"] += 1
            continue
        done: set[Parts] = set()
        for parts, member in sorted(inside.images.items()):
            key, ending = _key(parts)
            if ending not in ENDINGS or key in done:
                junk["further images of a sample"] += 1
                continue
            done.add(key)
            label = inside.labels.get(key)
            if not label:
                unlabelled.append(member)
                continue
            if label not in classes:
                classes[label] = _class_name(label, names, member)
            rows.append((splits[archive], classes[label], member))
    if unlabelled:
        first = ", ".join(str(member.path) for member in unlabelled[:3])
        raise DataError(
            f"{len(unlabelled)} samples of {root} have no label, such as {first}: expected a .cls beside each"
        )
    return table(str(root), root, rows, names or in_order(classes.values()), junk)


def _class_list(folder: Path) -> list[str]:
    file = next((folder / name for name in CLASS_LISTS if (folder / name).is_file()), None)
    names = [line.strip() for line in read_text(file).split("\n")] if file else []
    while names and not names[-1]:
        names.pop()
    if len(set(names)) < len(names) or "" in names:
        raise DataError(f"{file} has an empty line or a class twice: expected a different name on each line")
    return names


def _class_name(label: str, names: list[str], member: Member) -> str:
    if not names or label in names:
        return label
    if not label.isdecimal():
        raise DataError(
            f"{member.path} is of class {label!r}, which is not in the list of classes; {nearest(label, names)}"
        )
    if int(label) >= len(names):
        raise DataError(f"{member.path} is of class {label}: expected 0 to {len(names) - 1}, by the list of classes")
    return names[int(label)]


def _key(parts: Parts) -> tuple[Parts, str]:
    """What a sample's members share, and the rest of this one's name: all from its first dot on, in small letters."""
    stem, dot, ending = parts[-1].partition(".")
    return (*parts[:-1], stem), (dot + ending).lower()


def _index(archive: Path, junk: Counter[str]) -> _Contents:
    contents = _Contents()
    try:
        with archive.open("rb") as file:
            if file.read(6).startswith(COMPRESSED_START):
                raise DataError(
                    f"{archive} is compressed, so that no image in it can be reached without all before it: expected a "
                    f"plain tar file; decompress it, or unpack it into a folder"
                )
            for parts, member in _members(archive, file, junk):
                _add(contents, parts, member, junk)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:  # ValueError: numbers in a damaged header
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{archive} cannot be read as a tar file ({first_line(error)}): expected a whole one; copy or make it again"
        ) from error
    return contents


def _members(archive: Path, file: BinaryIO, junk: Counter[str]) -> Iterator[tuple[Parts, Member]]:
    """The regular files in an archive. Nothing is written anywhere, so a name can lead nowhere."""
    sizes: dict[str, tuple[int, int]] = {}
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while info := tar.next():
            # what it keeps of a million members would fill the memory
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
    if file.read(1 << 20).strip(b"\0"):  # tarfile ends without a word at a damaged header, or where a second tar begins
        raise DataError(
            f"{archive} is damaged at byte {end}, or several archives in one file: expected one whole tar file; copy "
            f"or make it again"
        )


def _add(contents: _Contents, parts: Parts, member: Member, junk: Counter[str]) -> None:
    key, ending = _key(parts)
    if not kind_of_junk(parts[-1]):
        contents.images[parts] = member  # of several with one name the last is meant
    elif ending in (".cls", ".json") and member.size <= LARGEST_LABEL and (label := _label(member, ending)):
        contents.explicit |= ending == ".cls"
        if ending == ".cls" or key not in contents.labels:
            contents.labels[key] = label
    else:
        junk[kind_of_junk(parts[-1])] += 1


def _label(member: Member, ending: str) -> str:
    """What a .cls file says, or the field "label" of a .json file; nothing where it says nothing."""
    with member.stream() as file:
        text = file.read().decode("utf-8", "replace").strip()
    if ending == ".cls":
        return text
    try:
        label = json.loads(text)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return str(label).strip() if isinstance(label, (int, str)) and not isinstance(label, bool) else ""
