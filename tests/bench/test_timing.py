"""Times are compared in pairs within a round."""

from __future__ import annotations

import numpy as np
import pytest

import vimoe.bench.timing
from vimoe.bench.timing import compare, interleaved


def test_ratios_are_of_pairs_within_a_round_to_the_faster_floor() -> None:
    slow_machine = np.array([1.0, 10.0, 1.0, 10.0, 1.0])
    seconds = {"a": slow_machine, "b": 3 * slow_machine, "ours": 1.5 * slow_machine}
    timings = {t.name: t for t in compare(seconds, ("b", "a"), {"ours": 3e9})}
    assert (timings["ours"].ratio, timings["ours"].low, timings["ours"].high) == (1.5, 1.5, 1.5)
    assert timings["b"].ratio == 3
    assert timings["ours"].gflops == pytest.approx(2)  # 3 GFLOP in the median of 1.5 s
    assert timings["a"].gflops is None


def test_the_interval_is_as_wide_as_the_rounds_differ() -> None:
    noise = np.random.default_rng(0).lognormal(0, 0.3, size=200)
    (_, ours) = compare({"floor": np.ones(200), "ours": noise}, ("floor",), {})
    assert ours.low < ours.ratio < ours.high
    assert 0.05 < ours.high - ours.low < 0.2


def test_every_contestant_runs_once_a_round_in_changing_order() -> None:
    calls: list[str] = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=20, warmup=1)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 21 and all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 3
    assert all(len(taken) == 20 and (taken > 0).all() for taken in seconds.values())


def test_a_slow_comparison_says_how_long_it_takes_and_does_fewer_rounds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, calls = [0.0], []

    def takes(seconds: float) -> None:
        calls.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(vimoe.bench.timing.time, "perf_counter", lambda: now[0])
    slow = {"a": lambda: takes(20.0), "b": lambda: takes(10.0)}
    for asked, timed in ((30, 8), (9, 8), (3, 3), (2, 2)):
        caplog.clear(), calls.clear()
        seconds = interleaved(slow, asked)
        assert seconds["a"].tolist() == [20.0] * timed and len(calls) <= 2 * (timed + 2)
        assert ("30 s a round, so 8 of 30 rounds are timed, in about 4 min" in caplog.text) == (asked == 30)
        assert bool(caplog.records) == (asked > 8)
    glacial = interleaved({"a": lambda: takes(1000.0)}, 30)
    assert len(glacial["a"]) == 2 and "2 of 30 rounds are timed, in about 33 minutes" in caplog.text
