"""On made-up routings whose answers are known, the numbers are right, and the intervals cover."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score

from vimoe.analysis import statistics
from vimoe.analysis.statistics import dependence, effective_number, favourites, mean_intervals, routes

IMAGES, CLASSES, EXPERTS, TOKENS = 600, 10, 8, 50


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def labels(seed: int = 0) -> np.ndarray:
    return rng(seed).integers(0, CLASSES, IMAGES)


def chosen(experts: np.ndarray) -> np.ndarray:
    """(I,) one expert of each image, as counts (I, N)."""
    return (experts[:, None] == np.arange(EXPERTS)).astype(int)


def spread(shares: np.ndarray, seed: int = 0) -> np.ndarray:
    """(I, N) tokens of each image drawn from its own shares."""
    return rng(seed).multinomial(TOKENS, shares)


def test_independent_routing_has_no_dependence() -> None:
    found = dependence(labels(), chosen(rng(1).integers(0, EXPERTS, IMAGES)))
    assert abs(found.value) < 0.01 and found.low < 0 < found.high and found.p > 0.05


def test_perfect_specialisation_is_one() -> None:
    y = np.arange(IMAGES) % EXPERTS
    found = dependence(y, chosen(y))
    assert found.value == pytest.approx(1) and found.p == pytest.approx(1 / (1 + statistics.RESAMPLES))
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
    assert effective_number(counts) == statistics.Interval(1, 1, 1)


def test_layers_that_copy_one_another_agree_and_take_few_routes() -> None:
    first, other = rng(3).integers(0, EXPERTS, (2, IMAGES))
    copied = (first + 3) % EXPERTS  # the same decisions under other names
    found = statistics.agreement([first, copied, other])
    matrix = found["value"]
    assert matrix[0, 1] == matrix[1, 0] == pytest.approx(1) and abs(matrix[0, 2]) < 0.02
    assert np.array_equal(np.diag(matrix), np.ones(3))
    assert found["low"][0, 2] < 0 < found["high"][2, 0] and found["low"][0, 1] > 0.9
    one, two, three = (layer[:, None, None] for layer in (first, copied, other))
    assert routes([one, two]) == (EXPERTS, pytest.approx(EXPERTS, rel=0.01))
    used, effective = routes([one, three])
    assert EXPERTS < used <= EXPERTS**2 and 50 < effective <= used


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
    assert statistics.possible_routes(choices) == len(taken)
    assert statistics.possible_routes(choices[1:2]) == 3 + middle


def test_many_deep_routes_are_not_mixed_up() -> None:
    """64 experts in 24 layers have more combinations than an integer has values."""
    layers = [np.arange(100)[:, None, None] % 64 for _ in range(24)]
    assert routes(layers) == (64, pytest.approx(np.exp(-36 * 0.02 * np.log(0.02) - 28 * 0.01 * np.log(0.01))))


def test_activated_pairs_are_distinct() -> None:
    counts = [np.array([[3, 0, 1], [0, 4, 0]]), np.array([[0, 4], [4, 0]])]
    mean, least, most = statistics.activated_pairs(counts)
    assert (mean.value, least, most) == (2.5, 2, 3) and mean.low == 2 and mean.high == 3


def test_the_most_frequent_decision_is_a_set_with_its_mean_gates() -> None:
    experts = np.array([[[0, 2]], [[2, 0]], [[1, 2]]])
    gates = np.array([[[0.6, 0.4]], [[0.8, 0.2]], [[0.9, 0.1]]])
    most, mean = statistics.most_frequent(experts, gates)
    assert most.tolist() == [0, 2] and mean == pytest.approx([0.4, 0.6])


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
    counts = statistics.count_experts(image, experts, 4, 3)
    assert counts.tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]]
    mass = statistics.count_experts(image, experts, 4, 3, gates)
    assert mass.tolist() == [[0.5, 0, 0], [0, 0, 0], [0.2, 0, 0.7], [0, 0, 0]]
    assert statistics.favourites(counts, mass).tolist() == [0, 3, 2, 3]  # 3 is none
    used, effective = statistics.routes([experts])
    assert used == 3 and effective == pytest.approx(2**1.5)
    frequent, mean = statistics.most_frequent(experts, gates)
    assert frequent.tolist() == [-1, -1] and mean.tolist() == [0, 0]
    tables = statistics.tables_of_units(np.array([[1], [0], [-1], [1]]), experts, 2, 3)
    assert tables.tolist() == [[[0] * 3, [1, 0, 0]], [[0] * 3] * 2, [[0] * 3] * 2, [[0] * 3] * 2]


def test_no_choice_at_all_says_nothing() -> None:
    found = statistics.dependence(np.array([0, 0, 1, 1]), np.zeros((4, 3), dtype=int))
    assert (found.value, found.nats, found.p) == (0, 0, 1)
    assert statistics.activated_pairs([np.zeros((4, 3))])[1:] == (0, 0)


def test_favourites_are_by_number_and_then_by_gates() -> None:
    counts = np.array([[2, 2, 1], [0, 3, 2], [1, 0, 1]])
    gates = np.array([[0.5, 0.9, 8.0], [0.0, 0.3, 1.9], [0.2, 0.0, 0.3]])
    assert favourites(counts, gates).tolist() == [1, 1, 2]


def test_so_few_images_that_a_sample_may_hold_no_pair() -> None:
    found = statistics.pair_interval(np.array([[1.0], [2.0], [3.0]]), np.array([[1], [2], [0]]))
    assert found.value == 2 and 1 <= found.low <= found.high <= 3
    alone = statistics.pair_interval(np.array([[4.0]]), np.array([[0]]))
    assert (alone.value, alone.low, alone.high) == (4, 4, 4)


@pytest.mark.parametrize("kind", ["who takes", "who gives", "both"])
def test_intervals_of_permutations_cover_whoever_makes_the_difference(kind: str) -> None:
    """Resampling only those who take would miss that other images would give other decisions."""
    covered, narrow, n = [], [], 80
    for seed in range(200):
        draw = rng(1000 + seed)
        partners = np.stack([draw.permutation(n) for _ in range(5)], axis=1)
        takes, gives = draw.exponential(size=(2, n)) - 1
        if kind == "who takes":
            gives = 0 * gives
        elif kind == "who gives":
            takes = 0 * takes
        values = takes[:, None] + gives[partners] + 0.5
        found = statistics.pair_interval(values, partners, seed)
        covered.append(found.low <= 0.5 <= found.high)
        one_sided = mean_intervals(values.mean(axis=1, keepdims=True), seed)[0]
        narrow.append(one_sided.low <= 0.5 <= one_sided.high)
        assert found.value == pytest.approx(values.mean())
    assert 0.90 <= np.mean(covered) <= 1.0
    if kind == "who gives":
        assert np.mean(narrow) < 0.7  # the check can fail


def test_orders_look_at_shares_not_at_numbers_of_images() -> None:
    """A class with a hundred times the images does not decide for the others; idle experts stand last."""
    table = np.zeros((6, 5), int)
    table[[0, 1], 3] = 9
    table[[2, 3], 1] = 9
    table[[4, 5], 4] = 9
    table[1] *= 100
    table = np.insert(table, 2, 0, axis=0)  # a class without images stands last
    order, (columns,) = statistics.orders([table])
    blocks = [set(order[i : i + 2]) for i in (0, 2, 4)]
    assert all(block in ({0, 1}, {3, 4}, {5, 6}) for block in blocks) and order[-1] == 2
    assert sorted(columns[:3]) == [1, 3, 4] and sorted(columns[3:]) == [0, 2]
    drawn = table[order][:, columns] > 0
    assert drawn.argmax(axis=1).tolist() == [0, 0, 1, 1, 2, 2, 0]


def test_within_a_block_the_clearest_class_comes_first() -> None:
    table = np.array([[6, 4, 0, 0], [9, 1, 0, 0], [0, 0, 1, 9], [0, 0, 4, 6], [10, 0, 0, 0], [0, 0, 0, 10]])
    order, _ = statistics.orders([table])
    rank = {int(c): i for i, c in enumerate(order)}
    assert rank[1] == rank[4] + 1 and rank[2] == rank[5] + 1


def test_intervals_of_means_cover_at_the_stated_rate() -> None:
    """Skewed as changes of a loss are: nothing for most images, much for some."""
    draws = rng(7).exponential(size=(400, 150)) * (rng(8).random((400, 150)) < 0.5)
    intervals = [mean_intervals(row[:, None], seed)[0] for seed, row in enumerate(draws)]
    covered = np.mean([i.low <= 0.5 <= i.high for i in intervals])
    assert 0.91 <= covered <= 0.98  # 95% but for 400 trials and 150 images
    halved = [abs(i.value - 0.5) <= (i.high - i.low) / 4 for i in intervals]
    assert np.mean(halved) < 0.8  # the check sees an interval of half the width


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


def test_halves_are_stratified() -> None:
    y = labels()
    half = statistics.halves(y)
    for c in range(CLASSES):
        assert half[y == c].sum() == -(-(y == c).sum() // 2)
    assert not np.array_equal(half, statistics.halves(y, seed=1))
    of_video = np.array([0, 0, 0, 1, 2, 2, 3, 3, 4])
    of_frames = statistics.halves(y[: len(of_video)], sequences=of_video)
    assert [len(set(of_frames[of_video == video])) for video in range(5)] == [1] * 5
    assert len(set(of_video[of_frames])) == 3  # the larger half


def test_orders_bring_out_blocks_on_images_that_they_were_not_found_on() -> None:
    y = labels()
    experts = np.where(rng(9).random(IMAGES) < 0.8, (7 * y + 2) % EXPERTS, rng(10).integers(0, EXPERTS, IMAGES))
    half = statistics.halves(y)

    def table(mask: np.ndarray, e: np.ndarray) -> np.ndarray:
        return np.stack([chosen(e[mask & (y == c)]).sum(axis=0) for c in range(CLASSES)])

    order, (columns,) = statistics.orders([table(half, experts)])
    drawn = table(~half, experts)[order][:, columns]
    assert sorted(order) == list(range(CLASSES)) and sorted(columns) == list(range(EXPERTS))
    favourite = drawn.argmax(axis=1)
    assert (np.diff(favourite) >= 0).mean() > 0.8  # runs along the diagonal
    # where there is no structure, the half that was not sorted shows none
    nothing = rng(11).integers(0, EXPERTS, IMAGES)
    order, (columns,) = statistics.orders([table(half, nothing)])
    sorted_half, other = (table(m, nothing)[order][:, columns] for m in (half, ~half))
    along = [np.corrcoef(t.argmax(axis=1), np.arange(CLASSES))[0, 1] for t in (sorted_half, other)]
    assert along[0] > along[1]


@pytest.mark.parametrize("tables", [[np.ones((1, 4), int)], [np.ones((3, 1), int)], [np.zeros((3, 4), int)]])
def test_orders_of_next_to_nothing_exist(tables: list[np.ndarray]) -> None:
    order, columns = statistics.orders(tables)
    assert sorted(order) == list(range(len(tables[0]))) and sorted(columns[0]) == list(range(tables[0].shape[1]))


def test_memory_for_resamples_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are drawn at a time, they are the same."""
    values = rng(1).normal(size=(1000, 2))
    whole = mean_intervals(values)
    monkeypatch.setattr(statistics, "_CHUNK", 10_000)
    for one, other in zip(whole, mean_intervals(values), strict=True):
        assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high))


