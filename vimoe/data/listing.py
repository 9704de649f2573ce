"""A listing: the splits of a data set, the classes of each split, and the images of each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vimoe.data.image_files import find_images, is_hidden, kind_of_junk
from vimoe.data.images import Source, source_path
from vimoe.data.splits import is_split
from vimoe.errors import DataError
from vimoe.files import in_utf8

LOOSE = "images beside the class folders"  # a kind of junk that the user may have meant as data
ClassImages = dict[str, list[Source]]  # images by the name of their class


@dataclass(frozen=True)
class Listing:
    """Images by split and class. All later steps (roles, class map, scan) are the same for every kind of data.

    Args:
        name: name of the data in messages.
        root: data folder, or the file that holds all; images are named by their path from here.
        splits: names of the parts that may have a role.
        find: function that returns the images of each class of a split (None for data without splits), in the order of
            the class map, and counts other files in its second argument.
        word: word for a part in messages, "folder" or "split".
        junk: number of other files by kind; `classes` adds to it.
        in_order: function that gives class names of several splits the order of the class map; by default alphabetical.
    """

    name: str
    root: Path
    splits: tuple[str, ...]
    find: Callable[[str | None, Counter[str]], ClassImages]
    word: str = "folder"
    junk: Counter[str] = field(default_factory=Counter)
    in_order: Callable[[Iterable[str]], list[str]] = sorted

    def classes(self, split: str | None) -> ClassImages:
        """Return the images of each class of a split; None for data without splits."""
        return self.find(split, self.junk)

    def where(self, split: str | None) -> str:
        """Return the name of a split in messages."""
        if split is None:
            return self.name
        return f"{self.name}/{split}" if self.word == "folder" else f"{self.name}, split {split!r}"


def folder(root: Path) -> Listing:
    """List a folder of class folders, or of a folder of class folders for each split."""
    splits = tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
    return Listing(str(root), root, splits, lambda split, junk: _class_folders(root / (split or ""), junk))


def table(
    name: str, root: Path, rows: Iterable[tuple[str | None, str, Source]], order: Iterable[str], junk: Counter[str]
) -> Listing:
    """List rows of (split, class, image).

    Args:
        name: name of the data in messages.
        root: folder or file from which images are named.
        rows: split (None without splits), class and image.
        order: all classes; each split lists its own in this order.
        junk: number of other files by kind.
    """
    listed, order = list(rows), list(order)

    def find(split: str | None, _: Counter[str]) -> ClassImages:
        return by_class(((label, source) for here, label, source in listed if split in (None, here)), order)

    splits = {split for split, _, _ in listed if split}
    return Listing(name, root, tuple(sorted(splits)), find, "split", junk, lambda names: sorted(names, key=order.index))


def by_class(images: Iterable[tuple[str, Source]], order: Iterable[str]) -> ClassImages:
    """Group (class, image) pairs by class, in the given order; classes without images are left out."""
    found: ClassImages = {name: [] for name in order}
    for name, source in images:
        found[name].append(source)
    return {name: sources for name, sources in found.items() if sources}


def in_order(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels in the order of a class map: whole numbers by value, others by the alphabet.

    >>> in_order(["10", "9", "9"]), in_order(["10", "9", "b"])
    (['9', '10'], ['10', '9', 'b'])
    """
    labels = sorted(set(labels))
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else labels


def check_levels(listing: Listing, found: ClassImages, where: str) -> None:
    """Raise DataError if all images lie as class/split/image, because their splits would be merged silently."""
    if listing.word != "folder":  # a table names the class and split of every image
        return
    inside = {name: {_folder_of(image) for image in images} for name, images in found.items()}
    nested = {
        (name, each) for name, here in inside.items() if name not in here and all(map(is_split, here)) for each in here
    }
    if len({folder.lower() for _, folder in nested}) > 1:
        name, folder = min(nested)
        raise DataError(
            f"{where} has split folders inside of class folders, such as {name}/{folder}: expected {folder}/{name}; "
            f"swap the two levels"
        )


def _folder_of(image: Source) -> str:
    name = source_path(image).parent.name
    return in_utf8(name) if isinstance(image, Path) else name


def _class_folders(root: Path, junk: Counter[str]) -> ClassImages:
    """Return the image files of each subfolder, sorted, in one walk, since a walk over millions of files is slow."""
    found: ClassImages = {}
    for path in sorted(root.iterdir()):
        if not path.is_dir():
            junk[kind_of_junk(path.name) or LOOSE] += 1
        elif is_hidden(path.name):
            junk["hidden folders"] += 1
        elif root.resolve().is_relative_to(
            path.resolve()
        ):  # a link to a folder above, which holds the images of all classes
            junk["links to folders"] += 1
        else:
            files, others = find_images(path)
            found[in_utf8(path.name)] = list(files)
            junk.update(others)
    return found
