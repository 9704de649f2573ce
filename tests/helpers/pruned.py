"""Changes and evidence made by hand, for analysis and pruning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vimoe.analysis.changes import Changes
from vimoe.analysis.dependence import Dependence
from vimoe.analysis.evidence import Effect, Evidence, LayerEvidence
from vimoe.analysis.intervals import Interval
from vimoe.metrics.classification import ImageScore


def changes(loss: np.ndarray, right: np.ndarray) -> Changes:
    """By a metric without a temperature."""
    return Changes(loss, right, np.empty((*loss.shape, 0)), np.empty((len(loss), 0)), np.zeros((len(loss), 2)))


def effect(value: float, half: float = 0.0) -> Effect:
    return Effect(Interval(value, value - half, value + half), Interval(0.0, 0.0, 0.0))


def evidence(*changes: Effect, hows: tuple[str, ...] = ("shared", "merge", "matched"), **fields: object) -> Evidence:
    """For the layers of a tiny ViT with 4 experts, given what making them dense changes by the first way."""
    rows = []
    for i, change in enumerate(changes):
        rows.append(
            LayerEvidence(
                name=f"blocks.{i}.mlp", routing="image", num_experts=4, top_k=1, counts=np.ones((5, 4), dtype=int),
                drawn=np.ones((5, 4), dtype=int), expert_order=np.arange(4), gate_mass=np.full(4, 0.25),
                adjusted_mutual_information=Dependence(0.0, 0.0, 0.0, 1.0, 0.0), effective_experts=Interval(4, 4, 4),
                permuted=effect(0.5), frozen=effect(0.5), experts=(effect(0.1),) * 4, comparison=None,
                dense={how: replace(change, loss=_up(change.loss, 0.1 * j)) for j, how in enumerate(hows)},
                examples=((),) * 4,
            )
        )  # fmt: skip
    rows = [replace(row, **fields) for row in rows]
    score, one = ImageScore(0.5, 0.9, 1.0, 10), Interval(1, 1, 1)
    return Evidence(
        layers=tuple(rows), base=score, classes=tuple("abcde"), images=10, overruled_images=10, draws=20,
        class_order=np.arange(5), pairs=(one, 1, 1), routes=(1, 1.0, 16), agreement={"value": np.eye(len(rows))},
    )  # fmt: skip


def _up(interval: Interval, by: float) -> Interval:
    return Interval(interval.value + by, interval.low + by, interval.high + by)
