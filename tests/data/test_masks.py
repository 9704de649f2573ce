"""What the values of a mask mean, by classes.yaml or by the masks, and what is refused in one line."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.scenery import NAMES, PALETTE, VOID, YAML, mask, painted
from PIL import Image

from vimoe.config.masks import IGNORE
from vimoe.data.legends import legend_in, legend_of_masks, read_legend
from vimoe.data.mask_colours import colour
from vimoe.data.masks import Legend
from vimoe.errors import DataError

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


@pytest.mark.parametrize("name", ["classes.yaml", "Classes.yaml", "classes.yml", "CLASSES.YML"])
def test_the_legend_is_found_whatever_its_letters(tmp_path: Path, name: str) -> None:
    assert legend_in(tmp_path) is None and legend_in(tmp_path / "nowhere") is None
    (tmp_path / name).write_text("names: [sky, road]")
    assert legend_in(tmp_path).names == ("sky", "road")


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


VALUES = np.array([[0, 1, 1], [2, 2, VOID]], "uint8")
READ = [[0, 1, 1], [2, 2, IGNORE]]
COLOUR_OF = dict(zip((0, 1, 2, VOID), PALETTE, strict=True))


def indexed(path: Path, order: list[int], colours: dict[int, tuple] = COLOUR_OF) -> Path:
    """VALUES as a palette PNG whose palette has the colours of these values in this order."""
    indices = np.vectorize(order.index)(VALUES).astype("uint8")
    colour(indices, [colours[value] for value in order]).save(path)
    return path


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


def test_values_whose_colour_differs_from_mask_to_mask_mean_nothing(tmp_path: Path) -> None:
    masks = [indexed(tmp_path / "a.png", [0, 1, 2, VOID]), indexed(tmp_path / "b.png", [2, 1, 0, VOID])]
    with pytest.raises(
        DataError,
        match=r"value 0 has the colour \[40, 80, 220\] in .*a\.png and \[220, 40, 40\] in .*b\.png: .* one palette",
    ) as error:
        legend_of_masks(masks)
    assert "\n" not in str(error.value)
    assert legend_of_masks(masks[:1]).palette[:3] == PALETTE[:3]


def test_colours_come_from_all_masks(tmp_path: Path) -> None:
    masks = []
    for value, shade in ((0, (5, 6, 7)), (1, (8, 9, 10))):
        colours = [(0, 0, 0)] * 2
        colours[value] = shade
        colour(np.full((2, 2), value, "uint8"), colours).save(path := tmp_path / f"{value}.png")
        masks.append(path)
    assert legend_of_masks(masks).palette == ((5, 6, 7), (8, 9, 10))


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
    with pytest.raises(DataError, match=r"in colour, .* give a palette in classes\.yaml") as error:
        legend(tmp_path, YAML).read(tmp_path / "m.png")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"in colour, .* names and a palette in classes\.yaml"):
        legend_of_masks([tmp_path / "m.png"])


def test_a_value_outside_of_the_classes_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, np.array([[0, 1], [2, 5]], "uint8"))
    with pytest.raises(DataError, match=r"m\.png: a pixel has the value 5: expected 0 to 2, or 7 for void"):
        legend(tmp_path, YAML).read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ignore: 3", "it has no names"),
        ("names: [a, b]\nignored: 3", "unknown entry 'ignored'; did you mean 'ignore'"),
        ("names: [a, a]", "'a' is repeated"),
        ("names: [a]", "1 classes: expected 2 to 255"),
        ("names: [a, yes]", "True as a name: .* in quotes"),
        ("names: [a, b]\nignore: 1", "ignore has 1, which is class 'b'"),
        ("names: [a, b]\nignore: void", "ignore has 'void'"),
        ("names: {x: a, 1: b}", "names has the value 'x'"),
        ("names: {1: a, 2: b}\nreduce_zero: true", "expected names as a list"),
        ("names: [a, b]\npalette: [[0, 0, 0]]", "palette has 1 colours"),
        ("names: [a, b]\npalette: [[0, 0, 0], [0, 0, 300]]", r"palette has \[0, 0, 300\]"),
        ("names: [a, b]\npalette: [[0, 0, 0], [0, 0, 0]]", r"\(0, 0, 0\) is repeated"),
        ("names: [a, b", "cannot be read"),
        ("names: {0: sky, 1: road, 1: car}", "cannot be read: key '1' is repeated in lines 1 and 1"),
        ("names: [a, b]\nignore: 3\nignore: 4", "'ignore' is repeated in lines 2 and 3"),
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
    with pytest.raises(
        DataError, match="the values 0: expected at least two.*; write names and ignore in a classes.yaml$"
    ):
        legend_of_masks([saved(tmp_path, np.zeros((2, 2), "uint8"))])


def test_masks_of_0_and_255_are_told_how_they_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path, np.array([[0, 255]], "uint8"))
    with pytest.raises(
        DataError, match="the values 0, 255: .* 255 was taken for void; if it is a class, write"
    ) as error:
        legend_of_masks([path])
    (text,) = re.findall("'(names.*)'", str(error.value))
    assert legend(tmp_path, text).read(path).tolist() == [[0, 1]]


def test_255_is_void_unless_it_has_a_name_or_nothing_is(tmp_path: Path) -> None:
    named = legend(tmp_path, "names: {0: background, 255: crack}\nignore: []\n")
    assert named == legend(tmp_path, "names: {0: background, 255: crack}\n")
    assert legend(tmp_path, "names: [background, crack]\n").ignored == (255,)
    with pytest.raises(DataError, match=r"ignore has 255, which is class 'crack': .* remove it there \('ignore: \[\]'"):
        legend(tmp_path, "names: {0: background, 255: crack}\nignore: 255\n")
    with pytest.raises(DataError, match="the value 7: expected 0, 255; name it"):
        named.read(saved(tmp_path, np.array([[0, 7]], "uint8")))


def test_a_legend_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_bytes("\ufeffnames: [Straße, Weg]\n".encode())
    code = (
        "from pathlib import Path; from vimoe.data.legends import read_legend; "
        "print(ascii(read_legend(Path('classes.yaml')).names))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
    )  # fmt: skip
    assert done.stdout == "('Stra\\xdfe', 'Weg')\n", done.stderr


def test_what_is_no_mask_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"m\.png: cannot be read as a mask"):
        legend(tmp_path, YAML).read(tmp_path / "m.png")
    Image.fromarray(np.zeros((2, 2), "float32")).save(tmp_path / "m.tif")
    with pytest.raises(DataError, match="mode F: expected one channel"):
        legend(tmp_path, YAML).read(tmp_path / "m.tif")
