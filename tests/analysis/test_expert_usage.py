"""On decisions written by hand, counts, routes and effective numbers are right."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers.made_up_routing import rng

from vimoe.analysis.expert_usage import (
    activated_pairs,
    count_experts,
    effective_number,
    favourites,
    most_frequent,
    possible_routes,
    routes,
    tables_of_units,
)


def test_routes_are_combinations_of_sets() -> None:
    """Two experts in another order are one choice; an image's decision counts for each of its tokens."""
    by_image = np.array([[[0, 1]], [[1, 0]], [[2, 1]]])
    by_token = np.array([[[5], [5]], [[5], [5]], [[5], [6]]])
    assert routes([by_image]) == (2, pytest.approx(3 / 2 ** (2 / 3)))
    assert routes([by_image, by_token])[0] == 3


def test_where_tokens_become_fewer_a_route_is_of_the_image() -> None:
    """And is made of the first choices of most of its tokens."""
    many = np.array([[[0], [0], [0], [1]], [[1], [0], [0], [0]], [[2], [2], [2], [2]]])
    few = np.array([[[5], [5]], [[5], [5]], [[5], [6]]])
    assert routes([many, few])[0] == 2
    assert routes([many, few[:, :1]])[0] == 3


@pytest.mark.parametrize("ragged", [(False, False, False), (True, True, True), (True, False, True)], ids=str)
def test_possible_routes_are_enumerated(ragged: tuple[bool, ...]) -> None:
    """The middle layer has one pool of 3 experts; the others have pools of 1 and of 2, of which a token keeps one."""
    none = [[()] if empty else [] for empty in ragged]
    pools = [[(0,)], [(1,), (2,)]]
    taken = set()
    for pool in pools:
        taken |= set(product(none[0] + pool, none[1] + [(0,), (1,), (2,)], none[2] + pool))
    first, middle, last = ragged
    choices = [((1 + first, 2 + first), first), ((3 + middle,), middle), ((1 + last, 2 + last), last)]
    assert possible_routes(choices) == len(taken)
    assert possible_routes(choices[1:2]) == 3 + middle


def test_many_deep_routes_are_not_mixed_up() -> None:
    """64 experts in 24 layers have more combinations than an integer has values."""
    layers = [np.arange(100)[:, None, None] % 64 for _ in range(24)]
    assert routes(layers) == (64, pytest.approx(np.exp(-36 * 0.02 * np.log(0.02) - 28 * 0.01 * np.log(0.01))))


def test_activated_pairs_are_distinct() -> None:
    counts = [np.array([[3, 0, 1], [0, 4, 0]]), np.array([[0, 4], [4, 0]])]
    mean, least, most = activated_pairs(counts)
    assert (mean.value, least, most) == (2.5, 2, 3) and mean.low == 2 and mean.high == 3


def test_the_most_frequent_decision_is_a_set_with_its_mean_gates() -> None:
    experts = np.array([[[0, 2]], [[2, 0]], [[1, 2]]])
    gates = np.array([[[0.6, 0.4]], [[0.8, 0.2]], [[0.9, 0.1]]])
    most, mean = most_frequent(experts, gates)
    assert most.tolist() == [0, 2] and mean == pytest.approx([0.4, 0.6])


def test_effective_numbers_have_intervals_around_them() -> None:
    """Resampled loads are less even than loads are: their percentiles would lie below the estimate."""
    few = (rng(3).integers(0, 64, 100)[:, None] == np.arange(64)).astype(int)
    found = effective_number(few)
    assert 1 <= found.low < found.value < found.high <= 64
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    truth = np.exp(-(shares * np.log(shares)).sum())
    drawn = [effective_number(rng(s).multinomial(1, shares, 400), s) for s in range(200)]
    assert 0.9 <= np.mean([i.low <= truth <= i.high for i in drawn]) <= 0.99


def test_an_empty_slot_is_no_expert() -> None:
    """Of 3 experts; images choose {0}, {}, {0, 2} and {}."""
    experts = np.array([[[0, -1]], [[-1, -1]], [[2, 0]], [[-1, -1]]])
    gates = np.array([[[0.5, 0.0]], [[0.0, 0.0]], [[0.7, 0.2]], [[0.0, 0.0]]])
    image = np.arange(4)[:, None]
    counts = count_experts(image, experts, 4, 3)
    assert counts.tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]]
    mass = count_experts(image, experts, 4, 3, gates)
    assert mass.tolist() == [[0.5, 0, 0], [0, 0, 0], [0.2, 0, 0.7], [0, 0, 0]]
    assert favourites(counts, mass).tolist() == [0, 3, 2, 3]  # 3 is none
    used, effective = routes([experts])
    assert used == 3 and effective == pytest.approx(2**1.5)
    frequent, mean = most_frequent(experts, gates)
    assert frequent.tolist() == [-1, -1] and mean.tolist() == [0, 0]
    tables = tables_of_units(np.array([[1], [0], [-1], [1]]), experts, 2, 3)
    assert tables.tolist() == [[[0] * 3, [1, 0, 0]], [[0] * 3] * 2, [[0] * 3] * 2, [[0] * 3] * 2]


def test_favourites_are_by_number_and_then_by_gates() -> None:
    counts = np.array([[2, 2, 1], [0, 3, 2], [1, 0, 1]])
    gates = np.array([[0.5, 0.9, 8.0], [0.0, 0.3, 1.9], [0.2, 0.0, 0.3]])
    assert favourites(counts, gates).tolist() == [1, 1, 2]
