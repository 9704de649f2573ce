"""Labelled images in three roles: train, validation (for every decision) and test (only reported)."""

from __future__ import annotations

import itertools
import logging
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from PIL import Image

from vimoe.config.data import DataConfig, joined
from vimoe.data.data_path import list_data
from vimoe.data.image_check import CheckedImages, check_images
from vimoe.data.image_files import find_images, is_hidden, passed_over
from vimoe.data.images import Source, name_within
from vimoe.data.listing import LOOSE, ClassImages, Listing, check_levels
from vimoe.data.splits import is_split, split_of
from vimoe.errors import ConfigError, DataError, counted, nearest

logger = logging.getLogger(__name__)
Sample = tuple[Source | Image.Image, int]
Where = TypeVar("Where")
ROLES = ("train", "val", "test")
# folders of images and masks, in the layouts of vimoe.data.scene_layouts
MASK_LAYOUTS = ({"images", "annotations"}, {"JPEGImages", "SegmentationClass"}, {"leftImg8bit", "gtFine"})


@dataclass(frozen=True)
class Data:
    """Images of each role; labels index `classes`, which train defines for all roles.

    Args:
        classes: names of the classes.
        train, val, test: (image or its source, label) of each image.
        root: data folder or file, from which images are named.
        split_off: True if validation was split off train.
        junk: number of other files by kind, as `find_images` counts them.
        checked: outcome of opening all images, if unreadable ones were left out.
        parts: images of each train split, if there are several; all have the same test images. Without a validation
            split, each has the validation images that were split off it, else none.
        split: name of the train split, in one of these parts.
        whole: train images of all tasks, where these are the images of one (`vimoe.data.tasks`).
    """

    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    root: Path = Path()
    split_off: bool = False
    junk: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    checked: CheckedImages | None = field(default=None, compare=False, repr=False)
    parts: tuple[Data, ...] = field(default=(), compare=False, repr=False)
    split: str | None = field(default=None, compare=False, repr=False)
    whole: tuple[Sample, ...] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        roles = f"{len(self.train)} train, {len(self.val)} validation, {len(self.test)} test"
        return f"{roles} images of {counted(len(self.classes), 'class', 'classes')}"

    def names(self, samples: Iterable[Sample]) -> list[str]:
        """Return the names of images in lists that outlast this process; images in memory have none."""
        return [name_within(self.root, source) for source, _ in on_disk(samples)]


def load_data(config: DataConfig, classes: Sequence[str] | None = None, validation: Iterable[str] = ()) -> Data:
    """Find the images and give each a role.

    Args:
        config: settings of the data.
        classes: class map of a trained model; by default train's classes in the order of the data.
        validation: names (`Data.names`) of the images that a run split off train, to get the same split again.

    Raises:
        ConfigError: if a split is named twice.
        DataError: if images, splits or labels are missing or damaged, a class is not in the map, or no image of a
            class can be read.
    """
    if config.path == "digits":
        return _digits(config)
    listing = list_data(config)
    chosen = _roles(listing, config)
    places: list[tuple[str, str | None]] = [("train", split) for split in chosen["train"] or (None,)]
    places += [(role, split) for role in ("val", "test") for split in chosen[role]]
    found = {place: listing.classes(place[1]) for place in places}
    for (role, split), images in found.items():
        if role == "train":
            _check_train(listing, split, images)
    own = [tuple(images) for (role, _), images in found.items() if role == "train"]
    names = tuple(classes or (own[0] if len(own) == 1 else listing.in_order(set(itertools.chain(*own)))))
    if classes is None:
        _check_names(listing.name, names)
        _check_two(listing, listing.where("+".join(chosen["train"]) or None), names)
    checked = None
    if config.skip_unreadable:
        found, checked = _leave_out_unreadable(found, listing.root)
        _check_left([found[p] for p in places if p[0] == "train"], names, checked)
    samples = {place: _samples(listing.where(place[1]), images, names) for place, images in found.items()}
    train, val, test = ([s for place in places if place[0] == role for s in samples[place]] for role in ROLES)
    for several in (train, val, test):
        several.sort(key=lambda sample: sample[1])  # by class, as those of a single split are
    if chosen["train"] and classes is None:  # only before training: later verbs need not walk these folders again
        _warn_without_role(listing, chosen)
    split_off = not val
    origin = {id(sample): split for (role, split), each in samples.items() if role == "train" for sample in each}
    if split_off:
        train, val = _split_off(train, listing, config, set(validation), origin)
    whole = Data(
        names, tuple(_subset(train, config)), tuple(val), tuple(test), listing.root, split_off, listing.junk, checked
    )
    return replace(whole, parts=_parts(whole, chosen["train"], origin)) if len(chosen["train"]) > 1 else whole


