"""Figures of a model that learns tasks one after the other: what is forgotten, and which experts tasks share.

Axes: T tasks (U of another model); row t is after task t, column i of the images of task i; N experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vimoe.errors import VimoeError


def forgetting(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return what an accuracy matrix says of a sequence of tasks.

    With A[t, i] the accuracy on task i after task t:

    - mean: 1/T sum_i A[T, i].
    - forgetting: 1/(T-1) sum_{i<T} (max_{i<=t<T} A[t, i] - A[T, i]). Chaudhry et al., arXiv 1801.10112.
    - backward_transfer: 1/(T-1) sum_{i<T} (A[T, i] - A[i, i]). Lopez-Paz and Ranzato, arXiv 1706.08840.

    Forgetting as in arXiv 2406.16437, of errors at the end over those right after a task, is minus backward transfer.

    Args:
        rows: accuracies in 0..1 after each task, of the tasks until then: row t has t + 1 numbers.

    Returns:
        "accuracy" (the rows), and the three figures; the last two are None after a single task.

    Raises:
        VimoeError: if the rows are no such triangle.

    >>> found = forgetting([[0.8], [0.9, 0.7], [0.6, 0.5, 1.0]])
    >>> round(found["mean"], 3), round(found["forgetting"], 3), round(found["backward_transfer"], 3)
    (0.7, 0.25, -0.2)
    """
    if not rows or [len(row) for row in rows] != list(range(1, len(rows) + 1)):
        raise VimoeError(f"rows of {[len(row) for row in rows]} accuracies: expected 1, 2, ... of them, a row a task")
    last, before = rows[-1], len(rows) - 1
    lost = [max(row[i] for row in rows[i:-1]) - last[i] for i in range(before)]
    gained = [last[i] - rows[i][i] for i in range(before)]
    return {
        "accuracy": [list(row) for row in rows],
        "mean": sum(last) / len(last),
        "forgetting": sum(lost) / before if before else None,
        "backward_transfer": sum(gained) / before if before else None,
    }


def lift(one: ArrayLike, other: ArrayLike) -> NDArray[np.float64]:
    """Return (T, U) log2 of how much likelier two tasks meet in an expert than any two do.

        log2  sum_e p_i(e) q_j(e) / sum_e p(e) q(e)

    with p_i(e) the share of task i's decisions for expert e in one model, q_j(e) that of task j in another (or the
    same) model, and p, q the means over the tasks of either: the base rate. It is 0 if tasks do not differ in their
    experts, log2 T if each of T tasks has experts of its own and keeps them, and below 0 for tasks that avoid one
    another's experts. Shares themselves overlap nearly alike for all pairs if the load is balanced, whatever the tasks.
    Half a decision is added to each count, so that it is finite.

    Args:
        one: (T, N) number of decisions of each task for each expert.
        other: (U, N) those of the other model.

    >>> lift([[99, 1], [1, 99]], [[99, 1], [1, 99]]).round(1)
    array([[ 1. , -4.1],
           [-4.1,  1. ]])
    """
    p_TN, q_TN = (_shares(counts) for counts in (one, other))
    base: float = p_TN.mean(axis=0) @ q_TN.mean(axis=0)
    found: NDArray[np.float64] = np.log2(p_TN @ q_TN.T / base)
    return found


def _shares(counts: ArrayLike) -> NDArray[np.float64]:
    smoothed_TN = np.asarray(counts, dtype=np.float64) + 0.5
    shares_TN: NDArray[np.float64] = smoothed_TN / smoothed_TN.sum(axis=1, keepdims=True)
    return shares_TN
