"""Answers of the cells to each contrast: the paired difference with its interval, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vimoe.metrics.registry import Shown, shown
from vimoe.study.paired import Mean, interval, paired, sign_flip_p, verdict
from vimoe.study.plan import Contrast
from vimoe.study.results import Results


@dataclass(frozen=True)
class Answer:
    """Answer to a contrast on a data set.

    Attributes:
        contrast: name of the contrast.
        of, against: outcomes that are compared; `of` is None until a search has chosen among several.
        margin: largest difference that counts as none, in points.
        verdict: verdict in words, `paired.verdict`, with "so far" while seeds are missing; "not yet" without a pair.
        difference: mean paired difference of the metric, in points; None without a pair.
        p: p-value of the signs of the differences.
        loss: mean paired difference of the loss, in nats.
        routes: cost of permuting the routes, in nats, where it was measured.
    """

    contrast: str
    of: str | None
    against: str
    margin: float
    verdict: str = "not yet"
    difference: Mean | None = None
    p: float | None = None
    loss: Mean | None = None
    routes: Mean | None = None

    def __str__(self) -> str:
        against = f"{self.contrast}: {self.of or 'the best'} against {self.against}"
        if self.difference is None:
            return f"{against}: {self.verdict}"
        seeds = "1 seed" if self.difference.n == 1 else f"{self.difference.n} seeds"
        return f"{against}: {shown_mean(self.difference)} points, {seeds}: {self.verdict}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with None in the place of an infinite end of an interval."""
        return {
            name: {k: None if math.isinf(v) else v for k, v in value.items()} if isinstance(value, dict) else value
            for name, value in asdict(self).items()
        }


def answers(results: Results, data: str) -> list[Answer]:
    """Return the answers to the declared contrasts on a data set."""
    declared = results.study.contrasts
    return [answer(results, data, name, each, len(declared)) for name, each in declared.items()]


def explorations(results: Results, data: str) -> list[Answer]:
    """Return the answers to the comparisons that were not declared, each with an interval of its own."""
    return [answer(results, data, name, each) for name, each in results.study.explored.items()]


def answer(results: Results, data: str, name: str, contrast: Contrast, comparisons: int = 1) -> Answer:
    """Return the answer to a contrast on a data set, from the cells that are there.

    Args:
        results: cells of the study.
        data: name of the data set.
        name: name of the contrast.
        contrast: the contrast.
        comparisons: number of intervals that shall hold together.
    """
    of, margin = results.candidate(data, contrast.candidates), results.study.margin(data, contrast)
    mine = results.outcome(data, of) if of else {}
    theirs = results.outcome(data, contrast.against)
    if of is None or not mine.keys() & theirs.keys():
        return Answer(name, of, contrast.against, margin)
    points = differences(mine, theirs, names_of(mine).judge, 100)
    found = interval(points, comparisons)
    routes = None if "/" in of else routes_cost(list(results.final(data, of).values()))
    said = verdict(found, margin, routes, contrast.routes)
    wanted = [set(results.study.seeds_of(data, outcome.partition("/")[0])) for outcome in (of, contrast.against)]
    if found.n < len(wanted[0] & wanted[1]):
        said += ", so far"
    loss = interval(differences(mine, theirs, "loss"), comparisons)
    return Answer(name, of, contrast.against, margin, said, found, sign_flip_p(points), loss, routes)


def routes_cost(cells: Sequence[dict[str, Any]]) -> Mean | None:
    """Return what it costs to permute the routes of one layer, in nats, over seeds; None without such a measurement.

    The layer is the one whose interval has the highest lower end; the interval is widened for the number of layers.
    """
    names = layer_names([cell for cell in cells if cell["analysis"]])
    found = []
    for name in names:
        layers = [each for cell in cells for each in (cell["analysis"] or {"layers": []})["layers"]]
        values = [each["permuted"]["loss"]["value"] for each in layers if each["name"] == name and each["permuted"]]
        if values:
            found.append(interval(values, len(names)))
    return max(found, key=lambda mean: (mean.low, mean.value)) if found else None


def layer_names(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the MoE layers, in forward order."""
    return list(dict.fromkeys(layer["name"] for cell in cells for layer in cell["analysis"]["layers"]))


def names_of(scores: dict[int, dict[str, Any]]) -> Shown:
    """Return the names of the figures of scores by seed."""
    return shown(next(iter(scores.values())))


def differences(
    of: dict[int, dict[str, Any]], to: dict[int, dict[str, Any]], key: str, scale: float = 1
) -> list[float]:
    """Return the paired differences of a figure."""
    return paired(*({seed: scale * score[key] for seed, score in each.items()} for each in (of, to)))


def shown_mean(mean: Mean, form: str = "+.2f") -> str:
    """Return a mean with its interval as text."""
    if mean.n < 2:
        return f"{mean.value:{form}} (one seed)"
    return f"{mean.value:{form}} [{mean.low:{form}}, {mean.high:{form}}]"
