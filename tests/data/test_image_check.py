"""Images are opened once; the outcome is remembered, whatever happens to the cache."""

from __future__ import annotations

import json
import os
from io import BytesIO
from pathlib import Path

import pytest
from helpers.pictures import folder
from PIL import Image

from vimoe.data import image_check
from vimoe.data.image_check import check_images
from vimoe.data.image_files import find_images
from vimoe.data.user_cache import cache_folder


class Remembered:
    """A folder that was tried once, with a damaged file; what is decoded from now on is noted."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.root = tmp_path / "cache", folder(tmp_path / "data", 3)
        monkeypatch.setattr(image_check, "cache_folder", lambda: self.cache)
        self.bad = self.root / "red" / "000.png"
        self.bad.write_bytes(b"")
        self.first = self.again()
        self.decoded: list[bytes] = []
        decode = image_check.decode

        def noting(file: BytesIO) -> Image.Image:
            self.decoded.append(file.read())
            file.seek(0)
            return decode(file)

        monkeypatch.setattr(image_check, "decode", noting)

    def again(self) -> image_check.CheckedImages:
        return check_images(find_images(self.root)[0], self.root)

    @property
    def stored(self) -> dict:
        (file,) = self.cache.iterdir()
        return json.loads(file.read_text())


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remembered:
    return Remembered(tmp_path, monkeypatch)


def test_a_second_scan_opens_what_was_damaged_alone(remembered: Remembered) -> None:
    assert len(remembered.first.digests) == 8 and remembered.first.errors == {remembered.bad: "the file is empty"}
    assert remembered.again() == remembered.first and len(remembered.decoded) == 1
    assert sorted(remembered.stored["files"]) == [
        str(file.relative_to(remembered.root)) for file in sorted(remembered.first.digests)
    ]


def test_a_file_of_another_time_or_size_is_opened_again(remembered: Remembered) -> None:
    one, other = remembered.root / "red" / "001.png", remembered.root / "red" / "002.png"
    os.utime(one, ns=(0, 0))
    status = other.stat()
    other.write_bytes(other.read_bytes()[:-30])
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = remembered.again()
    assert len(remembered.decoded) == 3 and set(again.errors) == {remembered.bad, other}
    assert again.digests[one] == remembered.first.digests[one]


def test_a_mended_file_is_seen_even_with_its_old_time(remembered: Remembered) -> None:
    status = remembered.bad.stat()
    remembered.bad.write_bytes((remembered.root / "red" / "001.png").read_bytes())
    os.utime(remembered.bad, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not remembered.again().errors


def test_a_cache_forgets_files_that_are_gone_and_keeps_those_not_asked_for(remembered: Remembered) -> None:
    (remembered.root / "red" / "001.png").unlink()
    remembered.again()
    assert "red/001.png" not in remembered.stored["files"] and len(remembered.stored["files"]) == 7
    (remembered.root / "red" / "002.png").unlink()
    check_images(find_images(remembered.root / "blue")[0], remembered.root)
    assert sorted({name.split("/")[0] for name in remembered.stored["files"]}) == ["blue", "green"]


DAMAGED = ["", "{", "[]", "null", "{}", '{"made_by": 1}', "[" * 100_000, "\xff"]
DAMAGED += [json.dumps({"made_by": image_check.MADE_BY, **rest}) for rest in ({}, {"files": []})]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_cache_is_ignored_and_written_anew(remembered: Remembered, damage: str) -> None:
    good = remembered.stored
    (file,) = remembered.cache.iterdir()
    file.write_bytes(damage.encode("latin-1"))
    assert remembered.again() == remembered.first and len(remembered.decoded) == 9 and remembered.stored == good


@pytest.mark.parametrize("entry", [None, 3, "abc", [1, 2], [1, "x", "y"], {"a": 1}])
def test_a_damaged_entry_is_ignored(remembered: Remembered, entry: object) -> None:
    (file,) = remembered.cache.iterdir()
    file.write_text(json.dumps({**remembered.stored, "files": {**remembered.stored["files"], "red/001.png": entry}}))
    assert remembered.again() == remembered.first and len(remembered.decoded) == 9


def test_what_another_pillow_could_read_is_tried_again(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_check, "MADE_BY", "vimoe 1, Pillow 99")
    assert remembered.again() == remembered.first and len(remembered.decoded) == 9


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(image_check, "cache_folder", lambda: tmp_path / "file" / "vimoe")
    root = folder(tmp_path / "data", 1)
    assert len(check_images(find_images(root)[0], root).digests) == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "is not remembered" in caplog.text
    monkeypatch.setattr(image_check, "cache_folder", cache_folder)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does where it knows no home
    assert len(check_images(find_images(root)[0], root).digests) == 3
    assert "Could not determine home directory" in caplog.text


def test_an_interrupted_scan_keeps_what_it_did(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    before = remembered.stored["files"]
    new = folder(remembered.root, 60)  # in each class more than the first pieces of work

    def interrupted(results: object, *_: object, **__: object) -> object:
        for done, result in enumerate(results):
            if done == 40:
                raise KeyboardInterrupt
            yield result

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(image_check, "track", interrupted)
        check_images(find_images(new)[0], new)
    kept = remembered.stored["files"]
    assert len(kept) > 40 and before.keys() <= kept.keys()
    remembered.decoded.clear()
    assert len(remembered.again().digests) == 180
    assert 0 < len(set(remembered.decoded)) <= 180 - 40  # a set: threads may be finishing what was interrupted


def test_the_cache_is_where_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/vimoe")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/vimoe")


def test_folders_have_each_their_own_cache_however_they_are_named(
    remembered: Remembered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(remembered.root)
    here = check_images(find_images(Path())[0], Path())
    assert len(remembered.decoded) == 1 and len(here.digests) == 8  # the same folder
    other = folder(remembered.root.parent / "other" / "data", 3)
    check_images(find_images(other)[0], other)
    assert len(list(remembered.cache.iterdir())) == 2 and len(remembered.decoded) == 10


def test_a_folder_with_a_long_name_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(image_check, "cache_folder", lambda: tmp_path / "cache")
    root = folder(tmp_path / ("\U0001f600" * 63), 1)
    assert len(check_images(find_images(root)[0], root).digests) == 3 and not caplog.records
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_many_unreadable_images_are_a_line(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / f"{name}.png").write_bytes(b"")
    line = str(check_images(find_images(tmp_path)[0], tmp_path))
    empty = "(the file is empty)"
    assert line == f"5 of 5 images cannot be read: a.png {empty}, b.png {empty}, c.png {empty}, 2 more"
