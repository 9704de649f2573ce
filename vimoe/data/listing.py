"""What a data path holds before anything has a role: splits, the classes in each, the images of each class."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vimoe.data.images import Source, find_images, is_hidden, kind_of_junk, place
from vimoe.errors import DataError
from vimoe.files import in_utf8

# other names that data sets in the wild use for a role; the configured name comes first
SYNONYMS = {"train": ("training",), "val": ("valid", "validation"), "test": ("testing",)}
SPLITS = frozenset(SYNONYMS).union(*SYNONYMS.values())
LOOSE = "images beside the class folders"  # the kind of junk that may be meant as data
ClassImages = dict[str, list[Source]]  # the images of each class, by its name


@dataclass(frozen=True)
class Listing:
    """Images by split and class. All that follows, roles and class map and scan, is the same for every kind of data.

    Args:
        name: what messages call it.
        root: the data folder, or the file that holds all; images are named by their path from here.
        splits: names of parts that may have a role.
        find: the images of each class of a split, or of all where there is none, in the order of the class map;
            counts what else is there in the second argument.
        word: what a part is called.
        junk: what was found beside images, by kind; `classes` adds to it.
    """

    name: str
    root: Path
    splits: tuple[str, ...]
    find: Callable[[str | None, Counter[str]], ClassImages]
    word: str = "folder"
    junk: Counter[str] = field(default_factory=Counter)

    def classes(self, split: str | None) -> ClassImages:
        """The images of each class, of one split or of data without any."""
        return self.find(split, self.junk)

    def where(self, split: str | None) -> str:
        """A split in messages."""
        if split is None:
            return self.name
        return f"{self.name}/{split}" if self.word == "folder" else f"{self.name}, split {split!r}"


def folder(root: Path) -> Listing:
    """A folder of class folders, or of such folders for each role."""
    splits = tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
    return Listing(str(root), root, splits, lambda split, junk: _class_folders(root / (split or ""), junk))


def table(
    name: str, root: Path, rows: Iterable[tuple[str | None, str, Source]], order: Iterable[str], junk: Counter[str]
) -> Listing:
    """A listing of (split, class, image). Classes are in the given order, in each split those that it has."""
    listed, order = list(rows), list(order)

    def find(split: str | None, _: Counter[str]) -> ClassImages:
        return by_class(((label, source) for here, label, source in listed if split in (None, here)), order)

    splits = {split for split, _, _ in listed if split}
    return Listing(name, root, tuple(sorted(splits)), find, "split", junk)


def by_class(images: Iterable[tuple[str, Source]], order: Iterable[str]) -> ClassImages:
    """The images of each class that has any, in the given order of classes."""
    found: ClassImages = {name: [] for name in order}
    for name, source in images:
        found[name].append(source)
    return {name: sources for name, sources in found.items() if sources}


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels as a class map has them: whole numbers by their value, else by the alphabet."""
    labels = sorted(set(labels))
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else labels


def is_split(name: str) -> bool:
    """Return True for what data sets call a role, in small or capital letters."""
    return name.lower() in SPLITS


def check_levels(listing: Listing, found: ClassImages, where: str) -> None:
    """Raise DataError where all images lie as class/split/image, so that the splits would be merged without a word."""
    if listing.word != "folder":  # in a table every image has its class and split in writing
        return
    inside = {name: {_folder_of(image) for image in images} for name, images in found.items()}
    nested = {
        (name, each) for name, here in inside.items() if name not in here and all(map(is_split, here)) for each in here
    }
    if len({folder.lower() for _, folder in nested}) > 1:
        name, folder = min(nested)
        raise DataError(
            f"{where} has folders of roles inside of class folders, such as {name}/{folder}: expected {folder}/{name}; "
            f"exchange the two levels"
        )


def _folder_of(image: Source) -> str:
    name = place(image).parent.name
    return in_utf8(name) if isinstance(image, Path) else name


def split_in(name: str) -> str | None:
    """The split that an archive's name ends with, but for numbers: "train" of "imagenet-train-0012-of-0099"."""
    found = re.fullmatch(rf"(?:.*[-_.])?({'|'.join(sorted(SPLITS))})(?:[-_.]?(?:\d+|of))*", name, re.IGNORECASE)
    return found[1].lower() if found else None


def _class_folders(root: Path, junk: Counter[str]) -> ClassImages:
    """The image files of each folder inside, in sorted order; one walk, since a walk of millions is slow."""
    found: ClassImages = {}
    for path in sorted(root.iterdir()):
        if not path.is_dir():
            junk[kind_of_junk(path.name) or LOOSE] += 1
        elif is_hidden(path.name):
            junk["hidden folders"] += 1
        elif root.resolve().is_relative_to(path.resolve()):  # it would hold the images of all classes
            junk["links to folders"] += 1
        else:
            files, others = find_images(path)
            found[in_utf8(path.name)] = list(files)
            junk.update(others)
    return found
