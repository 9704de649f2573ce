"""Checks of labelled images: several classes, no two names alike, images in class folders, no masks."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vimoe.data.image_check import CheckedImages
from vimoe.data.image_files import find_images, passed_over
from vimoe.data.listing import LOOSE, ClassImages, Listing, check_levels
from vimoe.data.roles import Place, Split
from vimoe.data.scene_layouts import LAYOUTS
from vimoe.errors import DataError, counted


def check_train(listing: Listing, split: Split, found: ClassImages) -> None:
    """Raise DataError if the train images are not the class folders of a classification."""
    where = listing.where(split)
    check_names(where, found)
    if masks := _of_masks(where, found):
        raise DataError(f"{masks}; to learn masks, set --data.task segmentation")
    if empty := [name for name, images in found.items() if not images]:
        inside = Path(where, empty[0])
        junk = find_images(inside)[1] if inside.is_dir() else {}  # no folder if its name is not in UTF-8
        raise DataError(
            f"{where}/{empty[0]} holds no image{passed_over(junk)}: expected some; add images, or remove the folder"
        )
    check_levels(listing, found, where)
    check_loose(
        listing, split, found, f"; if {split!r} is a class itself, set --data.train_split none" if split else ""
    )


def check_other_data(listing: Listing, split: Split, found: ClassImages, classes: Sequence[str]) -> None:
    """Raise DataError if the images that a trained model is to score are not in folders of its classes."""
    where = listing.where(split)
    if (masks := _of_masks(where, found)) and not set(found) <= set(classes):
        raise DataError(f"{masks}, as the model gives; check the path or the run")
    check_loose(listing, split, found)
    check_levels(listing, found, where)


def check_loose(listing: Listing, split: Split, found: ClassImages, remedy: str = "") -> None:
    """Raise DataError for images that lie in no class folder, if there is none."""
    if found or not listing.junk[LOOSE]:
        return
    here, where = replace(listing, junk=Counter()), listing.where(split)  # those of this split alone
    here.classes(split)
    if loose := here.junk[LOOSE]:
        raise DataError(
            f"{where} holds {counted(loose, 'image')} and no class folder: expected a folder of images for each class, "
            f"such as {where}/cat; move each image into that of its class{remedy}"
        )


def check_several_classes(listing: Listing, splits: Sequence[Split], names: Sequence[str]) -> None:
    """Raise DataError if there is nothing to tell apart."""
    if len(names) < 2:
        where = listing.where("+".join(filter(None, splits)) or None)
        there = f"1 class with images, {names[0]!r}" if names else "no image with a class"
        expected = "a folder of images for each class, at least 2" if listing.word == "folder" else "at least 2 classes"
        raise DataError(
            f"{where}: {there}{passed_over(listing.junk)}: expected {expected}; add images, or check the path"
        )


def check_classes_readable(train: Sequence[ClassImages], names: Sequence[str], checked: CheckedImages) -> None:
    """Raise DataError if no train image of a class can be read."""
    for name in names:
        if any(name in found for found in train) and not any(found.get(name) for found in train):
            raise DataError(
                f"no image of class {name!r} can be read: expected some; add images, or remove the class; {checked}"
            )


def check_readable(listing: Listing, found: Mapping[Place, ClassImages], readable: Mapping[Place, ClassImages]) -> None:
    """Raise DataError if no image of a split can be read; a warning has named those that cannot."""
    for place, classes in found.items():
        images = sum(map(len, classes.values()))
        if images and not any(readable[place].values()):
            raise DataError(
                f"{listing.where(place[1])}: of {counted(images, 'image')} none can be read: expected some; restore "
                f"them, or give the role another split"
            )


def check_names(where: str, names: Iterable[str]) -> None:
    """Raise DataError for two classes that most people and some file systems take for one."""
    known: dict[str, str] = {}
    for name in names:
        twin = known.setdefault(_folded(name), name)
        if twin != name:
            raise DataError(
                f"{where}: classes {twin!a} and {name!a} differ only by case or Unicode normalisation: expected one "
                f"name for each class; merge or rename them"
            )


def _folded(name: str) -> str:
    """Return a form of a name that is equal for names which some file systems and most people take for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).lower())


def _of_masks(where: str, found: ClassImages) -> str | None:
    """Return what is wrong with folders of images and masks in place of classes; None for classes."""
    for images, masks in LAYOUTS.values():
        if {images, masks} <= set(found):
            return f"{where} has {images}/ and {masks}/, images with masks: expected a folder for each class"
    return None
