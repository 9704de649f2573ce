"""The folders of the user's cache."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vimoe.data.user_cache import STALE, cache_folder, make_cache_folder
from vimoe.files import TEMPORARY


def test_what_killed_processes_left_is_deleted_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are being written stay, and so do locks, which nobody writes to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder() / "features"
    folder.mkdir(parents=True)
    ages = {
        "features.npy": 2 * STALE, f"{TEMPORARY}old": STALE + 60, f"{TEMPORARY}new": STALE - 60,
        f"{TEMPORARY}held.lock": 2 * STALE,
    }  # fmt: skip
    for name, age in ages.items():
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    assert make_cache_folder("features", "features") == folder
    assert {path.name for path in folder.iterdir()} == {*ages} - {f"{TEMPORARY}old"}
