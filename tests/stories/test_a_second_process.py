"""A second process: the rules that hold among the processes of a job, seen from two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import TESTS, finish, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes saw, started as `torchrun --nproc-per-node 2` does."""
    ended = finish(start(2, TESTS / "helpers" / "two_processes.py", folder))
    assert [status for status, _, _ in ended] == [0, 0], ended
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


def test_an_error_of_the_writer_is_that_of_all(seen: list[dict[str, Any]]) -> None:
    assert [each["refused"] for each in seen] == ["FolderError: the disk of rank 0 is full"] * 2


def test_a_bug_in_the_first_stays_one_and_the_others_name_it(seen: list[dict[str, Any]]) -> None:
    assert [each["broken"] for each in seen] == ["KeyError", "VimoeError: the first process ended by KeyError('scan')"]


def test_figures_of_an_epoch_are_of_all_images(seen: list[dict[str, Any]]) -> None:
    assert [each["epoch"] for each in seen] == [{"images": 6, "loss": 4 / 6, "shares": [0.25, 0.75]}] * 2


def test_means_are_of_all_and_gradients_of_each(seen: list[dict[str, Any]]) -> None:
    assert [each["mean"] for each in seen] == [[1.5, 15.0]] * 2
    assert [each["gradient"] for each in seen] == [[3.0, 30.0]] * 2  # 2 m of the square of the mean


def test_values_are_gathered_by_rank(seen: list[dict[str, Any]]) -> None:
    assert [each["gathered"] for each in seen] == [["rank 0", "rank 1"]] * 2


def test_values_of_images_are_merged_in_their_order(seen: list[dict[str, Any]]) -> None:
    assert [each["merged"] for each in seen] == [["0 of 0", "0 of 1", "1 of 0"]] * 2


def test_the_first_makes_what_the_others_find(seen: list[dict[str, Any]]) -> None:
    assert [each["found"] for each in seen] == ["made by 0", "made by 0, found by 1"]


def test_one_says_why_all_end(seen: list[dict[str, Any]]) -> None:
    assert sorted(each["speaks"] for each in seen) == [[False, False], [True, False]]


def test_a_batch_that_does_not_divide_is_refused(seen: list[dict[str, Any]]) -> None:
    odd = "train.batch_size=7 over 2 processes: expected a multiple of 2; set it to 6, or start another number"
    pairs = (
        "train.batch_size=6 over 2 processes: expected a multiple of 4, since images are mixed in pairs; set it to 4"
    )
    for each in seen:
        assert each["odd"].startswith(f"ConfigError: {odd}") and each["pairs"].startswith(f"ConfigError: {pairs}")
        assert each["lowered"] == 12


def test_progress_and_log_are_of_the_first_alone(seen: list[dict[str, Any]]) -> None:
    assert [each["shown"] for each in seen] == [["counting: 1 of 2", "an alarm"], []]
