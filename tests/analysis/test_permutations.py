"""Chance levels by permutation are those of all permutations, counted out."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from vimoe.analysis.permutations import COUNTED, Permuted, exchange_moments


def test_mean_and_variance_are_those_of_all_permutations() -> None:
    values = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    all_of_them = [values[torch.arange(5), list(order)].mean().item() for order in permutations(range(5))]
    assert exchange_moments(values) == pytest.approx((np.mean(all_of_them), np.var(all_of_them)), abs=1e-6)


def test_rows_and_columns_alone_make_no_difference() -> None:
    row, column = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    assert exchange_moments(row[:, None] + column)[1] == pytest.approx(0, abs=1e-12)


def test_a_normal_range_has_1_96_standard_deviations_on_each_side() -> None:
    found = Permuted.normal(7.0, 1.0, 4.0)
    assert (found.value, found.low, found.high) == pytest.approx((7, 1 - 2 * 1.959964, 1 + 2 * 1.959964))


@pytest.mark.parametrize("n", [4, COUNTED + 2])
def test_relabelled_experts(n: int) -> None:
    """The share of experts that keep their label is 1 for the labels as they are, and on average 1/N for others."""
    shares: list[float] = []

    def share(labels: np.ndarray) -> float:
        assert sorted(labels) == list(range(n))
        shares.append(float((labels == np.arange(n)).mean()))
        return shares[-1]

    found = Permuted.relabelled(n, share)
    assert found.value == 1
    draws = shares[:-1]
    assert len(draws) == (24 if n == 4 else 499)
    assert np.mean(draws) == pytest.approx(1 / n, abs=0.02)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert found == Permuted.relabelled(n, share)  # the same in every run
