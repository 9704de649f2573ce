"""What the values of a mask mean: `classes.yaml`, and mask files read as class numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL.Image import Image

from vimoe.config.masks import IGNORE, Colour
from vimoe.data.images import Source, place, reason, undecoded
from vimoe.errors import DataError, nearest
from vimoe.files import read_text, read_yaml

LEGEND = "classes.yaml"


KEYS = ("names", "ignore", "palette", "reduce_zero", "sequence")


Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Legend:
    """The classes of a data set, and how its mask files write them.

    Args:
        names: of the classes.
        ids: the value of each class in mask files of one channel.
        ignored: values of void pixels.
        palette: (red, green, blue) of each class, and after these of as many of `ignored` as have a colour. Masks
            in colour are read by it, those of a palette image too where its values say something else.
        sequence: regular expression with one group, which in an image's name is the video that it is a frame of; None
            where images are no frames, or nobody says.

    Raises:
        DataError: where these contradict one another, or the expression is none.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    ignored: tuple[int, ...] = (IGNORE,)
    palette: tuple[Colour, ...] | None = None
    sequence: str | None = field(default=None, repr=False)  # not in repr: training's fingerprint is of what masks mean

    def __post_init__(self) -> None:
        count = len(self.names)
        if not 2 <= count <= IGNORE:
            raise DataError(f"{count} classes: expected 2 to {IGNORE}; give their names in {LEGEND}")
        if twice := _twice(self.names) or _twice(self.ids) or _twice(self.palette or ()):
            raise DataError(f"{twice[0]!r} stands twice among names, ids or palette: expected each once; rename it")
        if both := set(self.ids) & set(self.ignored):
            value = min(both)
            raise DataError(
                f"ignore has {value}, which is class {self.names[self.ids.index(value)]!r}: expected values that no "
                f"name has; take it out ('ignore: []' where nothing is void), or the name"
            )
        if outside := [v for v in (*self.ids, *self.ignored) if not 0 <= v < 2**16]:
            raise DataError(f"{outside[0]} as a value of a mask: expected 0 to 65535; correct {LEGEND}")
        colours = len(self.palette or self.names)
        if not count <= colours <= count + len(self.ignored):
            raise DataError(
                f"palette has {colours} colours: expected one for each of the {count} names, and then for the "
                f"ignored values; complete it"
            )
        if self.sequence is not None:
            _check_expression(self.sequence)

    def sequences(self, names: Sequence[str]) -> list[str] | None:
        """Of images by name the video that each is a frame of, itself where `sequence` is not found in its name.

        Raises:
            DataError: where it is found in none of the names.
        """
        if self.sequence is None:
            return None
        found = [re.search(self.sequence, name) for name in names]
        if names and not any(found):
            raise DataError(
                f"sequence is {self.sequence!r}, which is found in no image's name, such as {names[0]!r}: expected an "
                f"expression whose group is the video; correct it in {LEGEND}, or leave it out"
            )
        return [(match and match[1]) or name for match, name in zip(found, names, strict=True)]

    def read(self, mask: Source) -> Array:
        """A mask as (height, width) uint8: numbers of classes in `names`, and IGNORE.

        Raises:
            DataError: naming the file, where it cannot be read or has a value or colour that is neither a class nor
                ignored.
        """
        try:
            raw, palette = read_values(mask)
            if raw.ndim == 3:
                return self._of_colours(raw)
            table = self._numbers if palette is None else self._of_palette(raw, palette)
            return self._of_values(raw, table)
        except DataError as error:
            raise DataError(f"{place(mask)}: {error}") from None

    def _of_values(self, raw: Array, table: Array) -> Array:
        numbers = table[raw]
        if (numbers < 0).any():
            value = int(raw[numbers < 0][0])
            void = f", or {_ranges(self.ignored)} for void" if self.ignored else ""
            raise DataError(
                f"a pixel has the value {value}: expected {_ranges(self.ids)}{void}; name it in {LEGEND}, or put it "
                f"under ignore"
            )
        return numbers.astype("uint8")

    def _of_palette(self, raw: Array, palette: Array) -> Array:
        """Class number by value in a palette image.

        Programs that save few colours as a palette put them in an order of their own. So colours overrule values where
        all that the mask has are the legend's.
        """
        used = np.flatnonzero(np.bincount(raw.ravel()))
        shown = {int(v): tuple(map(int, palette[v])) for v in used if v < len(palette)}
        known = {value: self._meaning[colour] for value, colour in shown.items() if colour in self._meaning}
        moved = [value for value, number in known.items() if number != self._numbers[value]]
        every = len(known) == len(used)
        if not moved:
            return self._numbers
        if self.palette and every:
            table = self._numbers.copy()
            table[list(known)] = list(known.values())
            return table
        levels = (palette == palette[:, :1]).all() and len({*known.values()} - {IGNORE}) > 1
        if self.palette or (every and levels):
            raise DataError(
                f"the value {moved[0]} is {self._word(self._numbers[moved[0]])}, and its colour in the palette, "
                f"{list(shown[moved[0]])}, that of {self._word(known[moved[0]])}: expected values and colours that "
                f"agree, or no colours but those of {LEGEND}; save the masks as one channel of values without a palette"
            )
        return self._numbers

    def _of_colours(self, raw: Array) -> Array:
        if self.palette is None:
            raise DataError(
                f"the mask is in colour and nothing says which colour is which class: expected one channel of class "
                f"numbers; give a palette in {LEGEND}"
            )
        codes, numbers = self._colours
        found = np.empty(raw.shape[:2], "uint8")
        for y, row in enumerate(raw):  # one by one, because the codes take ten times the memory of the colours
            code = row.astype("int64") @ (65536, 256, 1)
            place = np.searchsorted(codes, code).clip(max=len(codes) - 1)
            if (unknown := codes[place] != code).any():
                x = int(unknown.argmax())
                raise DataError(
                    f"the pixel at row {y}, column {x} has the colour {row[x].tolist()}: expected one of the palette's "
                    f"{len(codes)}; add it to {LEGEND}, for void after those of the classes"
                )
            found[y] = numbers[place]
        return found

    def _word(self, number: int) -> str:
        return "no class" if number < 0 else "void" if number == IGNORE else f"class {self.names[number]!r}"

    @cached_property
    def _numbers(self) -> Array:
        """Class number by value; -1 where a value means nothing."""
        table = np.full(2**16, -1, "int16")
        table[list(self.ids)] = range(len(self.ids))
        table[list(self.ignored)] = IGNORE
        return table

    @cached_property
    def _meaning(self) -> dict[Colour, int]:
        """Class number by colour; without a palette a value is the grey of that level."""
        numbers = [*range(len(self.names)), *[IGNORE] * len(self.ignored)]
        greys = [(value, value, value) for value in (*self.ids, *self.ignored)]
        return dict(zip(self.palette or greys, numbers, strict=False))

    @cached_property
    def _colours(self) -> tuple[Array, Array]:
        """(codes of the colours in rising order, the class number of each)."""
        codes = np.array(list(self._meaning)) @ (65536, 256, 1)
        order = codes.argsort()
        return codes[order], np.array(list(self._meaning.values()), "uint8")[order]


