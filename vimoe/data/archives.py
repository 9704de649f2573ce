"""Tar files as a listing: class folders as on disk, or WebDataset samples of an image and its label."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from vimoe.data.image_files import ENDINGS, is_hidden
from vimoe.data.images import Source
from vimoe.data.listing import LOOSE, ClassImages, Listing, in_order, table
from vimoe.data.splits import is_split, split_in
from vimoe.data.tar_index import Contents, Member, Parts, index_tar, sample_key
from vimoe.errors import DataError, counted, nearest
from vimoe.files import read_text
from vimoe.terminal import track

COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz", ".tbz2", ".tar.zst", ".tzst")
_NUMBERS = re.compile(r"(?<=.)[-_.]\d+([-_.](\d+|of))*$")  # of a shard, at the end of its name
CLASS_LISTS = ("classes.txt", "classnames.txt")


def is_archive(path: Path) -> bool:
    """Return True for the name of a tar file, compressed or not."""
    return path.name.lower().endswith((".tar", *COMPRESSED))


def find_archives(folder: Path) -> list[Path]:
    """Return the tar files in a folder and in its split folders; [] if it has other folders.

    Archives often lie beside the folders that were unpacked from them, and these are then meant.
    """
    folders = [path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)]
    if not all(is_split(path.name) for path in folders):
        return []
    beside = [path for path in sorted(folder.iterdir()) if path not in folders and not is_hidden(path.name)]
    inside = [path for split in folders for path in sorted(split.iterdir()) if not is_hidden(path.name)]
    if any(path.is_dir() for path in inside) or (folders and not any(map(is_archive, inside))):
        return []
    return [path for path in (*beside, *inside) if is_archive(path)]


def archives(root: Path, files: Sequence[Path]) -> Listing:
    """List the images of tar files together.

    Args:
        root: data path, which is the file itself or the folder of the files.
        files: tar files.

    Raises:
        DataError: if a file is compressed, damaged or cut short, or a sample has no label or an unknown one.
    """
    junk: Counter[str] = Counter()
    contents = {file: index_tar(file, junk) for file in track(files, "reading archives")}
    flat = all(len(parts) == 1 for inside in contents.values() for parts in inside.images)
    if any(inside.explicit or (flat and inside.labels) for inside in contents.values()):
        return _samples(root, contents, junk)
    return _folders(root, contents, junk)


def _folders(root: Path, contents: dict[Path, Contents], junk: Counter[str]) -> Listing:
    """List the folder that unpacking would give: train.tar goes to train/, and cat.tar without folders to cat/."""
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
    """Return True if all images lie in one top folder, `photos/cat/1.jpg`, that is neither a class nor a split."""
    tops = {parts[0] if len(parts) > 2 else "" for parts in images}
    return len(tops) == 1 and not any(not top or is_split(top) for top in tops)


def _split(root: Path, archive: Path) -> str | None:
    """Return the split of an archive by its folder or name; None for the only archive."""
    if archive == root:
        return None
    return archive.parent.name if archive.parent != root else split_in(archive.stem)


def _samples(root: Path, contents: dict[Path, Contents], junk: Counter[str]) -> Listing:
    """List WebDataset samples: files with one name up to the first dot, one of them an image and one its label."""
    names = _class_list(root if root.is_dir() else root.parent)
    rows: list[tuple[str | None, str, Source]] = []
    unlabelled: list[Member] = []
    classes: dict[str, str] = {}  # class names by label
    roles = {archive: _split(root, archive) for archive in contents}
    splits = roles
    if any(roles.values()):  # then others are splits too, which have no role until a setting gives them one
        splits = {archive: split or _NUMBERS.sub("", archive.stem) for archive, split in roles.items()}
    for archive, inside in contents.items():
        done: set[Parts] = set()
        for parts, member in sorted(inside.images.items()):
            key, ending = sample_key(parts)
            if ending not in ENDINGS or key in done:
                junk["further images of a sample"] += 1
                continue
            done.add(key)
            label = inside.labels.get(key)
            if not label and splits[archive] != roles[archive]:
                junk["images without a label in archives without a role"] += 1
                continue
            if not label:
                unlabelled.append(member)
                continue
            if label not in classes:
                classes[label] = _class_name(label, names, member)
            rows.append((splits[archive], classes[label], member))
    if unlabelled:
        first = ", ".join(str(member.path) for member in unlabelled[:3])
        raise DataError(
            f"{counted(len(unlabelled), f'sample of {root} has', f'samples of {root} have')} no label, "
            f"such as {first}: expected a .cls "
            f"file beside each; add them, or remove the samples"
        )
    return table(str(root), root, rows, names or in_order(classes.values()), junk)


def _class_list(folder: Path) -> list[str]:
    file = next((folder / name for name in CLASS_LISTS if (folder / name).is_file()), None)
    names = [line.strip() for line in read_text(file).split("\n")] if file else []
    while names and not names[-1]:
        names.pop()
    if len(set(names)) < len(names) or "" in names:
        raise DataError(
            f"{file} has an empty line or repeats a class: expected a different name on each line; correct it"
        )
    return names


def _class_name(label: str, names: list[str], member: Member) -> str:
    if not names or label in names:
        return label
    if not label.isdecimal():
        raise DataError(
            f"{member.path} is of class {label!r}: expected one of the list of classes; {nearest(label, names)}"
        )
    if int(label) >= len(names):
        raise DataError(
            f"{member.path} is of class {label}: expected 0 to {len(names) - 1}; complete the list of classes"
        )
    return names[int(label)]
