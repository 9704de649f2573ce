"""Legends: read from `classes.yaml`, or inferred from the values in masks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vimoe.config.masks import IGNORE, Colour
from vimoe.config.yaml_reader import read_yaml
from vimoe.data.images import Source, source_path
from vimoe.data.masks import LEGEND, Array, Legend, in_words, read_values, repeated
from vimoe.errors import DataError, nearest
from vimoe.files import read_text

KEYS = ("names", "ignore", "palette", "reduce_zero", "sequence")


def legend_in(folder: Path) -> Legend | None:
    """Return the legend in a data folder, or None. The file name may be in any case, and end in .yml."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    file = next((path for path in inside if path.name.lower() in (LEGEND, "classes.yml") and path.is_file()), None)
    return read_legend(file) if file else None


def read_legend(path: Path) -> Legend:
    """Read a legend from a YAML file with these entries.

    - `names`: a list (values 0, 1, ...) or a mapping from value to name.
    - `ignore`: one value or several; by default 255, unless that has a name.
    - `palette`: a list of [red, green, blue] for the names in the order of their values, then for the ignored values.
    - `reduce_zero`: if true, 0 is void and the first name has the value 1, as in ADE20K.
    - `sequence`: an expression that matches the video in an image's name (`Legend`).

    Raises:
        DataError: if the file cannot be read or an entry is wrong. The message names the file.
    """
    try:
        given = read_yaml(read_text(path))
        if not isinstance(given, dict) or "names" not in given:
            raise DataError("it has no names: expected 'names: [sky, road, ...]'; add them")
        if unknown := [key for key in given if key not in KEYS]:
            raise DataError(f"unknown entry {unknown[0]!r}; {nearest(unknown[0], KEYS)}")
        return _legend(given)
    except yaml.YAMLError as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}; correct it") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def legend_of_masks(masks: Sequence[Source]) -> Legend:
    """Infer a legend from masks: classes 0 to their largest value, named by their numbers; 255 is void.

    Raises:
        DataError: if a mask cannot be read or is in colour, a value has several colours, or there is only one class.
    """

    def look(mask: Source) -> tuple[list[int], Array | None]:
        """Return the values in a mask, and the colours of its palette."""
        try:
            raw, palette = read_values(mask)
        except DataError as error:
            raise DataError(f"{source_path(mask)}: {error}") from None
        if raw.ndim == 3:
            raise DataError(
                f"{source_path(mask)} is in colour, but the classes of the colours are unknown: expected one "
                f"channel of class numbers, or names and a palette in {LEGEND} beside the images"
            )
        return np.flatnonzero(np.bincount(raw.ravel())).tolist(), palette

    found: set[int] = set()
    shown: dict[int, tuple[list[int], Source]] = {}  # colour of each value, and the first mask with that value
    spare: Array | None = None  # the first palette, which gives the colours of values that no mask has
    with ThreadPool(os.cpu_count()) as pool:
        for mask, (values, palette) in zip(masks, pool.imap(look, masks, chunksize=16), strict=True):
            found.update(values)
            if palette is None:
                continue
            spare = palette if spare is None else spare
            for value in values:
                colour = palette[value].tolist() if value < len(palette) else []
                before, first = shown.setdefault(value, (colour, mask))
                if colour != before:
                    raise DataError(
                        f"the value {value} has the colour {before} in {source_path(first)} and {colour} in "
                        f"{source_path(mask)}: expected one palette in all masks; write a {LEGEND}, with names if "
                        f"values count, and with a palette if colours do"
                    )
    largest = max(found - {IGNORE}, default=-1)
    if not 1 <= largest < IGNORE:
        remedy = f"write names and ignore in a {LEGEND}"
        if IGNORE in found:
            names = f"'names: {{0: background, {IGNORE}: crack}}'"
            remedy = f"{IGNORE} was taken for void; if it is a class, write {names} in a {LEGEND}"
        raise DataError(
            f"the train masks have the values {in_words(sorted(found))}: expected at least two classes of 0 to 254, or "
            f"their names; {remedy}"
        )
    ids = tuple(range(largest + 1))
    colours = [shown[i][0] if i in shown else [] if spare is None else spare[i : i + 1].ravel().tolist() for i in ids]
    distinct = [] not in colours and not repeated(colours)
    return Legend(tuple(map(str, ids)), ids, palette=tuple((r, g, b) for r, g, b in colours) if distinct else None)


def _legend(given: Mapping[str, Any]) -> Legend:
    names, reduce = given["names"], given.get("reduce_zero", False)
    if not isinstance(reduce, bool):
        raise DataError(f"reduce_zero is {reduce!r}: expected true or false")
    if isinstance(names, list):
        names = dict(enumerate(names, start=int(reduce)))
    elif not isinstance(names, dict):
        raise DataError(f"names is {str(names)[:40]!r}: expected a list, or a mapping from value to name")
    elif reduce:
        raise DataError("reduce_zero with names by value: expected names as a list; or leave reduce_zero out")
    if wrong := [key for key in names if type(key) is not int]:
        raise DataError(f"names has the value {wrong[0]!r}: expected a whole number")
    if wrong := [name for name in names.values() if type(name) not in (str, int) or name == ""]:
        raise DataError(f"{wrong[0]!r} as a name: expected text; put it in quotes")
    ignored = given.get("ignore", [] if IGNORE in names else IGNORE)
    ignored = ignored if isinstance(ignored, list) else [ignored]
    if wrong := [value for value in ignored if type(value) is not int]:
        raise DataError(f"ignore has {wrong[0]!r}: expected whole numbers, the values of void pixels")
    ids = tuple(sorted(names))
    void = (0, *ignored) if reduce else tuple(ignored)
    sequence = given.get("sequence")
    if sequence is not None and not isinstance(sequence, str):
        raise DataError(f"sequence is {sequence!r}: expected a regular expression; put it in quotes")
    classes = tuple(str(names[i]) for i in ids)
    return Legend(classes, ids, tuple(dict.fromkeys(void)), _palette(given.get("palette")), sequence)


def _palette(given: Any) -> tuple[Colour, ...] | None:
    if given is None:
        return None
    for colour in given if isinstance(given, list) else [given]:
        whole = isinstance(colour, list) and len(colour) == 3 and all(type(v) is int for v in colour)
        if not whole or not all(0 <= v <= 255 for v in colour):
            raise DataError(f"palette has {str(colour)[:40]}: expected [red, green, blue], whole numbers of 0 to 255")
    return tuple((r, g, b) for r, g, b in given)
