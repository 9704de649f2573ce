"""Files are written whole or not at all, whatever they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from vimoe.errors import FolderError
from vimoe.files import TEMPORARY, write_text, written_whole


@pytest.mark.parametrize("name", ["a", "a" * 255, "ü" * 127, "\U0001f600" * 63])
def test_a_name_may_be_as_long_as_the_file_system_lets_it_be(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_is_not_finished_is_known_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), written_whole(tmp_path / "x.bin") as file:
        file.write(b"half")
        (only,) = tmp_path.iterdir()
        assert only.name.startswith(TEMPORARY) and "x.bin" not in only.name
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="could not be written: File name too long"):
        write_text(tmp_path / ("a" * 256), "x")
    assert not list(tmp_path.iterdir())
