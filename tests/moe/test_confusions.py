"""Confusions come from images that were not fitted, groups hold what is confused, rows are a logistic regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vimoe.moe.confusions import PENALTY, confusions, groups_of, linear_classifier


def paired(images: int = 20, pairs: int = 3, apart: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of classes 0 to 2 `pairs` - 1, of which c and c + `pairs` are near each other, and the classes."""
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(2 * pairs).repeat_interleave(images)
    x = 8 * torch.eye(pairs, 12)[label % pairs] + apart * torch.eye(2, 12).flip(1)[label // pairs]
    return x + torch.randn(len(x), 12, generator=g), label


def planted(sizes: list[int], seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Confusions that are ten times as frequent in groups as between them, in a random order of the classes."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rate = np.where(group[:, None] == group, 10.0, 1.0)
    return torch.from_numpy(rng.poisson(rate).astype(float)), group


def test_what_is_near_is_confused() -> None:
    found = confusions(*paired())
    assert found.sum(dim=1).tolist() == pytest.approx([20] * 6)
    wrong = found.clone().fill_diagonal_(0)
    assert found.diagonal().sum() > 60 and wrong.sum() > 5  # some are confused
    partner = torch.stack([wrong[c, (c + 3) % 6] for c in range(6)])
    assert partner.sum() > 0.99 * wrong.sum()


def test_no_image_is_judged_by_what_was_fitted_to_it() -> None:
    """Of noise in many dimensions a classifier knows by heart what it has seen, and nothing else."""
    x = torch.randn(60, 100, generator=torch.Generator().manual_seed(0))
    assert confusions(x, torch.arange(60) % 3).diagonal().sum() < 0.6 * 60


@pytest.mark.parametrize("labels", [[0, 0, 0, 1], [0, 1, 2], [0, 1]])
def test_classes_of_an_image_or_two_end_in_no_error(labels: list[int]) -> None:
    found = confusions(torch.randn(len(labels), 4), torch.tensor(labels))
    assert found.isfinite().all() and found.shape == (max(labels) + 1,) * 2


@pytest.mark.parametrize("sizes", [[4, 4, 4], [5, 5, 5, 5], [6, 6]])
def test_groups_that_are_there_are_found(sizes: list[int]) -> None:
    graph, group = planted(sizes)
    found = groups_of(graph, len(sizes)).numpy()
    assert all(len(np.unique(found[group == g])) == 1 for g in range(len(sizes)))
    assert sorted(np.bincount(found)) == sorted(sizes)


def test_groups_hold_more_confusions_than_random_ones_and_are_even_where_the_graph_is_not() -> None:
    graph, _ = planted([11, 3, 3, 3])
    found = groups_of(graph, 4).numpy()
    assert np.bincount(found).tolist() == [5] * 4

    def inside(group: np.ndarray) -> float:
        off = graph.numpy() * (1 - np.eye(20))
        return float(off[group[:, None] == group].sum() / off.sum())

    rng = np.random.default_rng(0)
    assert inside(found) > 1.3 * max(inside(rng.permutation(found)) for _ in range(20))


def test_both_directions_of_a_confusion_count() -> None:
    one_way = torch.zeros(4, 4)
    one_way[0, 2] = one_way[3, 1] = 5.0
    found = groups_of(one_way.double(), 2)
    assert found[0] == found[2] != found[1] == found[3]


@pytest.mark.parametrize("graph", [torch.zeros(7, 7), torch.eye(7)], ids=["nothing", "no confusion"])
def test_without_confusions_groups_are_even_all_the_same(graph: Tensor) -> None:
    before = graph.clone()
    assert sorted(torch.bincount(groups_of(graph.double(), 3)).tolist()) == [2, 2, 3]
    assert torch.equal(graph, before)


@pytest.mark.parametrize("groups", [2, 3])
def test_rows_are_a_logistic_regression_without_bias(groups: int) -> None:
    """Where the penalised loss is least, its gradient is 0; features count in units of their size."""
    x, label = paired()
    group = label % groups
    rows = linear_classifier(x, group).double()
    assert rows.shape == (groups, 12)
    size = (x**2).mean().sqrt().double()
    z, w = x.double() / size, (rows * size).clone().requires_grad_()
    loss = -(z @ w.T).log_softmax(dim=1)[torch.arange(len(z)), group].sum()
    # one vector of weights decides between two groups: its square is twice the sum of ours
    loss = loss + PENALTY / 2 * w.square().sum() * (2 if groups == 2 else 1)
    loss.backward()
    assert w.grad.abs().max() < 1e-2 * len(z) ** 0.5
    torch.testing.assert_close(linear_classifier(7 * x, group) * 7, rows.float(), rtol=1e-2, atol=1e-3)


def test_its_probabilities_are_no_surer_than_they_are_right() -> None:
    (x, label), (held, truth) = paired(images=40, apart=2.0), paired(images=40, apart=2.0, seed=1)
    probabilities = (held @ linear_classifier(x, label).T).softmax(dim=1)
    right = (probabilities.argmax(dim=1) == truth).float().mean()
    assert right > 0.6 and 0.5 < probabilities.amax(dim=1).mean() < right + 0.1
