"""Classifiers whose classes stand in another order than the data's."""

from __future__ import annotations

import logging

import pytest
import timm
import torch

from vimoe.models.class_order import order_classes
from vimoe.models.interface import find_backbone, label_names


def classifier(names: list[str] | None, name: str = "test_vit") -> torch.nn.Module:
    model = timm.create_model(name, num_classes=3).eval()
    find_backbone(model).set_label_names(names)
    return model


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224"])
def test_rows_follow_the_names_of_the_data(name: str) -> None:
    model = classifier(["wren", "crow", "owl"], name)
    images = torch.rand(2, *find_backbone(model).input_size)
    with torch.no_grad():
        before = model(images)
        order_classes(model, ["crow", "owl", "wren"])
        assert torch.equal(model(images), before[:, [1, 2, 0]])
    assert label_names(model) == ["crow", "owl", "wren"]


@pytest.mark.parametrize("names", [None, ["crow", "owl", "wren"], ["a", "b", "c"], ["owl", "owl", "wren"]])
def test_a_classifier_of_no_names_or_of_other_names_stays(
    names: list[str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = classifier(names)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO, "vimoe"):
        order_classes(model, ["crow", "owl", "wren"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert bool(caplog.records) == (names is not None and names[0] != "crow")