@pytest.mark.parametrize(("of_pairs", "low", "high"), [(0.0, 4, 12), (0.5, 5, 13), (8.0, 16, 20)])
def test_draws_are_enough_once_more_would_not_narrow_the_interval(of_pairs: float, low: int, high: int) -> None:
    """In 20 data sets, with values of images and of which two of them meet: how many, and what that gives away."""
    found, wider = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        partners = np.stack([rng.permutation(200) for _ in range(20)], axis=1)
        values = rng.normal(size=(200, 1)) + of_pairs * rng.normal(size=(200, 20))
        found.append(statistics.enough_draws(values[:, :4], partners[:, :4], 20, seed))
        assert found[-1] == statistics.enough_draws(values[:, :4] + 7.0, partners[:, :4], 20, seed)
        some, every = (statistics.pair_interval(values[:, :d], partners[:, :d], seed) for d in (found[-1], 20))
        wider.append((some.high - some.low) / (every.high - every.low))
    assert low <= np.mean(found) <= high
    assert np.mean(wider) < statistics.WIDER + 0.03


def test_draws_that_all_say_the_same_are_enough() -> None:
    partners = np.stack([np.random.default_rng(d).permutation(30) for d in range(4)], axis=1)
    assert statistics.enough_draws(np.zeros((30, 4)), partners, 20) == 4
    assert statistics.enough_draws(np.random.default_rng(0).normal(size=(30, 4)), partners, 5) in (4, 5)


