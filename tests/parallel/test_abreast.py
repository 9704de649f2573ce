"""Forwards of processes that have different numbers of them; trainings in two are in tests/training."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from vimoe.errors import DataError
from vimoe.parallel.abreast import PLAIN, abreast


@dataclass
class Other:
    """This process, and another one that has so many forwards."""

    left: int
    rank: int = 1
    count: int = 2
    flags: list[bool] = field(default_factory=list)

    def any(self, flag: bool) -> bool:
        self.flags.append(flag)
        self.left -= 1
        return flag or self.left >= 0


def model(parallel: bool) -> nn.Linear:
    made = nn.Linear(2, 2)
    if parallel:
        setattr(made, PLAIN, ())
    return made


def test_a_process_repeats_its_last_forward_until_all_are_done() -> None:
    process, seen, made = Other(left=3), [], model(parallel=True)
    with abreast(made, process) as wait:
        made.register_forward_hook(lambda _m, args, _y: seen.append(float(args[0].sum())))
        made(torch.ones(1, 2))
        wait()
    assert seen == [2.0, 2.0, 2.0] and process.flags == [True, False, False, False]
    made(torch.ones(1, 2))
    assert len(process.flags) == 4, "the hook was left behind"


def test_another_model_waits_for_nobody() -> None:
    process, made = Other(left=3), model(parallel=False)
    with abreast(made, process) as wait:
        made(torch.ones(1, 2))
        wait()
    assert not process.flags


def test_a_process_without_images_is_told() -> None:
    with abreast(model(parallel=True), Other(left=1)) as wait, pytest.raises(DataError, match="process 1 of 2 has no"):
        wait()
