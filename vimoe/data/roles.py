"""The splits of each role: which of a data set's folders or splits are for train, validation and test."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vimoe.config.data import DataConfig, joined
from vimoe.data.image_files import is_hidden
from vimoe.data.listing import LOOSE, Listing
from vimoe.data.splits import ROLES, check_once, is_split, split_of
from vimoe.errors import DataError, counted, nearest

logger = logging.getLogger(__name__)
Split = str | None  # name of a split; None stands for all images, of data whose splits have no role
Place = tuple[str, Split]  # a role, and a split that has it


def roles_of(listing: Listing, config: DataConfig, new: bool = True) -> dict[str, tuple[Split, ...]]:
    """Return the splits of each role; "train" has (None,) if no split has a role, and all images are for training.

    Args:
        listing: images by split.
        config: settings of the data.
        new: True before a training, which has to say which of several splits of a table it takes; a run has taken all.

    Raises:
        ConfigError: if a split is named twice.
        DataError: if a split is not there, or no split is left to train on.
    """
    chosen = {role: _splits(listing, role, getattr(config, f"{role}_split")) for role in ROLES}
    others = {role: splits for role, splits in chosen.items() if splits}
    if not chosen["train"] and others:
        role, (split, *_) = next(iter(others.items()))
        if config.train_split == "none":
            raise DataError(
                f"{listing.name}: data.train_split='none' takes all images, and {split!r} is for {role}: expected no "
                f"split for it; set --data.{role}_split none, or name the splits to train on"
            )
        class_ = f"; if {split!r} is a class, set --data.{role}_split none" if listing.word == "folder" else ""
        raise DataError(
            f"{listing.name} has no {listing.word} {config.train_split!r}: expected one beside {split!r}; "
            f"{nearest('', listing.splits)}{class_}"
        )
    several = listing.word != "folder" and len(listing.splits) > 1
    if new and several and not chosen["train"] and config.train_split != "none":
        raise DataError(
            f"{listing.name} has no split {config.train_split!r}: expected one to train on; set --data.train_split to "
            f"one, to several joined by '+', or to none to take all images; {nearest('', listing.splits)}"
        )
    check_once(chosen)
    return {**chosen, "train": chosen["train"] or (None,)}


def scored_splits(listing: Listing, config: DataConfig, classes: Sequence[str]) -> tuple[str, tuple[Split, ...]]:
    """Return what a trained model is scored on in other data: the role test, else val, else train, and its splits.

    A role has the splits that the run gave it, or, where the data lack them, one of a usual name, such as "testing".

    Args:
        listing: images by split.
        config: settings of the run.
        classes: class map of the model. A folder that is named like a role, but is a class, has no role if the run
            says "none" for it.

    Returns:
        The role and its splits: (None,) for data whose splits have no role.
    """
    for role in ("test", "val", "train"):
        name = getattr(config, f"{role}_split")
        splits = _there(listing, name) or _splits(listing, role, role)
        if splits and not (name == "none" and set(splits) <= set(classes)):
            if splits[0] != split_of(role, role, splits, ""):
                logger.info("%s images are those of %s", role, listing.where("+".join(splits)))
            return role, splits
    return "train", (None,)


def _there(listing: Listing, name: str) -> tuple[str, ...]:
    """Return the splits of a name, or none if the data lack one of them."""
    splits = (name,) if name in listing.splits else tuple(joined(name))
    return splits if set(splits) <= set(listing.splits) else ()


def _splits(listing: Listing, role: str, name: str) -> tuple[str, ...]:
    """Return the splits that have a role: none, one, or those that "+" joins, in the order in which they are named."""
    where, names = f"{listing.word} in {listing.name}", joined(name)
    if name in listing.splits or len(names) == 1:
        split = split_of(role, name if name in listing.splits else names[0], listing.splits, where)
        return () if split is None else (split,)
    splits = []
    for each in names:
        split = split_of(role, each, listing.splits, where) if each in (role, *listing.splits) else None
        if split is None:
            raise DataError(
                f"data.{role}_split={name!r}: no {listing.word} {each!r} in {listing.name}; "
                f"{nearest(each, listing.splits)}"
            )
        splits.append(split)
    return tuple(splits)


def warn_without_role(listing: Listing, chosen: Mapping[str, Sequence[Split]]) -> None:
    """Count images in splits without a role as junk, and warn of them with the remedy."""
    if None in chosen["train"]:  # all have one
        return
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
            remedy = (
                f"; to use them, set --data.{free}_split {split}"
                if free and split != "none" and not is_split(split)
                else ""
            )
            left = counted(images, "image is", "images are")
            logger.warning("%s has no role, and its %s left out%s", listing.where(split), left, remedy)
