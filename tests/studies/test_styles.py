"""On a task made so that routing must help, it does: the router finds the split, and the loss depends on its routes."""

from __future__ import annotations

import pytest
import styles


@pytest.mark.slow  # 19 s each
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_mixture_beats_a_dense_ffn_of_equal_activated_width(seed: int) -> None:
    parent = styles.parent(styles.task(seed)[0], seed)
    mixture = styles.run("choice", seed, dense=parent)
    dense = styles.run("dense, equal activated", seed, dense=parent)
    assert mixture["accuracy"] > dense["accuracy"] + 0.02 and mixture["loss"] < dense["loss"] - 0.05
    assert mixture["permuted"][1] > 0.3  # nats, lower end of the interval
    assert mixture["follows_style"] > 0.4 > 0.2 > mixture["follows_label"]


@pytest.mark.slow
def test_at_a_low_rate_the_gate_decides_what_routes_are_worth() -> None:
    """A router of copies leaves its probability where it started, and with it the weight of what experts learn."""
    rare = {"seed": 0, "epochs": 3, "lr": 1e-4, "dense": styles.parent(styles.task(0)[0], 0)}
    probability, choice, alone = (styles.run(arm, **rare) for arm in ("probability", "choice", "choice, no shared"))
    assert probability["gate"] < 0.4 < choice["gate"] < alone["gate"]
    assert probability["permuted"][0] < choice["permuted"][0] < alone["permuted"][0]
