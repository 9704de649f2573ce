"""The study of prompted segmentation: its scores are a segmenter's, decoders learn, cells are not run again."""

from __future__ import annotations

import json
from pathlib import Path

import prompted
import pytest
import torch
from helpers.scenery import scenes
from helpers.tiny import vit

import vimoe
from vimoe.config.data import DataConfig
from vimoe.data.loaders import preprocessing
from vimoe.data.scenes import load_scenes
from vimoe.models.segmenter import Segmenter

ARMS = ["linear", "MLP + hierarchical", "MLP + hierarchical, drawn"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = vit(num_classes=0, depth=4, img_size=(24, 32), patch_size=8, dynamic_img_size=True)
    return vimoe.save(backbone, tmp_path_factory.mktemp("models") / "vit")


@pytest.mark.parametrize("arm", ARMS)
@torch.no_grad()
def test_scores_from_features_are_those_of_a_segmenter(arm: str, model: Path, tmp_path: Path) -> None:
    data = load_scenes(DataConfig(path=str(scenes(tmp_path, train=3)), task="segmentation"))
    name, args = prompted.ARMS[arm]
    whole = Segmenter(vimoe.load(model), 3, name, crop=(24, 32), decoder_args=args).eval()
    whole.decoder = decoder = prompted.new_decoder(arm, 24, 4, 3, seed=0).eval()
    found = prompted.features(whole, data.train, data, whole.read_blocks)
    mean, std = (torch.tensor(preprocessing(whole)[key])[:, None, None] for key in ("mean", "std"))
    pixels = prompted.pil_to_tensor(prompted.open_image(data.train[1][0])) / 255
    expected = whole(((pixels - mean) / std)[None])
    got = prompted.scores(decoder, found, torch.tensor([1]), (24, 32))
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))  # of float16
    assert found.small.shape == (3, 12, 16) and len(found.masks) == 3


@pytest.mark.slow  # 7 s
def test_decoders_learn_and_cells_are_not_run_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = scenes(tmp_path / "data", train=12, val=4, test=4)
    argv = ["--model", f"local-dir:{model}", "--data", str(data), "--out", str(tmp_path / "out"), "--size", "24", "32"]
    argv += ["--arms", *ARMS, "--control", "linear", "--seeds", "2", "--every", "2", "--steps", "60"]
    prompted.main(argv)
    first = capsys.readouterr().out
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in first and table.count("\n") == 2 + len(ARMS) + 1 + 2 + 3
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    scored = [json.loads(path.read_text()) for path in cells if path.name.endswith("test.json")]
    assert len(scored) == 2 * len(ARMS) and all(each["images"] == 2 and each["miou"] > 0.4 for each in scored)
    prompted.main(argv)
    assert {path: path.stat().st_mtime_ns for path in cells} == cells and table in capsys.readouterr().out
