"""On made-up routings whose answers are known, dependences are right, and their intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.made_up_routing import CLASSES, EXPERTS, IMAGES, TOKENS, chosen, labels, rng
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score

from vimoe.analysis.dependence import agreement, dependence
from vimoe.analysis.expert_usage import activated_pairs, effective_number, favourites, routes
from vimoe.analysis.intervals import RESAMPLES, Interval


def spread(shares: np.ndarray, seed: int = 0) -> np.ndarray:
    """(I, N) tokens of each image drawn from its own shares."""
    return rng(seed).multinomial(TOKENS, shares)


def test_independent_routing_has_no_dependence() -> None:
    found = dependence(labels(), chosen(rng(1).integers(0, EXPERTS, IMAGES)))
    assert abs(found.value) < 0.01 and found.low < 0 < found.high and found.p > 0.05


def test_perfect_specialisation_is_one() -> None:
    y = np.arange(IMAGES) % EXPERTS
    found = dependence(y, chosen(y))
    assert found.value == pytest.approx(1) and found.p == pytest.approx(1 / (1 + RESAMPLES))
    assert effective_number(chosen(y)).value == pytest.approx(EXPERTS)


def test_experts_that_follow_the_image_but_not_its_class_do_not_look_specialised() -> None:
    """All tokens of an image prefer one expert, drawn without regard of the class."""
    shares = np.full((IMAGES, EXPERTS), 0.02)
    shares[np.arange(IMAGES), rng(2).integers(0, EXPERTS, IMAGES)] = 1 - 0.02 * (EXPERTS - 1)
    counts = spread(shares)
    found = dependence(labels(), counts)
    assert found.p > 0.05 and found.low < 0 < found.high
    # permuting tokens instead of images is the mistake that this guards against: there nothing comes near the table
    tokens, by_token = np.repeat(np.arange(EXPERTS)[None], IMAGES, 0), np.repeat(labels(), TOKENS)
    each = np.concatenate([np.repeat(row, count) for row, count in zip(tokens, counts, strict=True)])
    null = [mutual_info_score(rng(s).permutation(by_token), each) for s in range(20)]
    assert found.nats == pytest.approx(mutual_info_score(by_token, each)) and found.nats > 2 * max(null)


def test_tokens_that_follow_the_class_look_specialised_though_no_favourite_shows_it() -> None:
    """Most tokens of every image go to expert 0; where the others go depends on the class."""
    y = labels()
    shares = np.full((IMAGES, EXPERTS), 0.01)
    shares[np.arange(IMAGES), 1 + y % (EXPERTS - 1)] = 0.2
    shares[:, 0] += 1 - shares.sum(axis=1)
    counts = spread(shares)
    assert (favourites(counts, np.zeros_like(counts, dtype=float)) == 0).all()
    found = dependence(y, counts)
    assert found.low > 0.1 and found.p < 0.01


def test_a_collapsed_layer_has_one_expert_and_no_dependence() -> None:
    counts = chosen(np.full(IMAGES, 3))
    found = dependence(labels(), counts)
    assert (found.value, found.low, found.high, found.nats) == pytest.approx((0, 0, 0, 0), abs=1e-12) and found.p == 1
    assert effective_number(counts) == Interval(1, 1, 1)


def test_layers_that_copy_one_another_agree_and_take_few_routes() -> None:
    first, other = rng(3).integers(0, EXPERTS, (2, IMAGES))
    copied = (first + 3) % EXPERTS  # the same decisions under other names
    found = agreement([first, copied, other])
    matrix = found["value"]
    assert matrix[0, 1] == matrix[1, 0] == pytest.approx(1) and abs(matrix[0, 2]) < 0.02
    assert np.array_equal(np.diag(matrix), np.ones(3))
    assert found["low"][0, 2] < 0 < found["high"][2, 0] and found["low"][0, 1] > 0.9
    one, two, three = (layer[:, None, None] for layer in (first, copied, other))
    assert routes([one, two]) == (EXPERTS, pytest.approx(EXPERTS, rel=0.01))
    used, effective = routes([one, three])
    assert EXPERTS < used <= EXPERTS**2 and 50 < effective <= used


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_adjusted_mutual_information_agrees_with_scikit_learn(strength: float) -> None:
    y = labels()
    experts = np.where(rng(5).random(IMAGES) < strength, y % EXPERTS, rng(6).integers(0, EXPERTS, IMAGES))
    found = dependence(y, chosen(experts))
    assert found.value == pytest.approx(adjusted_mutual_info_score(y, experts))
    assert found.nats == pytest.approx(mutual_info_score(y, experts))
    # the way of several choices, by permutations, comes to the same: each image chooses its expert twice
    assert dependence(y, 2 * chosen(experts)).value == pytest.approx(found.value, abs=3e-3)


def test_one_image_of_each_class_leaves_no_room_above_chance() -> None:
    found = dependence(np.arange(8), np.eye(8, dtype=np.int64))
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert found.nats == pytest.approx(np.log(8))


def test_classes_without_images_play_no_part() -> None:
    y = labels()
    assert dependence(10 * y + 3, chosen(y % EXPERTS)) == dependence(y, chosen(y % EXPERTS))


def test_no_choice_at_all_says_nothing() -> None:
    found = dependence(np.array([0, 0, 1, 1]), np.zeros((4, 3), dtype=int))
    assert (found.value, found.nats, found.p) == (0, 0, 1)
    assert activated_pairs([np.zeros((4, 3))])[1:] == (0, 0)


@pytest.mark.parametrize("strength", [0.15, 0.4, 0.8])
def test_intervals_of_dependence_cover_at_the_stated_rate(strength: float) -> None:
    """Of what the AMI of as many images is on average."""
    values = []
    for seed in range(150):
        draw = rng(100 + seed)
        y = draw.integers(0, CLASSES, 400)
        experts = np.where(draw.random(400) < strength, y % EXPERTS, draw.integers(0, EXPERTS, 400))
        values.append(dependence(y, chosen(experts), seed, permutations=0))
    truth = np.mean([v.value for v in values])
    covered = np.mean([v.low <= truth <= v.high for v in values])
    assert 0.90 <= covered <= 0.995
    assert np.mean([abs(v.value - truth) <= (v.high - v.low) / 6 for v in values]) < 0.8


def test_p_values_are_uniform_where_there_is_nothing() -> None:
    found = [dependence(labels(s), chosen(rng(50 + s).integers(0, EXPERTS, IMAGES)), s, 99).p for s in range(100)]
    assert 0.3 < np.mean(found) < 0.7 and np.mean(np.array(found) <= 0.05) <= 0.12
