"""Where standard error is no terminal, long work says how far it is; on a terminal it shows a bar."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest

from vimoe import terminal
from vimoe.terminal import progress, track

PACKAGE = Path(terminal.__file__).parent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(terminal, "monotonic", lambda: now[0])
    return now


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "vimoe.terminal"]


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vimoe")


def work(clock: list[float], seconds: float, items: int) -> None:
    for _ in track(range(items), "evaluating"):
        clock[0] += seconds


def test_a_line_every_half_minute_says_what_is_left(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    work(clock, 12.0, 10)
    assert said(caplog) == [
        "evaluating: 3 of 10, about 84 s left",  # after 36 s
        "evaluating: 6 of 10, about 48 s left",
        "evaluating: 9 of 10, about 12 s left",
    ]


def test_short_work_says_nothing_and_the_end_is_no_news(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    work(clock, 2.9, 10)
    work(clock, 40.0, 1)
    assert said(caplog) == []


def test_time_left_is_told_in_the_unit_that_fits(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    for seconds in (99.0, 60.0 * 40, 3600.0 * 4):
        work(clock, seconds, 2)
    assert [line.partition("about ")[2] for line in said(caplog)] == ["99 s left", "40 min left", "4.0 h left"]


def test_work_of_unknown_length_is_counted(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    for _ in track(iter(lambda: clock[0] < 200, False), "scanning"):
        clock[0] += 31
    assert said(caplog) == ["scanning: 1 done", "scanning: 2 done", "scanning: 3 done", "scanning: 4 done"]


def test_what_was_done_before_does_not_count_as_fast(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """A training that goes on after 90 of 100 steps."""
    with progress("training", 100, done=90) as show:
        clock[0] += 31
        show("epoch 9/10", 1)
        clock[0] += 31
        show("epoch 10/10", 0)
    assert said(caplog) == ["epoch 9/10: 91 of 100, about 5 min left", "epoch 10/10: 91 of 100, about 9 min left"]


def test_nothing_is_shown_of_work_without_a_name(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    for _ in track(range(3), ""):
        clock[0] += 100
    assert said(caplog) == []


def test_a_terminal_sees_a_bar_and_no_lines(
    clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", seen := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert list(track(["a"], "evaluating")) == ["a"] and not seen.getvalue()  # no bar of one item
    assert list(track(["a", "b"], "evaluating")) == ["a", "b"]
    assert "evaluating" in seen.getvalue() and "2/2" in seen.getvalue() and not said(caplog)


def test_bars_have_one_home() -> None:
    """What shows a bar of its own says nothing where there is no terminal."""
    own = [path.name for path in PACKAGE.rglob("*.py") if "rich.progress" in path.read_text()]
    assert own == ["terminal.py"]
