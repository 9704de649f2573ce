"""Predictions of classes belong to their files and agree with the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.pictures import folder
from helpers.tiny import vit
from torch import nn

from vimoe.data.image_files import list_images
from vimoe.tasks.classification_predictions import predict


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