def load_folder(
    path: str | Path, classes: Sequence[str], config: DataConfig | None = None
) -> tuple[str, tuple[Sample, ...]]:
    """Load images for a trained model: the test split of a data path, else validation, else train, else all images.

    Args:
        path: data path, as `DataConfig.path`.
        classes: class map of the model.
        config: settings for reading: names of columns, and `skip_unreadable`.

    Returns:
        Name of the images ("test", "validation", or "all" for data without these), and the images.

    Raises:
        DataError: errors of `load_data`.
    """
    config = replace(config or DataConfig(), path=str(path))
    if config.path == "digits":
        return "test", _by_names(_digits(config), classes)
    listing = list_data(config)
    roles = {"test": "test", "validation": "val", "all": "train"}
    splits = {name: _split(listing, role, role) for name, role in roles.items()}
    name, split = next((name, split) for name, split in splits.items() if split or name == "all")
    found = {name: listing.classes(split)}
    if any(layout <= set(found[name]) for layout in MASK_LAYOUTS) and not set(found[name]) <= set(classes):
        raise DataError(
            f"{_of_masks(listing.where(split), found[name])}, as the model gives; check the path or the run"
        )
    _check_loose(listing, split, found[name])
    check_levels(listing, found[name], listing.where(split))
    if config.skip_unreadable:
        found, _ = _leave_out_unreadable(found, listing.root)
    return name, tuple(_samples(listing.where(split), found[name], tuple(classes)))


def _roles(listing: Listing, config: DataConfig) -> dict[str, tuple[str, ...]]:
    """Return the splits of each role; train has none if all of the data are for it."""
    chosen = {role: _splits(listing, role, getattr(config, f"{role}_split")) for role in ROLES}
    if not chosen["train"] and (others := {role: splits for role, splits in chosen.items() if splits}):
        role, (split, *_) = next(iter(others.items()))
        raise DataError(
            f"{listing.name} has no {listing.word} {config.train_split!r}: expected one beside {split!r}; "
            f"{nearest('', listing.splits)}; if {split!r} is a class, set --data.{role}_split none"
        )
    named: dict[str, str] = {}
    for role, splits in chosen.items():
        for split in splits:
            if split in named:
                if named[split] == role:
                    raise ConfigError(f"data.{role}_split has {split!r} twice: expected each split once; leave one out")
                raise ConfigError(
                    f"{split!r} has the roles data.{named[split]}_split and data.{role}_split: expected one role for "
                    f"each split; set one of them to others, or to none"
                )
            named[split] = role
    return chosen


