"""Masks: files of values or colours, read as class numbers by a legend that says which value is which class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL.Image import Image

from vimoe.config.masks import IGNORE, Colour
from vimoe.data.images import Source, reason, source_path, undecoded
from vimoe.errors import DataError, counted

LEGEND = "classes.yaml"  # file name of a legend
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Legend:
    """The classes of a data set, and their values and colours in mask files.

    Args:
        names: names of the classes.
        ids: value of each class in mask files of one channel.
        ignored: values of void pixels.
        palette: (red, green, blue) of each class, followed by the colours of `ignored`, as far as they have any. Masks
            in colour are read by it, and also palette images whose values contradict it.
        sequence: regular expression with one group that matches the video in the name of a frame; None if the images
            are no frames, or if that is unknown.

    Raises:
        DataError: if these contradict one another, or `sequence` is no such expression.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    ignored: tuple[int, ...] = (IGNORE,)
    palette: tuple[Colour, ...] | None = None
    sequence: str | None = field(
        default=None, repr=False
    )  # not in repr, because the fingerprint of a training holds only the meaning of masks

    def __post_init__(self) -> None:
        count = len(self.names)
        if not 2 <= count <= IGNORE:
            raise DataError(
                f"{counted(count, 'class', 'classes')}: expected 2 to {IGNORE}; give their names in {LEGEND}"
            )
        if twice := repeated(self.names) or repeated(self.ids) or repeated(self.palette or ()):
            raise DataError(f"{twice[0]!r} is repeated among names, ids or palette: expected each once; rename it")
        if both := set(self.ids) & set(self.ignored):
            value = min(both)
            raise DataError(
                f"ignore has {value}, which is class {self.names[self.ids.index(value)]!r}: expected values "
                f"without a name; remove it there ('ignore: []' if nothing is void), or remove the name"
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
        """Return the video of each image, given the image names; None without `sequence`.

        An image whose name does not match `sequence` counts as its own video.

        Raises:
            DataError: if no name matches.
        """
        if self.sequence is None:
            return None
        found = [re.search(self.sequence, name) for name in names]
        if names and not any(found):
            raise DataError(
                f"sequence is {self.sequence!r}, which matches no image's name, such as {names[0]!r}: expected an "
                f"expression whose group is the video; correct it in {LEGEND}, or leave it out"
            )
        return [(match and match[1]) or name for match, name in zip(found, names, strict=True)]

    def read(self, mask: Source) -> Array:
        """Read a mask file as class numbers: (height, width) uint8, indices in `names` or IGNORE.

        Raises:
            DataError: if it cannot be read, or has a value or colour that is neither a class nor ignored. The message
                names the file.
        """
        try:
            raw, palette = read_values(mask)
            if raw.ndim == 3:
                return self._of_colours(raw)
            table = self._numbers if palette is None else self._of_palette(raw, palette)
            return self._of_values(raw, table)
        except DataError as error:
            raise DataError(f"{source_path(mask)}: {error}") from None

    def _of_values(self, raw: Array, table: Array) -> Array:
        numbers = table[raw]
        if (numbers < 0).any():
            value = int(raw[numbers < 0][0])
            void = f", or {in_words(self.ignored)} for void" if self.ignored else ""
            raise DataError(
                f"a pixel has the value {value}: expected {in_words(self.ids)}{void}; name it in {LEGEND}, or put it "
                f"under ignore"
            )
        return numbers.astype("uint8")

    def _of_palette(self, raw: Array, palette: Array) -> Array:
        """Return a table of class numbers by value for a palette image.

        Programs that save an image of few colours with a palette number the colours in any order. So colours overrule
        values if all colours that the mask uses are in the legend.
        """
        used = np.flatnonzero(np.bincount(raw.ravel()))
        shown = {int(v): tuple(map(int, palette[v])) for v in used if v < len(palette)}  # colour of each used value
        known = {value: self._meaning[colour] for value, colour in shown.items() if colour in self._meaning}
        moved = [value for value, number in known.items() if number != self._numbers[value]]  # value and colour differ
        all_known = len(known) == len(used)
        if not moved:
            return self._numbers
        if self.palette and all_known:
            table = self._numbers.copy()
            table[list(known)] = list(known.values())
            return table
        # Without a palette in the legend, colours only contradict the values if they are greys that name several
        # classes; any other palette is decoration.
        grey = (palette == palette[:, :1]).all() and len({*known.values()} - {IGNORE}) > 1
        if self.palette or (all_known and grey):
            raise DataError(
                f"the value {moved[0]} is {self._word(self._numbers[moved[0]])}, and its colour in the palette, "
                f"{list(shown[moved[0]])}, is that of {self._word(known[moved[0]])}: expected values and colours that "
                f"agree, or only colours of {LEGEND}; save the masks as one channel of values without a palette"
            )
        return self._numbers

    def _of_colours(self, raw: Array) -> Array:
        if self.palette is None:
            raise DataError(
                f"the mask is in colour, but the classes of the colours are unknown: expected one channel of class "
                f"numbers; give a palette in {LEGEND}"
            )
        codes, numbers = self._colours
        found = np.empty(raw.shape[:2], "uint8")
        for y, row in enumerate(raw):  # row by row, because the codes take ten times the memory of the colours
            code = row.astype("int64") @ (65536, 256, 1)
            index = np.searchsorted(codes, code).clip(max=len(codes) - 1)
            if (unknown := codes[index] != code).any():
                x = int(unknown.argmax())
                raise DataError(
                    f"the pixel at row {y}, column {x} has the colour {row[x].tolist()}: expected one of the palette's "
                    f"{len(codes)}; add it to {LEGEND}; colours of void stand after those of the classes"
                )
            found[y] = numbers[index]
        return found

    def _word(self, number: int) -> str:
        return "no class" if number < 0 else "void" if number == IGNORE else f"class {self.names[number]!r}"

    @cached_property
    def _numbers(self) -> Array:
        """Class number by value; -1 for unknown values."""
        table = np.full(2**16, -1, "int16")
        table[list(self.ids)] = range(len(self.ids))
        table[list(self.ignored)] = IGNORE
        return table

    @cached_property
    def _meaning(self) -> dict[Colour, int]:
        """Class number by colour; without a palette, the colour of a value is the grey of that level."""
        numbers = [*range(len(self.names)), *[IGNORE] * len(self.ignored)]
        greys = [(value, value, value) for value in (*self.ids, *self.ignored)]
        return dict(zip(self.palette or greys, numbers, strict=False))

    @cached_property
    def _colours(self) -> tuple[Array, Array]:
        """Codes of the colours (65536 red + 256 green + blue) in rising order, and the class number of each."""
        codes = np.array(list(self._meaning)) @ (65536, 256, 1)
        order = codes.argsort()
        return codes[order], np.array(list(self._meaning.values()), "uint8")[order]


def read_values(mask: Source) -> tuple[Array, Array | None]:
    """Read a mask file.

    Returns:
        Values (height, width) of one channel (1, 8 or 16 bits) or of a palette image, or colours (height, width, 3);
        and the colours (n, 3) of the values of a palette image, else None. A palette that maps each value v to the
        grey of level v does not count, because programs write it for masks without colours.

    Raises:
        DataError: if the file is no image, or has another mode.
    """
    try:
        with undecoded(mask) as opened:
            mode, raw, palette = opened.mode, np.asarray(opened), _shown(opened)
    except Exception as error:  # the errors of decoders on damaged files have no common class
        raise DataError(f"cannot be read as a mask ({reason(error)}): expected a whole PNG") from error
    if mode in ("1", "L", "P") or mode.startswith("I;16"):
        return raw.astype("uint16"), palette
    if mode in ("RGB", "RGBA"):
        return raw[..., :3], None
    raise DataError(f"a mask of mode {mode}: expected one channel of 8 or 16 bits, or RGB; convert it")


def palette_of(mask: Source) -> Array | None:
    """Return the colours (n, 3) of the values of a palette image; None for another mask. Errors as `undecoded`."""
    with undecoded(mask) as opened:
        return _shown(opened)


def _shown(image: Image) -> Array | None:
    if image.mode != "P":
        return None
    palette = np.array(image.getpalette() or []).reshape(-1, 3)
    grey = len(palette) != 1 and (palette == np.arange(len(palette))[:, None]).all()
    return None if grey else palette


def _check_expression(expression: str) -> None:
    try:
        groups = re.compile(expression).groups
    except re.error as error:
        raise DataError(
            f"sequence is {expression!r}, which is no regular expression ({error}): expected one with a group "
            f"for the video; correct it"
        ) from error
    if groups != 1:
        raise DataError(
            f"sequence is {expression!r} with {groups} groups: expected one, which is the video, such as '(.+)_'"
        )


def repeated(items: Sequence[Any]) -> list[Any]:
    """Return the items that stand further in front too."""
    return [item for index, item in enumerate(items) if item in items[:index]]


def in_words(values: Sequence[int]) -> str:
    """Return whole numbers as text.

    >>> in_words([2, 0, 1]), in_words([0, 255])
    ('0 to 2', '0, 255')
    """
    ordered = sorted(values)
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered[:12])) + (", ..." if len(ordered) > 12 else "")
