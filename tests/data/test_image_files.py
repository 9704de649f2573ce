"""Image files in folders, and junk counted by kind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.pictures import folder, picture

from vimoe.data.image_files import find_images
from vimoe.errors import DataError


def test_what_is_no_image_is_counted_by_kind(tmp_path: Path) -> None:
    folder(tmp_path, 1, classes=("red",))
    for name in ("red/Thumbs.db", "red/.DS_Store", "red/._000.png", "red/a.txt", "red/deep/b.TXT", "red/README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("red/none", "red/.cache", "red/__MACOSX", "red/sub.jpg"):
        (tmp_path / name).mkdir()
    for name in ("red/.cache/1.png", "red/__MACOSX/1.png", "red/sub.jpg/1.png"):
        picture((255, 0, 0), 0).save(tmp_path / name)
    files, junk = find_images(tmp_path / "red")
    assert files == [tmp_path / "red" / "000.png", tmp_path / "red" / "sub.jpg" / "1.png"]
    expected = {".db files": 1, "hidden files": 2, ".txt files": 2, "files without an ending": 1}
    assert junk == {**expected, "empty folders": 1, "hidden folders": 2}


def test_loops_of_links_end(tmp_path: Path) -> None:
    folder(tmp_path, 2, classes=("red",))
    (tmp_path / "red" / "again").symlink_to(tmp_path / "red")
    (tmp_path / "red" / "up").symlink_to(tmp_path)
    files, junk = find_images(tmp_path / "red")
    assert len(files) == 2 and junk == {"links to folders": 2}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"red cannot be listed \(Permission denied\)"):
        find_images(tmp_path / "red")
