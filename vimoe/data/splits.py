"""Names of splits: which part of a data set has which role (train, val, test)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from vimoe.errors import ConfigError, DataError, nearest

# other names that data sets use for a role; the configured name comes first
SYNONYMS = {"train": ("training",), "val": ("valid", "validation"), "test": ("testing",)}
ROLES = tuple(SYNONYMS)
SPLITS = frozenset(SYNONYMS).union(*SYNONYMS.values())


def is_split(name: str) -> bool:
    """Return True for a usual name of a split, in any case."""
    return name.lower() in SPLITS


def split_in(name: str) -> str | None:
    """Return the split that the name of an archive ends with, apart from numbers; None if it ends otherwise.

    >>> split_in("imagenet-train-0012-of-0099")
    'train'
    """
    found = re.fullmatch(rf"(?:.*[-_.])?({'|'.join(sorted(SPLITS))})(?:[-_.]?(?:\d+|of))*", name, re.IGNORECASE)
    return found[1].lower() if found else None


def split_of(role: str, name: str, splits: Iterable[str], where: str) -> str | None:
    """Return the split that has a role, or None if no split has it.

    If the configured name is the role itself, its synonyms count too, in any case. If several splits fit, a name in
    small letters wins.

    Args:
        role: "train", "val" or "test".
        name: configured name of the split, or "none" for no split.
        splits: names of the existing splits.
        where: words for these in an error, such as "folder in photos".

    Raises:
        DataError: if the configured name is not the role itself and no split has it.

    >>> split_of("val", "val", ["train", "Validation"], "folder in photos")
    'Validation'
    """
    splits = list(splits)
    if name == "none":
        return None
    folded = {split.lower(): split for split in sorted(splits)}  # small letters sort last, and so win
    for candidate in (role, *SYNONYMS[role]) if name == role else ():
        if candidate in folded:
            return folded[candidate]
    if name in splits:
        return name
    if name != role:
        raise DataError(f"data.{role}_split={name!r}: no such {where}; {nearest(name, splits)}")
    return None


def check_once(chosen: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError for a split that is named twice, by one role or by two.

    Args:
        chosen: splits of each role.
    """
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
