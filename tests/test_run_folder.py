"""A run folder is locked by one training at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import filelock
import pytest

from vimoe.errors import FolderError
from vimoe.files import HOLDER, LOCK, TEMPORARY
from vimoe.run_folder import check_new, is_locked, locked, made_whole


def _hold(folder: Path, held: object) -> None:
    with locked(folder):
        held.set()
        signal.pause()


def test_a_folder_is_one_process_s_until_that_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held))
    process.start()
    assert held.wait(60)
    assert is_locked(tmp_path)
    said = f"is being trained by process {process.pid} on .*: expected an idle folder; wait for it"
    with pytest.raises(FolderError, match=said), locked(tmp_path):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / LOCK).exists() and not is_locked(tmp_path)
    with locked(tmp_path):
        assert is_locked(tmp_path)
    assert not list(tmp_path.iterdir())


def test_who_only_asks_for_the_lock_keeps_nobody_from_it(tmp_path: Path) -> None:
    asking = filelock.FileLock(tmp_path / LOCK, thread_local=False)
    asking.acquire()
    threading.Timer(0.05, asking.release).start()
    with locked(tmp_path):
        assert is_locked(tmp_path)


def test_a_lock_leaves_filelocks_own_file_alone(tmp_path: Path) -> None:
    """On file systems without flock that file says which process holds it, by which a dead one is known."""
    with locked(tmp_path):
        assert "process" not in (tmp_path / LOCK).read_text()
        assert f"process {os.getpid()} on " in (tmp_path / HOLDER).read_text()


def test_a_folder_that_cannot_be_made_is_refused_before_it_is_tried(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="--out .*file/run/deep cannot be created: .*file is no folder; name another"):
        check_new(tmp_path / "file" / "run" / "deep")
    assert check_new(tmp_path / "a" / "b") == tmp_path / "a" / "b" and not (tmp_path / "a").exists()


def test_a_folder_made_whole_takes_the_place_of_what_a_killed_process_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / f"{TEMPORARY}model").mkdir(parents=True)
    for name in (LOCK, HOLDER, f"{TEMPORARY}model/half"):
        (out / name).touch()
    with made_whole(out) as folder:
        (folder / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("busy", [True, False])
def test_what_another_process_put_there_meanwhile_stays(tmp_path: Path, busy: bool) -> None:
    (tmp_path / "out").mkdir()
    refused = pytest.raises(FolderError, match="out cannot be created: Directory not empty")
    with ExitStack() as held, refused, made_whole(tmp_path / "out"):
        if busy:
            held.enter_context(locked(tmp_path / "out"))
        else:
            (tmp_path / "out" / "notes").touch()
    assert busy or (tmp_path / "out" / "notes").exists()
