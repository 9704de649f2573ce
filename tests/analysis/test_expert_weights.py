"""Comparisons of single matrices, on experts whose answers are known."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, linregress
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vimoe.analysis import expert_weights
from vimoe.analysis.expert_weights import WeightComparison, compare_pairs, compare_weights, matrices
from vimoe.moe import ffn_weights
from vimoe.moe.ffn_weights import Weights

DIM, HIDDEN, EXPERTS = 8, 12, 5
KINDS = {False: ("fc1", "fc2"), True: ("gate", "value", "fc2")}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(seed: int, gated: bool = False, width: int = HIDDEN) -> Weights:
    shapes = {"fc1.weight": (width * (1 + gated), DIM), "fc1.bias": (width * (1 + gated),), "fc2.weight": (DIM, width)}
    return {name: torch.randn(shape, generator=generator(seed)) for name, shape in shapes.items()}


def router(n: int, seed: int = 0) -> Tensor:
    rows = torch.randn(n, DIM, generator=generator(seed))
    return rows @ rows.T


def compared(
    experts: list[Weights], gated: bool = False, rows: Tensor | None = None, parent: Weights | None = None
) -> WeightComparison:
    rows = router(len(experts)) if rows is None else rows
    return compare_weights(experts, gated, compare_pairs(experts, gated), rows, parent)


@pytest.mark.parametrize("gated", KINDS)
def test_permuted_hidden_units_are_found_with_the_tau_of_their_order(gated: bool) -> None:
    one, order = weights(0, gated), torch.randperm(HIDDEN, generator=generator(1))
    found = compared([one, ffn_weights.take(one, order, gated)], gated)
    assert tuple(found.matrices) == KINDS[gated]
    tau = kendalltau(np.argsort(order.numpy()), np.arange(HIDDEN)).statistic
    assert abs(tau) < 0.9 and found.tau.value == pytest.approx(tau)
    for part in found.matrices.values():
        assert part.reordered == pytest.approx(1, abs=1e-5) and part.cosine.value < 0.6
        assert part.neuron_mean == pytest.approx(1, abs=1e-5)  # a mean knows no order


@pytest.mark.parametrize("gated", KINDS)
def test_copies_of_the_parent(gated: bool) -> None:
    found = compared([weights(0, gated) for _ in range(6)], gated, parent=weights(0, gated))
    assert found.rho == found.rho_parent == 1 and found.tau.value == pytest.approx(1)
    for part in found.matrices.values():
        assert (part.cosine.value, part.neuron_mean, part.reordered, part.parent) == pytest.approx((1, 1, 1, 1))
        assert part.pca is part.explained is part.router is None  # all pairs are equal, and all points are one


def test_rho_counts_the_units_whose_value_rows_are_the_same() -> None:
    """Three units of twelve are turned by less than arccos(0.98), three by more, three shrunk, and one made silent."""
    one, other = weights(0), weights(0)
    value = other["fc2.weight"]
    across = torch.linalg.qr(torch.cat([value[:, :1], torch.randn(DIM, 1, generator=generator(2))], dim=1)).Q[:, 1]
    for unit in range(6):
        column = value[:, unit]
        away = across - (across @ column) / (column @ column) * column
        angle = 0.9 * math.acos(0.98) if unit < 3 else 1.1 * math.acos(0.98)
        value[:, unit] = math.cos(angle) * column + math.sin(angle) * column.norm() * away / away.norm()
    value[:, 6:9] *= 0.5
    value[:, 11] = 0
    found = compared([one, other], parent=one)
    assert found.rho == pytest.approx(8 / 11)  # a silent unit has no direction
    assert found.rho_parent == pytest.approx((1 + 8 / 11) / 2)


@pytest.mark.parametrize("gated", KINDS)
def test_figures_are_those_of_loops_in_float64(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_weights, "SPAN", 7)
    experts, parent, rows = [weights(e, gated) for e in range(EXPERTS)], weights(9, gated), router(EXPERTS)
    found = compared(experts, gated, rows, parent)
    pairs = list(combinations(range(EXPERTS), 2))
    score = [rows[i, j] / (rows[i, i] * rows[j, j]).sqrt() for i, j in pairs]
    for name, part in found.matrices.items():
        own = [matrices(each, gated)[name].double() for each in [*experts, parent]]
        flat, means = [each.flatten() for each in own], [each.mean(dim=0) for each in own]
        alike = [torch.cosine_similarity(means[i], means[j], dim=0).item() for i, j in pairs]
        assert part.cosine.value == pytest.approx(
            np.mean([torch.cosine_similarity(flat[i], flat[j], dim=0) for i, j in pairs]), abs=1e-6
        )
        assert part.neuron_mean == pytest.approx(np.mean(alike), abs=1e-6)
        assert part.parent == pytest.approx(
            np.mean([torch.cosine_similarity(flat[e], flat[-1], dim=0) for e in range(EXPERTS)]), abs=1e-6
        )
        assert part.router.value == pytest.approx(linregress(alike, score).rvalue ** 2, abs=1e-5)
        pca = PCA(2).fit(StandardScaler().fit_transform(torch.stack(flat)))
        assert part.explained == pytest.approx(pca.explained_variance_ratio_.tolist(), abs=1e-5)
        points = pca.transform(StandardScaler().fit_transform(torch.stack(flat))) / math.sqrt(len(flat[0]))
        points *= np.sign(points[np.abs(points).argmax(axis=0), [0, 1]])
        np.testing.assert_allclose(part.pca, points, atol=1e-4)


def test_the_cosine_of_permuted_units_is_that_of_all_permutations() -> None:
    one, other = weights(0, width=5), weights(1, width=5)
    found = compared([one, other]).matrices["fc2"].cosine
    a, b = (matrices(each, False)["fc2"] for each in (one, other))
    values = [torch.cosine_similarity(a.flatten(), b[list(p)].flatten(), dim=0).item() for p in permutations(range(5))]
    half = 1.959964 * np.std(values)
    assert (found.low, found.high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=1e-6)


def test_the_range_of_tau_is_that_of_random_orders() -> None:
    found = compared([weights(0), weights(0)]).tau
    random = [
        kendalltau(torch.randperm(HIDDEN, generator=generator(seed)), np.arange(HIDDEN)).statistic
        for seed in range(2000)
    ]
    assert found.high == -found.low == pytest.approx(1.959964 * np.std(random), rel=0.05)


def test_rows_of_the_router_that_follow_one_matrix() -> None:
    """The regression is with the matrix that the rows copy, and stays below chance with the other."""
    experts = [weights(e) for e in range(8)]
    rows = torch.stack([each["fc1.weight"].mean(dim=0) for each in experts])
    found = compared(experts, rows=rows @ rows.T).matrices
    assert found["fc1"].router.value == pytest.approx(1) and found["fc1"].router.high < 0.6
    assert found["fc2"].router.value < found["fc2"].router.high < 0.6


def test_fewer_experts_are_matched_where_an_assignment_has_to_be_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[bool] = []
    order = ffn_weights.order

    def noted(*args: object) -> tuple[Tensor, bool]:
        solved.append(not order(*args)[1])
        return order(*args)

    monkeypatch.setattr(ffn_weights, "order", noted)
    near = [{name: w + 0.01 * weights(e)[name] for name, w in weights(99).items()} for e in range(10)]
    assert compared(near).matched == 8 and len(solved) == 28 and not any(solved)
    solved.clear()
    assert compared([weights(e) for e in range(10)]).matched == 4 and len(solved) == 6 and any(solved)
    solved.clear()
    assert compared([*near[:5], *(weights(e) for e in range(5))]).matched == 6 and len(solved) == 15


def test_an_ffn_of_one_hidden_unit_has_no_order() -> None:
    assert compared([weights(0, width=1), weights(1, width=1)]).tau is None
