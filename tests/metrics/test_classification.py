"""Scores of classes agree with a count by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import vit

from vimoe.errors import DataError
from vimoe.metrics.base import evaluate
from vimoe.metrics.classification import ClassificationMetric, ImageCounts


def test_a_score_is_what_one_counts_by_hand() -> None:
    logits = torch.tensor([[9, 1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5], [0, 6, 5, 4, 3, 2.0]])
    counts = ImageCounts()
    counts.add(logits[:2], torch.tensor([0, 1]))  # best; sixth of six
    counts.add(logits[2:], torch.tensor([5]))  # fifth
    score = counts.score()
    assert (score.top1, score.top5, score.images) == (1 / 3, 2 / 3, 3)
    probability = logits.softmax(dim=1)[torch.arange(3), torch.tensor([0, 1, 5])]
    assert score.loss == pytest.approx(float(-probability.log().mean()))


def test_of_equal_logits_the_first_is_named_as_everywhere_else() -> None:
    logits = torch.randn(400, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    metric, labels = ClassificationMetric(vit()), logits.argmax(dim=1)
    counts = ImageCounts()
    counts.add(logits, labels)
    assert (logits == logits.amax(dim=1, keepdim=True)).sum() > 400  # some are equal
    assert metric.of_each_image(logits, labels)[1].all()
    assert (counts.score().top1, counts.score().top5) == (1, 1)


def test_top5_of_three_classes_is_certain() -> None:
    counts = ImageCounts()
    counts.add(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0]))
    assert (counts.score().top1, counts.score().top5) == (0, 1)


def test_evaluation_is_in_eval_mode_and_weighs_images_not_batches() -> None:
    model = vit(drop_rate=0.5).train()
    images, labels = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4])
    uneven = evaluate(model, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    whole = evaluate(model, [(images, labels)])
    assert uneven.to_dict() == pytest.approx(whole.to_dict(), rel=1e-5)


def test_each_image_is_right_or_not_and_its_class_is_its_label() -> None:
    metric, labels = ClassificationMetric(vit()), torch.tensor([0, 1, 1])
    logits = torch.tensor([[2.0, 0, 0], [2.0, 0, 0], [0, 3.0, 0]])
    loss, right = metric.of_each_image(logits, labels)
    assert right.tolist() == [1, 0, 1]
    assert loss.tolist() == pytest.approx((-logits.log_softmax(dim=1)[torch.arange(3), labels]).tolist())
    assert metric.classes_of(labels).tolist() == [0, 1, 1]


def test_an_evaluation_names_a_label_that_is_no_class() -> None:
    with pytest.raises(DataError, match="the loader gives the label 5: expected 0 to 4, the model has 5 classes"):
        evaluate(vit(), [(torch.randn(2, 3, 32, 32), torch.tensor([0, 5]))])