def read_values(mask: Source) -> tuple[Array, Array | None]:
    """What a mask file holds, and for a palette image the colours (n, 3) of its values.

    The first is (height, width) values of one channel of 1, 8 or 16 bits or of a palette, or (height, width, 3)
    colours. A palette whose value v is the grey of level v is none: such are made of masks without colours.

    Raises:
        DataError: for a file that is no image, or one of another kind.
    """
    try:
        with undecoded(mask) as opened:
            mode, raw, palette = opened.mode, np.asarray(opened), _shown(opened)
    except Exception as error:  # what decoders raise on damaged files has no common class
        raise DataError(f"cannot be read as a mask ({reason(error)}): expected a whole PNG") from error
    if mode in ("1", "L", "P") or mode.startswith("I;16"):
        return raw.astype("uint16"), palette
    if mode in ("RGB", "RGBA"):
        return raw[..., :3], None
    raise DataError(f"a mask of mode {mode}: expected one channel of 8 or 16 bits, or RGB; convert it")


def palette_of(mask: Source) -> Array | None:
    """Return the colours (n, 3) of the values of a mask that `read_values` could read; None where it has none."""
    with undecoded(mask) as opened:
        return _shown(opened)


def _shown(image: Image) -> Array | None:
    if image.mode != "P":
        return None
    palette = np.array(image.getpalette() or []).reshape(-1, 3)
    grey = len(palette) != 1 and (palette == np.arange(len(palette))[:, None]).all()
    return None if grey else palette


