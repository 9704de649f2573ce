"""Times of functions that run in turn, as ratios within a round.

All contestants of a comparison run in one process, round by round, and are compared within a round: a machine that is
slow for a while is slow for all of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from vimoe.terminal import track

DRAWS = 2000  # of the bootstrap
LONG = 300.0  # seconds that the rounds of a comparison may take
logger = logging.getLogger(__name__)
Contestants = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Time of one contestant.

    Attributes:
        name: name of the contestant.
        seconds: median over the rounds.
        ratio: median over rounds of its time over the floor's in the same round.
        low: lower end of the 95% interval of the ratio, by bootstrap over rounds.
        high: upper end of that interval.
        rounds: number of rounds.
        gflops: activated multiply-adds a second, times two, in units of 1e9; None where they are not known.
    """

    name: str
    seconds: float
    ratio: float
    low: float
    high: float
    rounds: int
    gflops: float | None = None

    def __str__(self) -> str:
        speed = "" if self.gflops is None else f"{self.gflops:9.0f} GFLOP/s"
        return (
            f"{self.name:<36}{1e3 * self.seconds:10.2f} ms {self.ratio:7.3f} [{self.low:.3f}, {self.high:.3f}]{speed}"
        )


def interleaved(contestants: Contestants, rounds: int, warmup: int = 2, what: str = "") -> dict[str, np.ndarray]:
    """Return the seconds of each contestant in each round, (rounds,), in an order that changes from round to round.

    Args:
        contestants: functions by name.
        rounds: number of rounds, in each of which every contestant runs once; lowered, to at least 2, where all would
            take more than `LONG`.
        warmup: number of rounds before them, at least 1, which are not timed.
        what: name on the progress bar; "" for no bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = np.random.default_rng(0)

    def turn() -> float:
        for name in order.permutation(list(contestants)):
            start = time.perf_counter()
            contestants[name]()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - start)
        return sum(taken[-1] for taken in seconds.values())

    first = turn()
    if first * (warmup + rounds) > LONG:
        asked, rounds, warmup = rounds, max(2, min(rounds, int(LONG / first) - warmup)), 1
        logger.warning(
            "%s: all take %.0f s a round, so %d of %d rounds are timed, in about %.0f minutes; make it smaller",
            what or "benchmark", first, rounds, asked, first * rounds / 60,
        )  # fmt: skip
    turns = range(1, warmup + rounds)
    for _ in track(turns, what):
        turn()
    return {name: np.array(taken[warmup:]) for name, taken in seconds.items()}


def compare(seconds: Mapping[str, np.ndarray], floor: tuple[str, ...], flops: Mapping[str, float]) -> list[Timing]:
    """Return the timing of each contestant against the one of `floor` with the least median, in pairs of a round.

    Args:
        seconds: seconds of each contestant in each round, (rounds,) by name.
        floor: names of the contestants to compare with.
        flops: floating-point operations of one run, by name, where they are known.
    """
    fastest = min(floor, key=lambda name: float(np.median(seconds[name])))
    rounds = len(seconds[fastest])
    draws = np.random.default_rng(0).integers(rounds, size=(DRAWS, rounds))
    timings = []
    for name, taken in seconds.items():
        ratios = taken / seconds[fastest]
        low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
        middle = float(np.median(taken))
        speed = flops[name] / middle / 1e9 if name in flops else None
        timings.append(Timing(name, middle, float(np.median(ratios)), float(low), float(high), rounds, speed))
    return timings
