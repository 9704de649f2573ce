"""Figures of an accuracy matrix, and of the experts that tasks share, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vimoe.analysis.forgetting import forgetting, lift
from vimoe.errors import VimoeError


def test_an_accuracy_matrix_by_hand() -> None:
    """Task 1 was best after task 2, which its forgetting counts from, and not its transfer."""
    found = forgetting([[0.5], [0.75, 0.75], [0.25, 0.5, 1.0]])
    assert found["accuracy"] == [[0.5], [0.75, 0.75], [0.25, 0.5, 1.0]]
    assert found["mean"] == pytest.approx((0.25 + 0.5 + 1.0) / 3)
    assert found["forgetting"] == pytest.approx(((0.75 - 0.25) + (0.75 - 0.5)) / 2)
    assert found["backward_transfer"] == pytest.approx(((0.25 - 0.5) + (0.5 - 0.75)) / 2)


def test_what_later_tasks_add_is_transfer_and_negative_forgetting() -> None:
    found = forgetting([[0.5], [0.75, 0.5]])
    assert found["backward_transfer"] == pytest.approx(0.25) and found["forgetting"] == pytest.approx(-0.25)


def test_one_task_has_nothing_to_forget() -> None:
    assert forgetting([[0.5]]) == {"accuracy": [[0.5]], "mean": 0.5, "forgetting": None, "backward_transfer": None}


@pytest.mark.parametrize("rows", [[], [[0.5, 0.5]], [[0.5], [0.5]], [[0.5], [0.5, 0.5], [0.5, 0.5]]])
def test_no_triangle_is_one_line(rows: list) -> None:
    with pytest.raises(VimoeError, match=r"expected 1, 2, \.\.\. of them, a row a task"):
        forgetting(rows)


MANY = 10**9  # decisions, beside which the half that is added is nothing


def test_tasks_with_experts_of_their_own_meet_as_often_as_there_are_tasks() -> None:
    own = MANY * np.eye(4)
    found = lift(own, own)
    np.testing.assert_allclose(found.diagonal(), 2, atol=1e-6)
    assert (found[~np.eye(4, dtype=bool)] < -20).all() and np.isfinite(found).all()


def test_lift_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/4, 3/4), base rate 1/2: a task meets itself in 5/8 and the other in 3/8."""
    counts = MANY * np.array([[3, 1], [1, 3]])
    np.testing.assert_allclose(lift(counts, counts), np.log2([[1.25, 0.75], [0.75, 1.25]]), atol=1e-6)
    np.testing.assert_allclose(lift(counts, counts[::-1]), np.log2([[0.75, 1.25], [1.25, 0.75]]), atol=1e-6)


def test_balance_alone_is_no_lift_and_neither_is_one_busy_expert() -> None:
    """Tasks that do not differ have 0, whatever the load; shares would overlap by 1 in both."""
    for load in ([1, 1, 1, 1], [7, 1, 0, 0]):
        counts = MANY * np.array([load, load, load])
        np.testing.assert_allclose(lift(counts, counts), 0, atol=1e-6)


def test_half_a_decision_is_added_to_each_count() -> None:
    p = np.array([[2.5, 0.5], [0.5, 2.5]]) / 3
    np.testing.assert_allclose(lift([[2, 0], [0, 2]], [[2, 0], [0, 2]]), np.log2(p @ p.T / 0.5))


def test_models_after_different_numbers_of_tasks_are_compared() -> None:
    found = lift([[MANY, 0]], [[MANY, 0], [0, MANY]])
    assert found.shape == (1, 2) and found[0, 0] == pytest.approx(1) and found[0, 1] < -20
