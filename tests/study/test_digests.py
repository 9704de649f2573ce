"""Digests of paths and of the package's code."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vimoe.errors import ConfigError
from vimoe.study import digests
from vimoe.study.digests import code_version, digest_of_path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_path_is_known_by_its_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "cat").mkdir(parents=True)
        (tmp_path / name / "cat/1.jpg").write_bytes(b"1")
    first = digest_of_path(str(tmp_path / "a"))
    assert first == digest_of_path(str(tmp_path / "b"))  # wherever it lies
    (tmp_path / "b/cat/1.jpg").rename(tmp_path / "b/cat/2.jpg")
    assert first != digest_of_path(str(tmp_path / "b"))
    (tmp_path / "a/cat/1.jpg").write_bytes(b"2")
    assert first != digest_of_path(str(tmp_path / "a"))


def test_the_code_has_a_version() -> None:
    assert code_version() == code_version() and len(code_version()) == 12


def test_analysis_counts_where_something_is_analysed_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "vimoe"
    for part in ("analysis", "training", "report"):
        (package / part).mkdir(parents=True)
        (package / part / "one.py").write_text("1")
    (package / "__init__.py").write_text("")
    found = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr("vimoe.study.digests.importlib.util.find_spec", lambda name: found)
    before = code_version(False), code_version(True)
    (package / "analysis/one.py").write_text("2")
    assert code_version(False) == before[0] and code_version(True) != before[1]
    between = code_version(True)
    (package / "training/one.py").write_text("2")
    assert code_version(False) != before[0] and code_version(True) not in (before[1], between)
    between = code_version(True)
    (package / "report/one.py").write_text("2")
    assert code_version(True) == between


def test_links_count_as_what_they_lead_to(tmp_path: Path) -> None:
    real, linked, copied = (tmp_path / name for name in ("real", "linked", "copied"))
    for folder in (real / "train", copied / "train"):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("one")
    linked.mkdir()
    (linked / "train").symlink_to(real / "train")
    (real / "train" / "round").symlink_to(real)  # which leads back
    assert digest_of_path(str(linked)) == digest_of_path(str(copied))
    (real / "train" / "b.txt").write_text("two")
    assert digest_of_path(str(linked)) != digest_of_path(str(copied))


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ConfigError, match="expected files in this folder, and there is none"):
        digest_of_path(str(tmp_path / "empty"))


def test_files_are_read_again_only_where_size_or_time_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    file = folder / "a.txt"
    file.write_text("one")
    first, real, read = digest_of_path(str(folder)), digests.hashlib.file_digest, []
    monkeypatch.setattr(digests.hashlib, "file_digest", lambda *given: read.append(1) or real(*given))
    assert digest_of_path(str(folder)) == first and not read
    time = file.stat().st_mtime_ns
    file.write_text("two")
    os.utime(file, ns=(time + 1, time + 1))
    assert digest_of_path(str(folder)) != first and len(read) == 1
    (cached,) = (tmp_path / "cache" / "vimoe" / "digests").iterdir()
    for damage in ("", "[]", "{}", "no json"):
        cached.write_text(damage)
        read.clear()
        assert digest_of_path(str(folder)) != first and len(read) == 1
