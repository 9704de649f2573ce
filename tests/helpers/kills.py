"""Trainings killed after so many steps, and their logs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.trainings import rows

import vimoe.training.loop


class Killed(Exception):
    """A kill that the test survives."""


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Makes the next training die after so many steps, before or after the checkpoint that follows."""
    real = vimoe.training.loop._Steps.epoch

    def arm(steps: int) -> None:
        left = steps

        def epoch(self: object, state: object) -> Iterator[None]:
            nonlocal left
            for _ in real(self, state):
                if left == 0:
                    raise Killed
                left -= 1
                yield

        monkeypatch.setattr(vimoe.training.loop._Steps, "epoch", epoch)

    yield arm
    monkeypatch.setattr(vimoe.training.loop._Steps, "epoch", real)


def logs(out: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(out / "metrics.csv")]
