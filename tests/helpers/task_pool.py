"""The theory of a mixture that learns tasks one after the other, in the size of numpy.

After Li et al., "Theory on Mixture-of-Experts in Continual Learning" (arXiv 2406.16437). Its formulas are from memory;
where a constant or a form is a choice made here, it is marked so. A round t brings one task:

1. A task n is drawn from a pool of N = 6. It is a linear regression y = X^T w_n in D = 10 dimensions. The tasks are in
   K = 3 groups, and the w_n of a group are near one another (choice: within 0.05 in each dimension).
2. Its data X (D, S) has S = 8 samples, fewer than dimensions, so that many w fit it. One column is b v_n, with v_n the
   task's signal and b in [0.9, 1.1]; the others are noise (choice: of size 0.02). Signals of a group are alike (choice:
   a common direction and 0.3 of one of its own).
3. The router scores h_m = theta_m . x, with x the sum of the columns. The expert with the largest h_m + r_m learns the
   task; r_m is uniform in [0, 0.3].
4. That expert gets the minimum-norm update w + X (X^T X)^-1 (y - X^T w), which fits the round's data exactly.
5. The router descends sum_m pi_m |w_t^m - w_(t-1)^m| (locality) plus M sum_m f_m pi_m (balance), with pi the softmax of
   h and f_m the share of rounds of expert m until now (choice: pi is of this round alone; the rate is 0.8 M).
6. With termination the router stops for good once, for each task, the best score has led the next by more than 0.5 in
   its last 4 rounds (choice; the source has a flag by the gap of scores).

The error of round i at time t is E_t^i = |w_t^(m_i) - w_(n_i)|^2, of the expert m_i that learnt it, and forgetting is
F_t = 1/(t-1) sum_{i<t} (E_t^i - E_i^i).

Axes: N tasks, D dimensions, S samples, M experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
N, K, D, S = 6, 3, 10, 8


@dataclass
class Pool:
    """Tasks to draw from: weights (N, D) and signals (N, D) of length 1."""

    weights: Array
    signals: Array

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Pool:
        group = np.arange(N) % K
        weights = rng.normal(size=(K, D))[group] + 0.05 * rng.normal(size=(N, D))
        axes = np.linalg.qr(rng.normal(size=(D, D)))[0]
        signals = axes[group] + 0.3 * axes[K : K + N]
        return cls(weights, signals / np.linalg.norm(signals, axis=1, keepdims=True))

    def data(self, task: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """X (D, S) and y (S,) of a round."""
        x = 0.02 * rng.normal(size=(D, S))
        x[:, 0] = rng.uniform(0.9, 1.1) * self.signals[task]
        return x, x.T @ self.weights[task]


class Router:
    """Scores of M experts, linear in x, and when they have settled."""

    def __init__(self, experts: int) -> None:
        self.theta, self.used, self.led = np.zeros((D, experts)), np.zeros(experts), np.zeros(N, int)

    def learn(self, x: Array, task: int, chosen: int, distance: float) -> None:
        experts, scores = len(self.used), self.theta.T @ x
        pi = np.exp(scores - scores.max())
        pi /= pi.sum()
        loss = experts * self.used / self.used.sum()  # of a unit of pi_m
        loss[chosen] += distance
        self.theta -= 0.8 * experts * np.outer(x, pi * (loss - pi @ loss))
        *_, second, best = np.sort(self.theta.T @ x)
        self.led[task] = self.led[task] + 1 if best - second > 0.5 else 0

    @property
    def settled(self) -> bool:
        return bool((self.led >= 4).all())


def minimum_norm(w: Array, x: Array, y: Array) -> Array:
    """The weights nearest to w that fit x^T w = y."""
    fitted: Array = w + x @ np.linalg.solve(x.T @ x, y - x.T @ w)
    return fitted


def learn(experts: int, terminate: bool, seed: int, rounds: int = 600) -> tuple[list[float], int | None]:
    """Learn a random sequence of tasks; return F_t for t = 2, 3, ..., and the round in which the router stopped."""
    rng = np.random.default_rng(seed)
    pool, router, w = Pool.drawn(rng), Router(experts), np.zeros((experts, D))
    rounds_of, then = np.zeros((experts, N)), np.zeros((experts, N))  # number, and sum of E_i^i, by expert and task
    forgetting, stopped = list[float](), None
    for t in range(1, rounds + 1):
        task = int(rng.integers(N))
        samples, y = pool.data(task, rng)
        x = samples.sum(axis=1)
        chosen = int(np.argmax(router.theta.T @ x + rng.uniform(0, 0.3, experts)))
        router.used[chosen] += 1
        before, w[chosen] = w[chosen].copy(), minimum_norm(w[chosen], samples, y)
        if experts > 1 and stopped is None:
            router.learn(x, task, chosen, float(np.linalg.norm(w[chosen] - before)))
            stopped = t if terminate and router.settled else None
        errors = ((w[:, None] - pool.weights) ** 2).sum(axis=2)
        if t > 1:
            forgetting.append(float((rounds_of * errors - then).sum()) / (t - 1))
        rounds_of[chosen, task] += 1
        then[chosen, task] += errors[chosen, task]
    return forgetting, stopped