def _parts(whole: Data, splits: Sequence[str], origin: Mapping[int, str | None]) -> tuple[Data, ...]:
    """Return the images of each train split; `origin` has the split of each train image by its id."""

    def of(split: str, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        return tuple(sample for sample in samples if origin.get(id(sample)) == split)

    return tuple(
        replace(whole, train=of(split, whole.train), val=of(split, whole.val), split=split) for split in splits
    )


def _check_train(listing: Listing, split: str | None, found: ClassImages) -> None:
    """Raise DataError if the train images are not the class folders of a classification."""
    where = listing.where(split)
    _check_names(where, found)
    if any(layout <= set(found) for layout in MASK_LAYOUTS):
        raise DataError(f"{_of_masks(where, found)}; to learn masks, set --data.task segmentation")
    if empty := [name for name, images in found.items() if not images]:
        inside = Path(where, empty[0])
        junk = find_images(inside)[1] if inside.is_dir() else {}  # no folder if its name is not in UTF-8
        raise DataError(
            f"{where}/{empty[0]} holds no image{passed_over(junk)}: expected some; add images, or remove the folder"
        )
    check_levels(listing, found, where)
    _check_loose(listing, split, found)


def _check_two(listing: Listing, where: str, names: Sequence[str]) -> None:
    """Raise DataError if there is nothing to tell apart."""
    if len(names) < 2:
        there = f"1 class with images, {names[0]!r}" if names else "no image with a class"
        expected = "a folder of images for each class, at least 2" if listing.word == "folder" else "at least 2 classes"
        raise DataError(
            f"{where}: {there}{passed_over(listing.junk)}: expected {expected}; add images, or check the path"
        )


def _of_masks(where: str, found: ClassImages) -> str:
    """Return what is wrong with folders of images and masks, in place of classes."""
    first, second = next(sorted(layout, reverse=True) for layout in MASK_LAYOUTS if layout <= set(found))
    return f"{where} has {first}/ and {second}/, images with masks: expected a folder for each class"


def _check_loose(listing: Listing, split: str | None, found: ClassImages) -> None:
    """Raise DataError for images that lie in no class folder, if there is none."""
    if found or not listing.junk[LOOSE]:
        return
    here, where = replace(listing, junk=Counter()), listing.where(split)  # those of this split alone
    here.classes(split)
    if loose := here.junk[LOOSE]:
        remedy = f"; if {split!r} is a class itself, set --data.train_split none" if split else ""
        raise DataError(
            f"{where} holds {counted(loose, 'image')} and no class folder: expected a folder of images for each class, "
            f"such as {where}/cat; move each image into that of its class{remedy}"
        )


def _by_names(digits: Data, classes: Sequence[str]) -> tuple[Sample, ...]:
    """Return the test digits, with labels by a model's class map."""
    if missing := set(digits.classes) - set(classes):
        raise DataError(f"digits: no class {min(missing)!r} in the class map from train; {nearest('', classes)}")
    return tuple((image, list(classes).index(digits.classes[label])) for image, label in digits.test)


def on_disk(samples: Iterable[Sample]) -> list[tuple[Source, int]]:
    """Return the images that are not in memory."""
    return [(source, label) for source, label in samples if not isinstance(source, Image.Image)]


def _split(listing: Listing, role: str, name: str) -> str | None:
    return split_of(role, name, listing.splits, f"{listing.word} in {listing.name}")


def _splits(listing: Listing, role: str, name: str) -> tuple[str, ...]:
    """Return the splits that have a role: none, one, or those that "+" joins, in the order in which they are named."""
    if name in listing.splits or len(joined(name)) == 1:
        split = _split(listing, role, name)
        return () if split is None else (split,)
    splits = []
    for each in joined(name):
        split = None if each == "none" else _split(listing, role, each)
        if split is None:
            raise DataError(
                f"data.{role}_split={name!r}: no {listing.word} {each!r} in {listing.name}; "
                f"{nearest(each, listing.splits)}"
            )
        splits.append(split)
    return tuple(splits)


def _warn_without_role(listing: Listing, chosen: Mapping[str, Sequence[str]]) -> None:
    """Count images in splits without a role as junk, and warn of them with the remedy."""
    for split in listing.splits:
        if split in itertools.chain(*chosen.values()) or is_hidden(split):
            continue
        inside = replace(listing, junk=Counter())
        try:
            images = sum(map(len, inside.classes(split).values())) + inside.junk[LOOSE]
        except (DataError, OSError):  # a table whose labels are withheld, or a folder without permission
            continue
        if images:
            listing.junk[f"images in {split}, which has no role"] += images
            free = next((role for role in ("val", "test", "train") if not chosen[role]), None)
            remedy = f"; to use them, set --data.{free}_split {split}" if free and not is_split(split) else ""
            left = counted(images, "image is", "images are")
            logger.warning("%s has no role, and its %s left out%s", listing.where(split), left, remedy)


def _leave_out_unreadable(
    found: dict[Where, ClassImages], root: Path
) -> tuple[dict[Where, ClassImages], CheckedImages]:
    checked = check_images(
        [image for classes in found.values() for images in classes.values() for image in images], root
    )
    if checked.errors:
        logger.warning("%s; left out", checked)
    readable = {
        where: {name: [image for image in images if image in checked.digests] for name, images in classes.items()}
        for where, classes in found.items()
    }
    return readable, checked


def _check_left(train: Sequence[ClassImages], names: Sequence[str], checked: CheckedImages) -> None:
    """Raise DataError if no train image of a class can be read."""
    for name in names:
        if any(name in found for found in train) and not any(found.get(name) for found in train):
            raise DataError(
                f"no image of class {name!r} can be read: expected some; add images, or remove the class; {checked}"
            )


def _check_names(where: str, names: Iterable[str]) -> None:
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


def _samples(where: str, found: ClassImages, classes: tuple[str, ...]) -> list[Sample]:
    known = set(classes)
    for name, images in found.items():
        if images and name not in known:
            _check_names(where, (*classes, name))
            raise DataError(f"{where}: no class {name!r} in the class map from train; {nearest(name, classes)}")
    samples: list[Sample] = [(i, label) for label, name in enumerate(classes) for i in found.get(name, [])]
    if not samples:
        raise DataError(
            f"{where}: no image in any class; expected classes named {', '.join(classes[:3])}, ...; check the path, "
            f"or add images"
        )
    return samples


def _split_off(
    train: list[Sample], listing: Listing, config: DataConfig, listed: set[str], origin: Mapping[int, str | None]
) -> tuple[list[Sample], list[Sample]]:
    """Split validation off train: the images that a run has listed, or else a seeded share of each class and split."""
    if listed:
        val = [s for s in train if not isinstance(s[0], Image.Image) and name_within(listing.root, s[0]) in listed]
        if len(val) != len(listed):
            raise DataError(
                f"{listing.name}: {len(listed) - len(val)} of the run's {len(listed)} validation images are missing or "
                f"damaged: expected the data as they were in training; restore them, or train again"
            )
        held_out = {id(sample) for sample in val}
        return [s for s in train if id(s) not in held_out], val

    def share(images: int) -> int:
        return min(images - 1, max(1, round(images * config.val_fraction)))

    kept, val = _draw(train, share, config.seed, lambda sample: (sample[1], origin[id(sample)]))
    if not val:
        raise DataError(
            f"{listing.name}: no class has two images: expected some, to split validation off; add images, or a "
            f"{listing.word} 'val'"
        )
    return kept, val


def _subset(train: list[Sample], config: DataConfig) -> list[Sample]:
    most = config.images_per_class
    return train if most is None else _draw(train, lambda n: min(n, most), config.seed + 1)[1]


def _draw(
    samples: list[Sample],
    how_many: Callable[[int], int],
    seed: int,
    group: Callable[[Sample], Hashable] = lambda sample: sample[1],
) -> tuple[list[Sample], list[Sample]]:
    """Draw `how_many(n)` of the n samples of each group; return (the others, the drawn), both in their old order.

    A group is a class, if no other is given.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[group(sample)].append(index)
    rng = random.Random(seed)
    drawn = {i for members in groups.values() for i in rng.sample(members, how_many(len(members)))}
    return [s for i, s in enumerate(samples) if i not in drawn], [s for i, s in enumerate(samples) if i in drawn]


def _digits(config: DataConfig) -> Data:
    """Return scikit-learn's 1,797 handwritten digits, 8x8: 40% for test, 20% for validation, 40% for train."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grey = (pixels.reshape(-1, 8, 8) * (255 / 16)).round().astype("uint8")
    samples: list[Sample] = [(Image.fromarray(g).convert("RGB"), int(y)) for g, y in zip(grey, labels, strict=True)]
    rest, test = _draw(samples, lambda n: round(n * 0.4), seed=0)
    train, val = _draw(rest, lambda n: round(n / 3), config.seed)
    return Data(tuple("0123456789"), tuple(_subset(train, config)), tuple(val), tuple(test))
