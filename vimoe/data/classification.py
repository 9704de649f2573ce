"""Loading of images with a class each, whatever the kind of data, in the roles train, validation and test."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vimoe.config.data import DataConfig
from vimoe.data.class_checks import (
    check_classes_readable,
    check_loose,
    check_names,
    check_other_data,
    check_readable,
    check_several_classes,
    check_train,
)
from vimoe.data.data_path import list_data
from vimoe.data.digits import digits, digits_for_test
from vimoe.data.draws import split_off, subset
from vimoe.data.image_check import CheckedImages, check_images
from vimoe.data.labelled_images import Data, Sample
from vimoe.data.listing import ClassImages, Listing
from vimoe.data.roles import Place, Split, roles_of, scored_splits, warn_without_role
from vimoe.data.splits import ROLES
from vimoe.errors import DataError, nearest

logger = logging.getLogger(__name__)


def load_data(config: DataConfig, classes: Sequence[str] | None = None, validation: Iterable[str] = ()) -> Data:
    """Find the images and give each a role.

    Args:
        config: settings of the data.
        classes: class map of a trained model; by default train's classes in the order of the data.
        validation: names (`Data.names`) of the images that a run split off train, to get the same split again.

    Raises:
        ConfigError: if a split is named twice, or "digits" are to have joined splits.
        DataError: if images, splits or labels are missing or damaged, a class is not in the map, or no image of a
            class can be read.
    """
    if config.path == "digits":
        return digits(config)
    listing = list_data(config)
    chosen = roles_of(listing, config, new=classes is None)
    found = {(role, split): listing.classes(split) for role in ROLES for split in chosen[role]}
    for (role, split), images in found.items():
        (check_train if role == "train" else check_loose)(listing, split, images)
    names = tuple(classes or _class_map(listing, [found["train", split] for split in chosen["train"]]))
    if classes is None:
        check_names(listing.name, names)
        check_several_classes(listing, chosen["train"], names)
    checked = None
    if config.skip_unreadable:
        readable, checked = _readable(found, listing)
        check_classes_readable([readable["train", split] for split in chosen["train"]], names, checked)
        check_readable(listing, found, readable)
        found = readable
    samples = {place: _samples(listing.where(place[1]), images, names) for place, images in found.items()}
    train, val, test = (_of_role(role, samples) for role in ROLES)
    if classes is None:  # only before training: later verbs need not walk these folders again
        warn_without_role(listing, chosen)
    origin = {id(sample): split for (role, split), each in samples.items() if role == "train" for sample in each}
    if without_val := not val:
        train, val = split_off(train, listing, config, set(validation), origin)
    train = subset(train, config)
    whole = Data(names, tuple(train), tuple(val), tuple(test), listing.root, without_val, listing.junk, checked)
    return replace(whole, parts=_parts(whole, chosen["train"], origin)) if len(chosen["train"]) > 1 else whole


def load_folder(
    path: str | Path, classes: Sequence[str], config: DataConfig | None = None
) -> tuple[str, tuple[Sample, ...]]:
    """Load images to score a trained model on: those for test, else validation, else train, else all.

    Args:
        path: data path, as `DataConfig.path`.
        classes: class map of the model.
        config: settings of the run: names of splits and columns, and `skip_unreadable`. Where the data lack a split
            of that name, usual names are looked for, such as "testing".

    Returns:
        Name of the images ("test", "validation", "train", or "all" for data without roles), and the images.

    Raises:
        ConfigError: if a split is named twice.
        DataError: errors of `load_data`.
    """
    config = replace(config or DataConfig(), path=str(path))
    if config.path == "digits":
        return "test", digits_for_test(classes)
    listing = list_data(config)
    role, splits = scored_splits(listing, config, classes)
    found = {(role, split): listing.classes(split) for split in splits}
    for split in splits:
        check_other_data(listing, split, found[role, split], classes)
    if config.skip_unreadable:
        readable, _ = _readable(found, listing)
        check_readable(listing, found, readable)
        found = readable
    samples = {place: _samples(listing.where(place[1]), images, tuple(classes)) for place, images in found.items()}
    name = "all" if splits == (None,) else {"val": "validation"}.get(role, role)
    return name, tuple(_of_role(role, samples))


def _class_map(listing: Listing, train: Sequence[ClassImages]) -> Iterable[str]:
    """Return the classes of train in the order of the data."""
    return train[0] if len(train) == 1 else listing.in_order(set(itertools.chain(*train)))


def _readable(found: Mapping[Place, ClassImages], listing: Listing) -> tuple[dict[Place, ClassImages], CheckedImages]:
    """Open all images; leave out those that cannot be read, with a warning."""
    checked = check_images(
        [image for classes in found.values() for images in classes.values() for image in images], listing.root
    )
    if checked.errors:
        logger.warning("%s; left out", checked)
    readable = {
        place: {name: [image for image in images if image in checked.digests] for name, images in classes.items()}
        for place, classes in found.items()
    }
    return readable, checked


def _samples(where: str, found: ClassImages, classes: tuple[str, ...]) -> list[Sample]:
    known = set(classes)
    for name, images in found.items():
        if images and name not in known:
            check_names(where, (*classes, name))
            raise DataError(f"{where}: no class {name!r} in the class map from train; {nearest(name, classes)}")
    samples: list[Sample] = [(i, label) for label, name in enumerate(classes) for i in found.get(name, [])]
    if not samples:
        raise DataError(
            f"{where}: no image in any class; expected classes named {', '.join(classes[:3])}, ...; check the path, "
            f"or add images"
        )
    return samples


def _of_role(role: str, samples: Mapping[Place, list[Sample]]) -> list[Sample]:
    """Return the images of all splits of a role by class, as those of a single split are."""
    own = itertools.chain.from_iterable(each for place, each in samples.items() if place[0] == role)
    return sorted(own, key=lambda sample: sample[1])


def _parts(whole: Data, splits: Iterable[Split], origin: Mapping[int, Split]) -> tuple[Data, ...]:
    """Return the images of each train split; `origin` has the split of each train image by its id."""

    def of(split: Split, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        return tuple(sample for sample in samples if origin.get(id(sample)) == split)

    return tuple(
        replace(whole, train=of(split, whole.train), val=of(split, whole.val), split=split) for split in splits
    )
