"""What the values of a mask mean, by classes.yaml or by the masks, and what is refused in one line."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.mask_files import COLOUR_OF, COLOURS, READ, VALUES, indexed, legend, saved
from helpers.scenery import PALETTE, VOID, YAML, mask, painted
from PIL import Image

from vimoe.config.masks import IGNORE
from vimoe.data.legends import legend_of_masks
from vimoe.data.mask_colours import colour
from vimoe.errors import DataError


def test_values_become_class_numbers_and_void(tmp_path: Path) -> None:
    got = legend(tmp_path, YAML).read(saved(tmp_path, np.array([[0, 1], [2, VOID]], "uint8")))
    assert got.tolist() == [[0, 1], [2, IGNORE]] and got.dtype == np.uint8


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "bool"])
def test_masks_of_8_16_and_1_bit_are_read_alike(tmp_path: Path, dtype: str) -> None:
    values = np.array([[0, 1], [1, 0]]).astype(dtype)
    assert legend(tmp_path, YAML).read(saved(tmp_path, values)).tolist() == [[0, 1], [1, 0]]


def test_large_values_of_16_bits_are_themselves(tmp_path: Path) -> None:
    named = legend(tmp_path, "names: {300: a, 10001: b}\nignore: 65535\n")
    got = named.read(saved(tmp_path, np.array([[300, 10001, 65535]], "uint16")))
    assert named.names == ("a", "b") and got.tolist() == [[0, 1, IGNORE]]


def test_a_palette_png_is_its_indices(tmp_path: Path) -> None:
    values = np.array([[0, 1], [2, VOID]], "uint8")
    path = saved(tmp_path, values, "P")
    with Image.open(path) as opened:
        assert opened.mode == "P"
    assert legend(tmp_path, YAML).read(path).tolist() == [[0, 1], [2, IGNORE]]


@pytest.mark.parametrize("order", list(itertools.permutations((0, 1, 2, VOID))))
def test_a_palette_png_in_an_order_of_its_own_is_read_by_the_colours_of_the_legend(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    path = indexed(tmp_path / "m.png", list(order))
    assert legend(tmp_path, YAML + COLOURS).read(path).tolist() == READ


def test_what_quantize_makes_of_a_mask_in_colour_is_read_as_the_mask(tmp_path: Path) -> None:
    painted(mask(0)).quantize(4).save(tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as opened:
        assert opened.mode == "P"
    expected = np.where(mask(0) == VOID, IGNORE, mask(0))
    assert (legend(tmp_path, YAML + COLOURS).read(tmp_path / "m.png") == expected).all()


def test_without_colours_of_the_legend_a_palette_png_is_its_indices(tmp_path: Path) -> None:
    described = legend(tmp_path, YAML + COLOURS)
    for shade in (lambda v: (v, v, v), lambda v: (255 - v, 9, v), lambda v: COLOUR_OF.get(v, (1, 1, 1))):
        colour(VALUES, [shade(v) for v in range(256)]).save(tmp_path / "m.png")
        assert described.read(tmp_path / "m.png").tolist() == READ
    colour(VALUES, [(9, 9, v) if v == VOID else COLOUR_OF.get(v, (1, 1, 1)) for v in range(VOID + 1)]).save(
        tmp_path / "m.png"
    )
    assert described.read(tmp_path / "m.png").tolist() == READ  # void has another colour, which contradicts nothing


def test_places_of_classes_with_the_colours_of_the_legend_are_the_classes(tmp_path: Path) -> None:
    """As `predict` writes them, whatever values the data have."""
    described = legend(tmp_path, "names: {2: sky, 7: road, 9: car}\n" + f"palette: {[list(c) for c in PALETTE[:3]]}\n")
    colour(np.array([[0, 1, 2]], "uint8"), PALETTE[:3]).save(tmp_path / "m.png")
    assert described.read(tmp_path / "m.png").tolist() == [[0, 1, 2]]


def test_colours_that_contradict_the_values_are_refused(tmp_path: Path) -> None:
    path = indexed(tmp_path / "m.png", [1, 0, 2, VOID], {**COLOUR_OF, 2: (9, 9, 9)})
    with pytest.raises(
        DataError,
        match=r"the value 0 is class 'sky', and its colour .*, \[120, 120, 120\], is that of class 'road': .*; save",
    ) as error:
        legend(tmp_path, YAML + COLOURS).read(path)
    assert "\n" not in str(error.value)


def test_greys_whose_levels_are_other_values_are_refused(tmp_path: Path) -> None:
    """Programs that make PNGs small give masks of one channel a palette of greys, in any order."""
    path = indexed(tmp_path / "m.png", [1, 0, 2, VOID], {value: (value, value, value) for value in COLOUR_OF})
    with pytest.raises(DataError, match=r"the value 0 is class 'sky', .* \[1, 1, 1\], is that of class 'road'"):
        legend(tmp_path, YAML).read(path)


def test_black_and_white_are_two_values(tmp_path: Path) -> None:
    for black, white in ((0, 255), (255, 0)):
        colour(np.array([[0, 1]], "uint8"), [(black,) * 3, (white,) * 3]).save(tmp_path / "m.png")
        assert legend(tmp_path, "names: [ground, crack]\n").read(tmp_path / "m.png").tolist() == [[0, 1]]
        assert legend_of_masks([tmp_path / "m.png"]).names == ("0", "1")


def test_reduce_zero_is_ade20k(tmp_path: Path) -> None:
    got = legend(tmp_path, "names: [wall, floor]\nreduce_zero: true\n")
    assert (got.ids, got.ignored) == ((1, 2), (0, 255))
    assert got.read(saved(tmp_path, np.array([[0, 1, 2, 255]], "uint8"))).tolist() == [[IGNORE, 0, 1, IGNORE]]


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_are_read_by_the_palette(tmp_path: Path, alpha: bool) -> None:
    values = mask(0)
    picture = painted(values).convert("RGBA") if alpha else painted(values)
    picture.save(tmp_path / "m.png")
    expected = np.where(values == VOID, IGNORE, values)
    assert (legend(tmp_path, YAML + COLOURS).read(tmp_path / "m.png") == expected).all()


@pytest.mark.parametrize("colour", [(1, 2, 3), (255, 255, 255), (120, 120, 121)])
def test_an_unknown_colour_is_named_with_its_place(tmp_path: Path, colour: tuple) -> None:
    picture = painted(mask(0))
    picture.putpixel((5, 3), colour)
    picture.save(tmp_path / "m.png")
    named = re.escape(str(list(colour)))
    with pytest.raises(DataError, match=rf"m\.png: the pixel at row 3, column 5 has the colour {named}: .*palette"):
        legend(tmp_path, YAML + COLOURS).read(tmp_path / "m.png")


def test_colours_without_a_palette_are_refused_with_the_remedy(tmp_path: Path) -> None:
    painted(mask(0)).save(tmp_path / "m.png")
    with pytest.raises(DataError, match=r"in colour, .* give a palette in classes\.yaml") as error:
        legend(tmp_path, YAML).read(tmp_path / "m.png")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"in colour, .* names and a palette in classes\.yaml"):
        legend_of_masks([tmp_path / "m.png"])


def test_a_value_outside_of_the_classes_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, np.array([[0, 1], [2, 5]], "uint8"))
    with pytest.raises(DataError, match=r"m\.png: a pixel has the value 5: expected 0 to 2, or 7 for void"):
        legend(tmp_path, YAML).read(path)


def test_what_is_no_mask_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"m\.png: cannot be read as a mask"):
        legend(tmp_path, YAML).read(tmp_path / "m.png")
    Image.fromarray(np.zeros((2, 2), "float32")).save(tmp_path / "m.tif")
    with pytest.raises(DataError, match="mode F: expected one channel"):
        legend(tmp_path, YAML).read(tmp_path / "m.tif")
