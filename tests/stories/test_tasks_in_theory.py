"""The theory that `train.router_freeze_margin` is after: experts keep tasks apart, if the router stops in time."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.task_pool import D, Pool, learn, minimum_norm

SEEDS = range(8)


@pytest.fixture(scope="module")
def curves() -> dict[tuple[int, bool], np.ndarray]:
    """Mean forgetting over the seeds, by number of experts and termination; and all routers that may stop do."""
    found = {}
    for experts, terminate in ((1, False), (5, False), (5, True), (10, False), (10, True)):
        runs = [learn(experts, terminate, seed) for seed in SEEDS]
        assert all((stopped is not None) == terminate for _, stopped in runs)
        found[experts, terminate] = np.mean([forgetting for forgetting, _ in runs], axis=0)
    return found


def end(curve: np.ndarray) -> float:
    return float(curve[-1])


def test_one_expert_forgets_and_several_forget_less(curves: dict) -> None:
    for experts in (5, 10):
        assert end(curves[experts, False]) < end(curves[1, False]) / 2


@pytest.mark.parametrize("experts", [5, 10])
def test_a_router_that_stops_forgets_less_than_one_that_goes_on(curves: dict, experts: int) -> None:
    on, stops = curves[experts, False], curves[experts, True]
    assert end(stops) < 0.6 * end(on)
    assert end(stops) < stops[199] < stops[99]  # after the stop nothing new is lost


def test_a_router_that_goes_on_gives_up_what_it_had_found(curves: dict) -> None:
    """Balance moves tasks to other experts for ever, which overwrites what these have learnt."""
    assert end(curves[5, False]) > 1.5 * curves[5, False][199]


def test_more_experts_than_groups_need_not_help(curves: dict) -> None:
    assert end(curves[10, True]) > end(curves[5, True])


def test_the_update_fits_the_data_and_moves_no_further_than_it_must() -> None:
    rng = np.random.default_rng(0)
    x, y = Pool.drawn(rng).data(2, rng)
    w = rng.normal(size=D)
    new = minimum_norm(w, x, y)
    np.testing.assert_allclose(x.T @ new, y, atol=1e-10)
    np.testing.assert_allclose(new - w, np.linalg.pinv(x.T) @ (y - x.T @ w), atol=1e-8)
