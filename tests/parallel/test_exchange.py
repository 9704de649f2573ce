"""Two processes that share the experts of a layer compute what one process does, and every gradient of it."""

from __future__ import annotations

import pytest
import torch
from helpers import parallel_layers
from helpers.processes import run
from torch import Tensor


@pytest.fixture(scope="module")
def together() -> list[dict[str, dict[str, Tensor]]]:
    return run(parallel_layers.all_cases, 2, timeout=240)


@pytest.mark.parametrize("case", parallel_layers.CASES)
def test_two_processes_agree_with_one(case: str, together: list[dict[str, dict[str, Tensor]]]) -> None:
    expected = parallel_layers.alone(case)
    for rank, seen in enumerate(together):
        mine = [name for name in expected if not name.endswith(f" {1 - rank}")]
        assert sorted(seen[case]) == sorted(mine)
        for name in mine:
            torch.testing.assert_close(seen[case][name], expected[name], rtol=0, atol=1e-10, msg=f"{rank}: {name}")
    of_experts = [name for name in expected if name.startswith("layer.experts.")]
    assert of_experts and all(expected[name].any() for name in of_experts), "the comparison would be of zeros"


def test_the_cases_are_what_they_are_called() -> None:
    idle = parallel_layers.alone("an idle expert")["layer.experts.fc1.weight"]
    assert not idle[1].any() and idle[[0, 2, 3]].flatten(1).any(dim=1).all()
    half = parallel_layers.alone("a process that gets nothing")["layer.experts.fc1.weight"]
    assert half[:2].any() and not half[2:].any()
