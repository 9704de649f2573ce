"""Prompted segmentation by the command line: through all verbs, over a frozen trunk, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.commands import QUICK, call, refused
from helpers.scene_runs import MOE
from helpers.scenery import NAMES, scenes
from safetensors.torch import load_file, save_file

import vimoe
from vimoe.cli import main

DEEP = [
    "--model.name=vit_tiny_patch16_224", "--model.img_size=16",
    '--model.args={"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}',
]  # fmt: skip
PROMPTED = ["--data.task=segmentation", *QUICK, "--train.batch_size=3", "--model.decoder=prompted"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"), train=9)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.safetensors"
    drawn = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    save_file(dict(zip((*NAMES, "bus"), drawn, strict=True)), path)
    return path


@pytest.fixture(scope="module")
def run(data: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "prompted"
    argv = ["train", "--data.path", str(data), *DEEP, "--model.pretrained=false", *PROMPTED, *MOE]
    assert main([*argv, f"--model.prompts={words}", "--train.epochs=12", "--out", str(out)]) == 0
    return out


@pytest.mark.slow  # 13 s
def test_it_learns_scenes_and_goes_through_the_verbs(
    run: Path, data: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = call(capsys, "evaluate", run, "--contours=true")
    assert values["miou"] > 0.4 and len(values["per_class_iou"]) == 3
    assert 0.4 < values["j"] < 1 and 0.2 < values["f"] < 1 and len(values["per_class_f"]) == 3
    plain = call(capsys, "evaluate", run)
    assert plain.items() <= values.items() and "f" not in plain
    weights = load_file(run / "model/model.safetensors")
    assert torch.equal(weights["decoder.prompts"], torch.stack([load_file(words)[name] for name in NAMES]))
    noted = json.loads((run / "model/config.json").read_text())["vimoe"]
    args = {"prompt_mlp": True, "prompt_attention": "levels", "prompt_width": 12}
    assert noted["segmentation"]["decoder_args"] == args and list(noted["layers"]) == ["backbone.blocks.3.mlp"]
    words_elsewhere = words.rename(words.with_name("moved"))  # a run needs the file no more
    try:
        predicted = call(capsys, "predict", run, data / "images/test", "--out", tmp_path / "masks")["predictions"]
        assert set(predicted[0]["areas"]) <= set(NAMES) and Path(predicted[0]["mask"]).exists()
        assert [layer["name"] for layer in call(capsys, "analyze", run)["layers"]] == ["backbone.blocks.3.mlp"]
        assert call(capsys, "export", run)["checked"]["experts"] == {"backbone.blocks.3.mlp": 3}
    finally:
        words_elsewhere.rename(words)


def test_a_frozen_trunk_stays_as_it_is_to_the_bit(data: Path, run: Path, tmp_path: Path) -> None:
    trunk = vimoe.densify(vimoe.load(run / "model")).backbone
    vimoe.save(trunk, tmp_path / "vit")
    was = trunk.state_dict()
    argv = ["train", "--data.path", str(data), f"--model.name=local-dir:{tmp_path / 'vit'}", "--model.img_size=16"]
    argv += [*PROMPTED, "--train.train_only=head", "--moe.layers=none", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    now = vimoe.load(tmp_path / "run/model").state_dict()
    assert all(torch.equal(now[f"backbone.{name}"], tensor) for name, tensor in was.items())
    assert now["decoder.prompts"].shape == (3, 256)  # learnt


def test_what_it_does_not_take_is_one_line(
    data: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", tmp_path / "never"]
    train = ["train", "--data.path", data, *DEEP, "--model.pretrained=false", *PROMPTED, "--moe.layers=none", *out]
    few = tmp_path / "few.safetensors"
    save_file({"sky": torch.ones(3), "raod": torch.ones(3), "car": torch.ones(3)}, few)
    assert "no vector for the class 'road': did you mean 'raod'" in refused(capsys, *train, f"--model.prompts={few}")
    assert "safetensors" in refused(capsys, *train, f"--model.prompts={tmp_path}/none")
    shallow = '--model.args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}'
    assert "reads 4 layers" in refused(capsys, *train, shallow)
    linear = "--model.decoder=linear"
    assert "expected it with model.decoder=prompted only" in refused(capsys, *train, linear, f"--model.prompts={words}")
    assert not (tmp_path / "never").exists()