def test_the_best_for_a_class_is_chosen_by_the_other_half() -> None:
    values = np.array([[0, 9], [9, 0], [9, 0], [5, 4], [0, 9], [1, 2.0]])
    half = np.array([True, False, True, False, True, False])
    found = statistics.best_for_class(values, np.array([0, 0, 0, 0, 1, -1]), half)
    # of class 0 the first half has the means 4.5 and 4.5, the other 7 and 2; class 1 has nobody to choose for it
    assert found.tolist() == [1, 0, 1, 0, -1, -1]
    assert statistics.best_for_class(values, np.zeros(6), half).tolist() == [1, 0, 1, 0, 1, 0]


def test_choosing_on_the_other_half_finds_nothing_in_noise() -> None:
    """Chosen and judged by the same images, the best of many columns of noise looks good."""
    noise, classes = rng(1).normal(size=(IMAGES, EXPERTS)), np.arange(IMAGES) % CLASSES
    best = statistics.best_for_class(noise, classes, statistics.halves(classes))
    same = np.stack([noise[classes == c].mean(axis=0) for c in range(CLASSES)]).min(axis=1).mean()
    assert same < -0.1 and abs(noise[np.arange(IMAGES), best].mean()) < 0.09


def test_orders_keep_classes_with_the_same_routes_together() -> None:
    """Rounding parted them; and scikit-learn warned where it found fewer clusters than there were classes."""
    first, second = [4, 7, 3, 7, 3, 4, 0, 0], [2, 1, 2, 1, 7, 7, 6, 6]
    tables = [np.zeros((10, 8)) for _ in range(2)]
    for table, experts in zip(tables, (first, second), strict=True):
        table[np.arange(8), experts] = 1
    order, columns = statistics.orders(tables)  # pytest turns a warning into an error
    assert sorted(order) == list(range(10)) and [sorted(column) for column in columns] == [list(range(8))] * 2
    alike = [np.array([[18, 0], [15, 4], [18, 0], [18, 0], [14, 4], [18, 0]]), np.full((6, 2), 9)]
    order, _ = statistics.orders(alike)
    places = [list(order).index(each) for each in (0, 2, 3, 5)]
    assert max(places) - min(places) == 3
