"""A diagnosis as text and as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.known_scenes import batches, known
from helpers.tiny import config, images, perturb_experts, upcycle, vit

import vimoe
from vimoe.analysis.diagnosis import MOST, Diagnosis


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    model = perturb_experts(upcycle(vit(), config()))
    return vimoe.diagnose(model, [(images(model, 20), torch.arange(20) % 5)], draws=2)


def test_the_text_has_about_ten_lines_with_the_figures_of_each_layer(diagnosis: Diagnosis) -> None:
    lines = str(diagnosis).splitlines()
    first, header, *rows = lines[:4]
    assert str(diagnosis.base) in first and "over images" in first and len(lines) <= 12
    assert header.split()[0] == "layer" and [row.split()[0] for row in rows] == ["blocks.0.mlp", "blocks.1.mlp"]
    for row, layer in zip(rows, diagnosis.layers, strict=True):
        assert f"{layer.gates.mean:.2f} ({layer.gates.low:.2f}-{layer.gates.high:.2f})" in row
        assert str(layer.permuted.loss) in row and str(layer.oracle.by_prediction.loss) in row
        assert f"{layer.from_shared.outputs:.2%}" in row and f"{layer.from_mean.outputs:.2%}" in row
        assert f"{layer.from_shared.cosine:.5f}" in row and f"of {layer.num_experts}" in row
        assert f"{layer.oracle.by_image.loss.value:+.4f}" in lines[5]
    assert "no score" in lines[5]
    assert sum(line.startswith("   Try ") for line in lines) == min(MOST, len(diagnosis.findings))


def test_the_dictionary_is_json_and_has_everything(diagnosis: Diagnosis) -> None:
    values = json.loads(json.dumps(diagnosis.to_dict()))
    assert values["base"] == diagnosis.base.to_dict() and values["images"] == 20 and values["confidence"] == 0.95
    assert [layer["name"] for layer in values["layers"]] == ["blocks.0.mlp", "blocks.1.mlp"]
    (first, _), layer = values["layers"], diagnosis.layers[0]
    assert first["oracle"]["by_class"]["loss"]["value"] == layer.oracle.by_class.loss.value
    assert first["load"] == list(layer.load) and first["gates"]["median"] == layer.gates.median
    assert set(first["dense"]) == {"shared", "merge", "matched"}
    finding = values["findings"][0]
    assert set(finding) == {"name", "layers", "says", "remedies", "because"} and finding["remedies"]


def test_masks_have_no_oracle_and_the_text_says_so() -> None:
    diagnosis = vimoe.diagnose(known(), batches(), draws=2)
    assert all(layer.oracle is None for layer in diagnosis.layers) and diagnosis.findings
    text = str(diagnosis)
    assert "No oracle: patches have classes here, and images have none." in text and "no score" not in text
    json.dumps(diagnosis.to_dict())
