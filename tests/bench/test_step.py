"""Memory that a step keeps, and loads that are forced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vimoe.bench.step import activations, forced_experts


def test_activations_count_each_storage_once_and_no_weights() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    linear = nn.Linear(8, 8)
    # exp keeps its result; the second linear keeps that same tensor as its input
    assert activations(lambda: linear(x.exp()), [x, *linear.parameters()]) == 4 * 8 * 4
    assert activations(lambda: linear(x), [x, *linear.parameters()]) == 0
    assert activations(lambda: linear(x), list(linear.parameters())) == 4 * 8 * 4


@pytest.mark.parametrize("k", [1, 2])
def test_loads_are_what_they_are_called(k: int) -> None:
    even = forced_experts("balanced", 4000, 8, k)
    assert (even.flatten().bincount() == 500 * k).all()
    skewed = forced_experts("zipf", 4000, 8, k)
    counts = skewed.flatten().bincount(minlength=8)
    assert (counts.diff() < 0).all() and counts[0] > (4 if k == 1 else 2) * counts[7]
    for experts in (even, skewed):
        assert all(len(set(row)) == k for row in experts.tolist())