def legend_in(folder: Path) -> Legend | None:
    """Return the legend of a data folder; None without one. Its name may be in capital letters, and end in .yml."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    file = next((path for path in inside if path.name.lower() in (LEGEND, "classes.yml") and path.is_file()), None)
    return read_legend(file) if file else None


def read_legend(path: Path) -> Legend:
    """The legend in a YAML file.

    `names` is a list (values 0, 1, ...) or a mapping from value to name; `ignore` one value or several (without it 255,
    unless that has a name); `palette` a list of [red, green, blue] for the names in the order of their values, and then
    for the ignored values; with `reduce_zero: true` 0 is void and the first name has the value 1, as in ADE20K.
    `sequence` is the expression by which an image's name tells its video (`Legend`).

    Raises:
        DataError: for what it does not understand, naming the file.
    """
    try:
        given = read_yaml(read_text(path))
        if not isinstance(given, dict) or "names" not in given:
            raise DataError("no names in it: expected 'names: [sky, road, ...]'")
        if unknown := [key for key in given if key not in KEYS]:
            raise DataError(f"unknown entry {unknown[0]!r}; {nearest(unknown[0], KEYS)}")
        return _legend(given)
    except yaml.YAMLError as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}; correct it") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def legend_of_masks(masks: Sequence[Source]) -> Legend:
    """Classes 0 to the largest value in the masks, named by their numbers; 255 is void.

    Raises:
        DataError: where a mask cannot be read or is in colour, a value has several colours, or there is only one class.
    """

    def look(mask: Source) -> tuple[list[int], Array | None]:
        """The values in a mask, and the colours of its palette."""
        try:
            raw, palette = read_values(mask)
        except DataError as error:
            raise DataError(f"{place(mask)}: {error}") from None
        if raw.ndim == 3:
            raise DataError(
                f"{place(mask)} is in colour and nothing says which colour is which class: expected one channel of "
                f"class numbers, or names and a palette in {LEGEND} beside the images"
            )
        return np.flatnonzero(np.bincount(raw.ravel())).tolist(), palette

    found: set[int] = set()
    shown: dict[int, tuple[list[int], Source]] = {}  # by value its colour, and the first mask that it is in
    spare: Array | None = None  # the first palette, for values that no mask has
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
                        f"the value {value} has the colour {before} in {place(first)} and {colour} in {place(mask)}, "
                        f"and no {LEGEND} says which of them count: expected one palette in all masks; write names "
                        f"there if values count, and a palette if colours do"
                    )
    largest = max(found - {IGNORE}, default=-1)
    if not 1 <= largest < IGNORE:
        remedy = "write names and ignore there"
        if IGNORE in found:
            remedy = (
                f"{IGNORE} was taken for void; if it is a class write 'names: {{0: background, {IGNORE}: crack}}' there"
            )
        raise DataError(
            f"the train masks have values of {_ranges(sorted(found))}, and no {LEGEND} says what they mean: expected "
            f"classes 0 to 254 and at least two; {remedy}"
        )
    ids = tuple(range(largest + 1))
    colours = [shown[i][0] if i in shown else [] if spare is None else spare[i : i + 1].ravel().tolist() for i in ids]
    distinct = [] not in colours and not _twice(colours)
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


def _check_expression(expression: str) -> None:
    try:
        groups = re.compile(expression).groups
    except re.error as error:
        raise DataError(f"sequence is {expression!r}, which is no regular expression ({error}); correct it") from error
    if groups != 1:
        raise DataError(
            f"sequence is {expression!r} with {groups} groups: expected one, which is the video, such as '(.+)_'"
        )


def _twice(items: Sequence[Any]) -> list[Any]:
    return [item for place, item in enumerate(items) if item in items[:place]]


def _ranges(values: Sequence[int]) -> str:
    """A few whole numbers for the reader: "0 to 10", or the numbers themselves."""
    ordered = sorted(values)
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered[:12])) + (", ..." if len(ordered) > 12 else "")
