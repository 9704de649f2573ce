"""Predicted masks have names of their own, and are the same files whichever process writes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import shared_analysis
from helpers.pictures import folder
from helpers.processes import run

from vimoe.data.image_files import list_images


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Seven images, of which several have one name, and one cannot be read."""
    folder(tmp_path / "images", 2)
    shutil.copytree(tmp_path / "images" / "red", tmp_path / "images" / "violet")
    (tmp_path / "images" / "green" / "000.png").write_bytes(b"no image")
    return list_images([tmp_path / "images"])[:7]


def test_files_of_one_name_get_a_number_whether_or_not_others_can_be_read(files: list[Path], tmp_path: Path) -> None:
    found = shared_analysis.masks(files, tmp_path / "out")
    assert [each["file"] for each in found] == [str(file) for file in files]
    names = [Path(each["mask"]).name if "mask" in each else "error" for each in found]
    numbers = ["-mask.png", "-mask.png", "error", "-2-mask.png", "-3-mask.png", "-3-mask.png", "-4-mask.png"]
    assert names == [f"{i % 2:03d}{n}" if n != "error" else n for i, n in enumerate(numbers)]


def test_processes_write_what_one_writes(files: list[Path], tmp_path: Path) -> None:
    one = shared_analysis.masks(files, tmp_path / "out")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    shutil.rmtree(tmp_path / "out")
    assert run(shared_analysis.masks, 2, files, tmp_path / "out") == [one, one]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept and len(kept) == 12
