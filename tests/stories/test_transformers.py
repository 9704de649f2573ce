"""A folder that transformers wrote goes through the verbs: DINOv2 trained on digits, whole and from cached features."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from helpers.commands import QUICK, call, refused
from helpers.scenery import scenes
from helpers.stand_in_hub import TOKEN, stand_in_hub
from helpers.tiny_transformers import vit
from PIL import Image

import vimoe
from vimoe.models.interface import label_names
from vimoe.moe.layer import moe_layers

transformers = pytest.importorskip("transformers")
BLOCKS = [f"dinov2.encoder.layer.{i}.mlp" for i in range(2)]


@pytest.fixture
def name(tmp_path: Path) -> str:
    """Name of a DINOv2 without a classifier, for images of 32 pixels that its processor brings to 16."""
    vit("dinov2, bare", image_size=32).save_pretrained(tmp_path / "dinov2")
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    transformers.BitImageProcessor(**sizes, image_mean=[0.5, 0.4, 0.3]).save_pretrained(tmp_path / "dinov2")
    return f"--model.name=transformers:{tmp_path / 'dinov2'}"


def digits(tmp_path: Path) -> str:
    """A folder of class folders with a few images of digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for i in range(60):
        place = tmp_path / "digits" / f"digit {data.target[i]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i] * 15).astype("uint8")).resize((20, 20)).save(place / f"{i}.png")
    return f"--data.path={tmp_path / 'digits'}"


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # of huggingface_hub's upload by LFS
def test_a_folder_is_trained_evaluated_analysed_pruned_exported_predicts_and_is_shared(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = call(capsys, "plan", name, "--moe.layers=last:2")
    assert planned["moe"]["layers"] == BLOCKS
    run, epochs, data = tmp_path / "run", "--train.epochs=2", digits(tmp_path)
    call(capsys, "train", data, *QUICK, epochs, name, "--moe.layers=last:2", "--moe.num_experts=3", "--out", run)
    noted = json.loads((run / "model" / "config.json").read_text())
    assert noted["vimoe"]["family"] == "transformers" and list(noted["vimoe"]["layers"]) == BLOCKS
    assert noted["label_names"][3] == "digit 3" and noted["pretrained_cfg"]["mean"] == [0.5, 0.4, 0.3]
    assert noted["pretrained_cfg"]["input_size"] == [3, 16, 16] and noted["pretrained_cfg"]["crop_pct"] == 0.8
    assert 0 <= call(capsys, "evaluate", run, data)["top1"] <= 1
    assert [layer["name"] for layer in call(capsys, "analyze", run)["layers"]] == BLOCKS
    call(capsys, "prune", run, "--tolerance=9", "--out", tmp_path / "dense")
    pruned = vimoe.load(tmp_path / "dense" / "model")
    assert not any(isinstance(module, vimoe.MoE) for module in pruned.modules())
    image = next((tmp_path / "digits").rglob("*.png"))
    (predicted,) = call(capsys, "predict", run, image, "--top=10")["predictions"]
    ours = {each["name"]: each["probability"] for each in predicted["classes"]}
    assert sorted(ours) == [f"digit {i}" for i in range(10)]

    assert call(capsys, "export", run)["checked"]["experts"] == dict.fromkeys(BLOCKS, 3)
    script = runpy.run_path(str(run / "onnx" / "predict.py"))
    (theirs,) = script["probabilities"]([str(image)])
    assert dict(zip(script["LABELS"], theirs, strict=True)) == pytest.approx(ours, abs=1e-5)

    with stand_in_hub(monkeypatch, tmp_path / "cache"):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        call(capsys, "push", run, "me/digits")
        again, own = vimoe.load("me/digits"), vimoe.load(run / "model")
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(x).logits, own(x).logits)
    assert label_names(again)[3] == again.config.id2label[3] == "digit 3" and list(moe_layers(again)) == BLOCKS


def test_features_of_its_frozen_trunk_are_cached(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    frozen = ["--moe.layers=last:1", "--train.train_only=moe", "--data.cache=features"]
    data = digits(tmp_path)
    for run, made in (("first", True), ("second", False)):
        out = ["--out", tmp_path / run]
        found = call(capsys, "train", data, *QUICK, "--train.epochs=1", name, *frozen, *out)["features"]
        assert found["before"] == "dinov2.encoder.layer.1" and (found["seconds"] > 0) is made


def test_it_carries_a_decoder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data.task=segmentation", "--data.path", scenes(tmp_path / "scenes", train=6, val=2, test=0)]
    call(capsys, "train", *data, *QUICK, "--train.epochs=1", name, "--moe.layers=last:1", "--out", tmp_path / "run")
    model = vimoe.load(tmp_path / "run" / "model")
    assert type(model.backbone).__name__ == "Dinov2ForImageClassification"
    assert model(torch.randn(1, 3, 24, 40)).shape[-2:] == (24, 40)  # DINOv2 takes images of any size


def test_a_misspelt_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "plan", f"--model.name=transformers:{tmp_path}/dinov3", "--moe.layers=last:1")
    assert "no model folder there" in said
