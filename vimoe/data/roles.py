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
from vimoe.data.splits import ROLES, is_split, split_of
from vimoe.errors import ConfigError, DataError, counted, nearest

logger = logging.getLogger(__name__)


Split = str | None  # None stands for all images of data without splits


def roles_of(listing: Listing, config: DataConfig) -> dict[str, tuple[Split, ...]]:
    """Return the splits of each role; train has None if all of the data are for it.

    Raises:
        ConfigError: if a split is named twice.
        DataError: if a named split is not there, or none is to train on.
    """
    chosen = {role: _splits(listing, role, getattr(config, f"{role}_split")) for role in ROLES}
    if not chosen["train"] and (others := {role: splits for role, splits in chosen.items() if splits}):
        role, (split, *_) = next(iter(others.items()))
        raise DataError(
            f"{listing.name} has no {listing.word} {config.train_split!r}: expected one beside {split!r}; "
            f"{nearest('', listing.splits)}; if {split!r} is a class, set --data.{role}_split none"
        )
    if not chosen["train"] and config.train_split != "none" and listing.word != "folder" and len(listing.splits) > 1:
        raise DataError(
            f"{listing.name} has no split {config.train_split!r}: expected one to train on; set --data.train_split to "
            f"one, to several joined by '+', or to none to take all images; {nearest('', listing.splits)}"
        )
    _check_once(chosen)
    return {**chosen, "train": chosen["train"] or (None,)}


def roles_elsewhere(listing: Listing, config: DataConfig) -> tuple[str, tuple[Split, ...]]:
    """Return the first role of test, val and train that other data have, and its splits.

    A split is looked for by the name that a run gave it, then by its usual names.
    """
    for role in ("test", "val", "train"):
        name = getattr(config, f"{role}_split")
        splits = (name,) if name in listing.splits else tuple(joined(name))
        if not set(splits) <= set(listing.splits):
            splits = _splits(listing, role, role)
        if splits:
            return role, splits
    return "train", (None,)


def _check_once(chosen: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError for a split that is named twice."""
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


def _split(listing: Listing, role: str, name: str) -> str | None:
    return split_of(role, name, listing.splits, f"{listing.word} in {listing.name}")


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
            remedy = f"; to use them, set --data.{free}_split {split}" if free and not is_split(split) else ""
            left = counted(images, "image is", "images are")
            logger.warning("%s has no role, and its %s left out%s", listing.where(split), left, remedy)
