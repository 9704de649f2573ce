"""What the values of a mask mean, by classes.yaml or by the masks, and what is refused in one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scenery import NAMES, PALETTE, VOID, YAML, mask, painted

from vimoe.errors import DataError
from vimoe.segmentation.legend import IGNORE, Legend, legend_of_masks, read_legend

COLOURS = f"palette: {[list(colour) for colour in PALETTE]}\n"


def legend(tmp_path: Path, text: str) -> Legend:
    (tmp_path / "classes.yaml").write_text(text)
    return read_legend(tmp_path / "classes.yaml")


def saved(tmp_path: Path, values: np.ndarray, mode: str = "") -> Path:
    picture = Image.fromarray(values)
    if mode == "P":
        picture = picture.convert("P") if picture.mode != "L" else picture
        picture.putpalette([channel for colour in (*PALETTE, *[(1, 1, 1)] * 252) for channel in colour])
    picture.save(tmp_path / "m.png")
    return tmp_path / "m.png"


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


def test_reduce_zero_is_ade20k(tmp_path: Path) -> None:
    got = legend(tmp_path, "names: [wall, floor]\nreduce_zero: true\n")
    assert (got.ids, got.ignored) == ((1, 2), (0, 255))
    assert got.read(saved(tmp_path, np.array([[0, 1, 2, 255]], "uint8"))).tolist() == [[IGNORE, 0, 1, IGNORE]]


def test_names_by_value_and_several_void_values(tmp_path: Path) -> None:
    got = legend(tmp_path, "names: {7: road, 2: sky}\nignore: [0, 9]\n")
    assert (got.names, got.ids, got.ignored) == (("sky", "road"), (2, 7), (0, 9))


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
    with pytest.raises(DataError, match=r"in colour .* give a palette in classes\.yaml") as error:
        legend(tmp_path, YAML).read(tmp_path / "m.png")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"in colour .* names and a palette in classes\.yaml"):
        legend_of_masks([tmp_path / "m.png"])


def test_a_value_outside_of_the_classes_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, np.array([[0, 1], [2, 5]], "uint8"))
    with pytest.raises(DataError, match=r"m\.png: a pixel has the value 5: expected 0 to 2, or 7 for void"):
        legend(tmp_path, YAML).read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ignore: 3", "no names in it"),
        ("names: [a, b]\nignored: 3", "unknown entry 'ignored'; did you mean 'ignore'"),
        ("names: [a, a]", "'a' stands twice"),
        ("names: [a]", "1 classes: expected 2 to 255"),
        ("names: [a, yes]", "True as a name: .* in quotes"),
        ("names: [a, b]\nignore: 1", "ignore has 1, which is class 'b'"),
        ("names: [a, b]\nignore: void", "ignore has 'void'"),
        ("names: {x: a, 1: b}", "names has the value 'x'"),
        ("names: {1: a, 2: b}\nreduce_zero: true", "expected names as a list"),
        ("names: [a, b]\npalette: [[0, 0, 0]]", "palette has 1 colours"),
        ("names: [a, b]\npalette: [[0, 0, 0], [0, 0, 300]]", r"palette has \[0, 0, 300\]"),
        ("names: [a, b]\npalette: [[0, 0, 0], [0, 0, 0]]", r"\(0, 0, 0\) stands twice"),
        ("names: [a, b", "cannot be read"),
        ("names: [a, b]\nsequence: 3", "sequence is 3: expected a regular expression; put it in quotes"),
        ("names: [a, b]\nsequence: '(a'", r"sequence is '\(a', which is no regular expression \(missing \)"),
        ("names: [a, b]\nsequence: a_", "sequence is 'a_' with 0 groups: expected one"),
    ],
)
def test_a_wrong_legend_is_one_line_that_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"classes.yaml.*{message}") as error:
        legend(tmp_path, text)
    assert "\n" not in str(error.value)


def test_without_a_legend_the_masks_say_how_many_classes(tmp_path: Path) -> None:
    got = legend_of_masks([saved(tmp_path, np.array([[0, 3, 255]], "uint8"))])
    assert (got.names, got.ids, got.ignored, got.palette) == (("0", "1", "2", "3"), (0, 1, 2, 3), (255,), None)
    got = legend_of_masks([saved(tmp_path, np.array([[0, 2, 255]], "uint8"), "P")])
    assert got.palette == PALETTE[: len(NAMES)]


def test_one_class_is_no_segmentation(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="values up to 0.*at least two"):
        legend_of_masks([saved(tmp_path, np.zeros((2, 2), "uint8"))])


def test_what_is_no_mask_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"m\.png: cannot be read as a mask"):
        legend(tmp_path, YAML).read(tmp_path / "m.png")
    Image.fromarray(np.zeros((2, 2), "float32")).save(tmp_path / "m.tif")
    with pytest.raises(DataError, match="mode F: expected one channel"):
        legend(tmp_path, YAML).read(tmp_path / "m.tif")
