"""A second process: the rules that hold among the processes of a job, seen from two of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes saw, started as `torchrun --nproc-per-node 2` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    launched |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    running = [
        subprocess.Popen(
            [sys.executable, TESTS / "helpers" / "two_processes.py", folder],
            env={**os.environ, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_each_knows_which_it_is(seen: list[dict[str, Any]]) -> None:
    assert [(each["rank"], each["count"], each["first"], each["device"]) for each in seen] == [
        (0, 2, True, "cpu"),
        (1, 2, False, "cpu"),
    ]


def test_a_sum_is_of_all_and_leaves_what_was_given(seen: list[dict[str, Any]]) -> None:
    assert [each["sum"] for each in seen] == [[3.0, 30.0]] * 2
    assert [each["kept"] for each in seen] == [[1.0, 10.0], [2.0, 20.0]]


def test_a_flag_of_one_is_a_flag_of_all(seen: list[dict[str, Any]]) -> None:
    assert [each["any"] for each in seen] == [[False, True, True]] * 2


def test_all_get_the_value_of_the_first(seen: list[dict[str, Any]]) -> None:
    assert [each["broadcast"] for each in seen] == [{"rank": 0}] * 2


def test_one_writes_and_all_know_the_result(seen: list[dict[str, Any]], folder: Path) -> None:
    assert [each["once"] for each in seen] == ["written"] * 2
    assert (folder / "written").read_text() == "x"


def test_an_error_of_the_writer_ends_all_with_its_message(seen: list[dict[str, Any]]) -> None:
    assert [each["refused"] for each in seen] == ["VimoeError: the disk of rank 0 is full"] * 2


def test_figures_of_an_epoch_are_of_all_images(seen: list[dict[str, Any]]) -> None:
    assert [each["epoch"] for each in seen] == [{"images": 6, "loss": 4 / 6, "shares": [0.25, 0.75]}] * 2


def test_training_in_two_is_refused(seen: list[dict[str, Any]]) -> None:
    expected = "ConfigError: 2 processes: expected 1, training in more is not there yet"
    assert [each["training"] for each in seen] == [expected] * 2


def test_progress_and_log_are_of_the_first_alone(seen: list[dict[str, Any]]) -> None:
    assert [each["shown"] for each in seen] == [["counting: 1 of 2", "an alarm"], []]
