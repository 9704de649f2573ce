"""Classification: its model fits the data, its contact sheets show the images that the evidence names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.pictures import roles
from helpers.pruned import effect, evidence
from helpers.tiny import config, upcycle, vit

import vimoe.tasks.classification
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.settings import Settings
from vimoe.errors import ConfigError
from vimoe.metrics.classification import ClassificationMetric
from vimoe.tasks.classification import Classification


def test_the_dense_model_has_the_classes_of_the_data(tmp_path: Path) -> None:
    data = Classification.find(DataConfig(path=str(roles(tmp_path, train=2, val=1, test=0))))
    args = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = ModelConfig(name="vit_tiny_patch16_224", pretrained=False, img_size=16, args=args)
    assert Classification.dense_model(model, data).num_classes == 3
    with pytest.raises(ConfigError, match="model.num_classes=7: the data has 3 classes"):
        Classification.dense_model(replace(model, num_classes=7), data)


def test_a_contact_sheet_has_a_row_for_each_expert_with_images_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, list[str]]] = []
    captions = lambda rows: drawn.append({name: [caption for _, caption in row] for name, row in rows.items()})  # noqa: E731
    monkeypatch.setattr(vimoe.tasks.classification, "contact_sheet", captions)
    settings = Settings(data=DataConfig(path=str(roles(tmp_path, train=1, val=2, test=0))))
    data = Classification.find(settings.data)
    found = evidence(effect(0.1), examples=((5,), (), (0, 2), ()), expert_order=[3, 2, 1, 0])
    found = replace(found, classes=("blue", "green", "red", "x", "y"))
    sheets = Classification(settings).examples(upcycle(vit(), config()), data, found)
    assert list(sheets) == ["blocks.0.mlp"]
    assert drawn == [{"expert 2": ["blue", "green"], "expert 0": ["red"]}]
    assert list(drawn[0]) == ["expert 2", "expert 0"]
    monkeypatch.setattr(ClassificationMetric, "classes_of", lambda _self, labels: torch.full_like(labels, -1))
    Classification(settings).examples(upcycle(vit(), config()), data, found)
    assert drawn[1] == {"expert 2": ["no class", "no class"], "expert 0": ["no class"]}
