"""Scores agree with a count by hand, and predictions with the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.pictures import folder
from helpers.tiny import vit
from torch import nn

from vimoe.data.image_files import list_images
from vimoe.metrics.base import evaluate
from vimoe.metrics.classification import ImageCounts
from vimoe.tasks.classification_predictions import predict


def test_a_score_is_what_one_counts_by_hand() -> None:
    logits = torch.tensor([[9, 1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5], [0, 6, 5, 4, 3, 2.0]])
    counts = ImageCounts()
    counts.add(logits[:2], torch.tensor([0, 1]))  # best; sixth of six
    counts.add(logits[2:], torch.tensor([5]))  # fifth
    score = counts.score()
    assert (score.top1, score.top5, score.images) == (1 / 3, 2 / 3, 3)
    probability = logits.softmax(dim=1)[torch.arange(3), torch.tensor([0, 1, 5])]
    assert score.loss == pytest.approx(float(-probability.log().mean()))


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


def test_predictions_are_ranked_named_and_belong_to_their_file(tmp_path: Path) -> None:
    files = list_images([folder(tmp_path, 12)])  # more than a batch
    model = vit(num_classes=3)
    model.pretrained_cfg["label_names"] = ["x", "y", "z"]
    results = predict(model, files, top=2)
    assert [result["file"] for result in results] == [str(file) for file in files]
    for result in results:
        (first, second) = result["classes"]
        assert first["probability"] >= second["probability"] and first["name"] != second["name"]
    alone = predict(model, files[-1:], top=3)[0]["classes"]
    assert sum(c["probability"] for c in alone) == pytest.approx(1)
    assert alone[0]["probability"] == pytest.approx(results[-1]["classes"][0]["probability"], rel=1e-4)


def test_classes_without_names_are_numbers(tmp_path: Path) -> None:
    model: nn.Module = vit()
    named = predict(model, list_images([folder(tmp_path, 1)]), top=9)[0]["classes"]
    assert {c["name"] for c in named} == {"0", "1", "2", "3", "4"}
