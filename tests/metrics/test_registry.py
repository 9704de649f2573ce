"""Every kind of score has a metric and names for its figures, and JSON tells the kinds apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.segmenters import segmenter
from helpers.tiny import vit

from vimoe.errors import ConfigError
from vimoe.metrics.base import Metric
from vimoe.metrics.classification import ClassificationMetric
from vimoe.metrics.registry import METRICS, SCORES, Shown, check_shown, kind_of, shown

OLD = Path(__file__).parents[1] / "old"


def test_there_is_a_metric_for_each_kind_and_names_for_its_figures() -> None:
    assert METRICS.keys() == SCORES.keys()
    for kind, model in (("classification", vit()), ("segmentation", segmenter())):
        metric: Metric = METRICS.find(kind)(model)
        score, names = metric.counts().score(), SCORES[kind]
        figures = score.to_dict()
        assert score.kind == kind == kind_of(figures) == kind_of(score.columns)
        assert {*names.shares, names.right, *(names.by_class or ())[:1]} <= figures.keys()
        assert figures[names.judge] == score.rank[0] and set(names.shares) <= score.columns.keys()
        assert names.right_name == names.shares[names.right]


@pytest.mark.parametrize(("run", "kind"), [("digits", "classification"), ("scenes", "segmentation")])
def test_files_of_an_older_version_tell_their_kind(run: str, kind: str) -> None:
    assert kind_of(json.loads((OLD / run / "routing.json").read_text(encoding="utf-8"))["base"]) == kind


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "kind of score='mine': expected one of classification, segmentation"),
        (Shown({"top1": "top-1"}, "top1"), "'mine' and 'classification' both show 'top1'"),
        (Shown({"mine": "mine", "miou": "mean IoU"}, "mine"), "'mine' and 'segmentation' both show 'miou'"),
        (Shown({"top5": "top-5"}, "top5"), "'mine' and 'classification' both show 'top5'"),
    ],
)
def test_a_metric_whose_scores_could_not_be_read_back_is_refused(
    monkeypatch: pytest.MonkeyPatch, entry: Shown | None, message: str
) -> None:
    monkeypatch.setitem(METRICS, "mine", ClassificationMetric)
    if entry:
        monkeypatch.setitem(SCORES, "mine", entry)
    with pytest.raises(ConfigError, match=message) as error:
        check_shown("mine")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="metric='nobody': expected one of"):
        check_shown("nobody")
    monkeypatch.setitem(SCORES, "mine", Shown({"mine": "mine"}, "mine"))
    for metric in METRICS:
        check_shown(metric)


@pytest.mark.parametrize("figures", [{"loss": 1.0}, {"top1": 0.5, "miou": 0.5}])
def test_figures_of_no_kind_or_of_two_are_refused(figures: dict[str, float]) -> None:
    with pytest.raises(KeyError, match="expected one of the scores top1, miou"):
        shown(figures)
