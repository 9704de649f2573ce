"""Legends from classes.yaml, or inferred from masks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.mask_files import indexed, legend, saved
from helpers.scenery import NAMES, PALETTE, VOID

from vimoe.data.legends import legend_in, legend_of_masks
from vimoe.data.mask_colours import colour
from vimoe.errors import DataError


@pytest.mark.parametrize("name", ["classes.yaml", "Classes.yaml", "classes.yml", "CLASSES.YML"])
def test_the_legend_is_found_whatever_its_letters(tmp_path: Path, name: str) -> None:
    assert legend_in(tmp_path) is None and legend_in(tmp_path / "nowhere") is None
    (tmp_path / name).write_text("names: [sky, road]")
    assert legend_in(tmp_path).names == ("sky", "road")


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


def test_names_by_value_and_several_void_values(tmp_path: Path) -> None:
    got = legend(tmp_path, "names: {7: road, 2: sky}\nignore: [0, 9]\n")
    assert (got.names, got.ids, got.ignored) == (("sky", "road"), (2, 7), (0, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ignore: 3", "it has no names"),
        ("names: [a, b]\nignored: 3", "unknown entry 'ignored'; did you mean 'ignore'"),
        ("names: [a, a]", "'a' is repeated"),
        ("names: [a]", "1 class: expected 2 to 255"),
        ("names: [a, yes]", "True as a name: .* in quotes"),
        ("names: [a, b]\nignore: 1", "ignore has 1, which is class 'b'"),
        ("names: [a, b]\nignore: void", "ignore has 'void'"),
        ("names: {x: a, 1: b}", "names has the value 'x'"),
        ("names: {1: a, 2: b}\nreduce_zero: true", "expected names as a list"),
        ("names: [a, b]\npalette: [[0, 0, 0]]", "palette has 1 colours"),
        ("names: [a, b]\npalette: [[0, 0, 0], [0, 0, 300]]", r"palette has \[0, 0, 300\]"),
        ("names: [a, b]\npalette: [[0, 0, 0], [0, 0, 0]]", r"\(0, 0, 0\) is repeated"),
        ("names: [a, b", "cannot be read"),
        ("names: {0: sky, 1: road, 1: car}", "cannot be read: key '1' is repeated in line 1;"),
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
