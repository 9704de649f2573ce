"""Trainings killed after so many steps, and their logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.trainings import rows

import vimoe.training.loop

EPOCH = vimoe.training.loop._Steps.epoch


class Killed(Exception):
    """A kill that the test survives."""


def arm(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Makes the next training die after so many steps, before or after the checkpoint that follows."""
    left = steps

    def epoch(self: object, state: object) -> Iterator[None]:
        nonlocal left
        for _ in EPOCH(self, state):
            if left == 0:
                raise Killed
            left -= 1
            yield

    patch.setattr(vimoe.training.loop._Steps, "epoch", epoch)


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda steps: arm(monkeypatch, steps)


def logs(out: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(out / "metrics.csv")]
