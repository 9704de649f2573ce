"""Metrics are found by model or by name; batches are checked before they are counted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from helpers.segmenters import segmenter
from helpers.tiny import vit
from torch import Tensor, nn

from vimoe.errors import ConfigError, DataError
from vimoe.metrics.base import MeanScore, Metric, batches, evaluate, metric_of, read_score, signature
from vimoe.metrics.classification import ClassificationMetric, ImageScore
from vimoe.metrics.registry import METRICS, SCORES, Shown
from vimoe.metrics.segmentation import SceneScore, SegmentationMetric


@dataclass(frozen=True)
class Closeness(MeanScore):
    kind = "closeness"


class ClosenessMetric(Metric):
    score_type = Closeness

    def check(self, images: Tensor, labels: Tensor) -> None:
        if (labels < 0).any():
            raise DataError("below 0")

    def of_each_image(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (outputs.argmax(dim=1) - labels).abs().float(), (outputs.argmax(dim=1) == labels).float()

    def classes_of(self, labels: Tensor) -> Tensor:
        return labels


def test_the_metric_follows_from_the_model_or_is_named() -> None:
    assert type(metric_of(vit())) is ClassificationMetric
    assert type(metric_of(segmenter())) is SegmentationMetric
    assert type(metric_of(nn.DataParallel(segmenter()))) is SegmentationMetric
    assert type(metric_of(segmenter(), "classification")) is ClassificationMetric
    with pytest.raises(ConfigError, match="metric='clasification': expected one of .*did you mean 'classification'"):
        metric_of(vit(), "clasification")


def test_a_metric_of_means_needs_no_counts_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "closeness", ClosenessMetric)
    monkeypatch.setitem(SCORES, "closeness", Shown({"closeness": "closeness"}, "closeness"))
    model, x = vit(), torch.randn(5, 3, 32, 32)
    named = model(x).argmax(dim=1)
    labels = torch.where(torch.arange(5) < 3, named, (named + 1) % 5)
    off = (named - labels).abs().float().mean()
    score = evaluate(model, [(x[:4], labels[:4]), (x[4:], labels[4:])], metric="closeness")
    assert score.to_dict() == {"loss": pytest.approx(float(off)), "closeness": pytest.approx(0.6), "images": 5}
    assert read_score(score.to_dict()) == score and score.rank > Closeness(0.6, 9.0, 5).rank
    assert str(score).startswith("closeness 60.00%")
    with pytest.raises(DataError, match="below 0"):
        evaluate(model, [(x, labels - 9)], metric="closeness")


def test_scores_are_read_back_as_what_they_were() -> None:
    image, scene = ImageScore(0.5, 0.75, 1.5, 4, 0.25), SceneScore(0.5, (0.5, None), 0.5, None, 40, 4)
    for score in (image, scene):
        assert read_score(score.to_dict()) == score and type(read_score(score.to_dict())) is type(score)


def test_a_score_of_an_older_version_has_no_calibration_error() -> None:
    old = read_score({"top1": 0.5, "top5": 0.75, "loss": 1.5, "images": 4})
    assert old == ImageScore(0.5, 0.75, 1.5, 4, None) and "ece" not in old.columns
    assert str(old) == "top-1 50.00%, top-5 75.00%, loss 1.5000 of 4 images"
    new = replace(old, ece=0.125)
    assert new.columns == {**old.columns, "ece": 0.125} and new.rank == old.rank
    assert "calibration error 12.50% of 4 images" in str(new)


def test_batches_are_on_the_device_in_the_types_that_the_model_takes() -> None:
    model = vit().to(torch.float64).train()
    x, y = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2], dtype=torch.uint8)
    found = list(batches(metric_of(model), [(x[:0], y[:0]), (x, y)]))
    types = [(start.inputs.dtype, labels.dtype, len(start)) for start, labels in found]
    assert types == [(torch.float64, torch.int64, 3)]
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_soft_labels_are_refused_for_every_metric(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """As whole numbers they would all be 0, and a model that is always right would be pruned away."""
    monkeypatch.setitem(METRICS, "closeness", ClosenessMetric)
    soft = torch.full((3, 5), 0.2).to(dtype)
    with pytest.raises(DataError, match=r"labels of torch.* and shape \(3, 5\) for 3 images: expected whole") as error:
        list(batches(metric_of(vit(), "closeness"), [(torch.randn(3, 3, 32, 32), soft)]))
    assert "\n" not in str(error.value)


def test_signatures_tell_labels_of_any_shape_apart() -> None:
    assert signature(torch.tensor([4, 7])).tolist() == [4, 7]
    assert signature(torch.tensor([[1, 0], [1, 1]])).tolist() == [1, 2]
    assert signature(torch.ones(2, 3, 3, dtype=torch.int64)).tolist() == [9, 9]
    assert signature(torch.empty(0, 3, 3, dtype=torch.int64)).tolist() == []
