"""Plain parameters in one process; DTensors of several meshes are clipped in test_parallelize.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vimoe.parallel.gradients import begin, by_mesh, clip_grad_norm_


def parameters() -> list[nn.Parameter]:
    made = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    made[0].grad, made[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    return made


@pytest.mark.parametrize("most", [0.5, 5.0, 7.0, float("inf")])
def test_plain_gradients_are_clipped_as_torch_does(most: float) -> None:
    ours, theirs = parameters(), parameters()
    norm = clip_grad_norm_(ours, most)
    assert norm == torch.nn.utils.clip_grad_norm_(theirs, most) == 5
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:2], theirs[:2], strict=True)) and ours[2].grad is None


def test_no_gradient_has_the_norm_0() -> None:
    assert clip_grad_norm_(parameters()[2:], 1.0) == 0


def test_groups_of_one_mesh_stay() -> None:
    made = parameters()
    groups = [{"params": made[:2], "lr": 0.1}, {"params": made[2:], "lr": 0.2}]
    assert by_mesh(groups) == groups


def test_an_optimiser_that_has_begun_takes_the_steps_of_one_that_has_not() -> None:
    weights = []
    for early in (False, True):
        (p, *_) = made = parameters()
        optimizer = torch.optim.AdamW(made, lr=0.1, fused=True)
        if early:
            begin(optimizer)
            assert all(state["step"] == 0 for state in optimizer.state.values()) and len(optimizer.state) == 3
        for _ in range(3):
            optimizer.step()
        weights.append(p.detach().clone())
    assert torch.equal(*weights)
