"""The study of prompted segmentation: its scores are a segmenter's, decoders learn, cells are not run again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import prompted
import pytest
import torch
from helpers.scenery import scenes
from helpers.tiny import randomise, vit

import vimoe
from vimoe.config.data import DataConfig
from vimoe.data.loaders import preprocessing
from vimoe.data.scenes import load_scenes
from vimoe.models.segmenter import Segmenter

ARMS = ["linear", "MLP + hierarchical", "MLP + hierarchical, drawn"]
ON_CLIPS = ["clips", "tracked"]


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


def test_clips_are_successive_frames_of_one_video(tmp_path: Path) -> None:
    names = ["b_3", "a_1", "b_1", "a_2", "b_2", "a_3", "a_4", "c_1"]
    found = prompted.videos([(tmp_path / f"{name}.png", tmp_path / "mask.png") for name in names])
    assert [[names[number] for number in video] for video in found] == [
        ["a_1", "a_2", "a_3", "a_4"], ["b_1", "b_2", "b_3"], ["c_1"],
    ]  # fmt: skip
    clips = prompted.Features({}, [], torch.empty(0), found).clips
    assert [[names[number] for number in clip] for clip in clips.tolist()] == [
        ["a_1", "a_2", "a_3"], ["a_2", "a_3", "a_4"], ["b_1", "b_2", "b_3"],
    ]  # fmt: skip


@torch.no_grad()
def test_scores_of_a_video_are_those_of_a_segmenter_that_tracks(model: Path, tmp_path: Path) -> None:
    data = load_scenes(DataConfig(path=str(scenes(tmp_path, train=3)), task="segmentation"))
    whole = Segmenter(vimoe.load(model), 3, "prompted", crop=(24, 32), decoder_args={"prompt_track": True}).eval()
    whole.decoder = decoder = randomise(prompted.new_decoder("tracked", 24, 4, 3, seed=0), scale=0.3).eval()
    found = prompted.features(whole, data.train, data, whole.read_blocks)
    mean, std = (torch.tensor(preprocessing(whole)[key])[:, None, None] for key in ("mean", "std"))
    frames = [
        ((prompted.pil_to_tensor(prompted.open_image(image)) / 255 - mean) / std)[None] for image, _ in data.train
    ]
    expected = [*whole.track(frames)]
    got = prompted.scores_of_clips(decoder, found, torch.tensor([[0, 1, 2]]), (24, 32))
    for each, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(each, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))  # of float16
    counts = prompted.SceneCounts(3)
    for scores, (_, mask) in zip(expected, data.train, strict=True):
        counts.add(scores, torch.from_numpy(prompted.np.array(data.legend.read(mask))).long()[None])
    score = prompted.score(decoder, replace(found, videos=[[0, 1, 2]]), prompted.SceneCounts(3))
    assert score["miou"] == pytest.approx(counts.score().to_dict()["miou"], abs=0.02)


def test_the_tracker_alone_has_its_part_of_the_rate() -> None:
    for arm, count in (("clips", 1), ("tracked, a tenth", 2)):
        decoder = prompted.new_decoder(arm, 24, 4, 3, 0)
        found = prompted.groups(decoder, 1e-2, prompted.OF_TRACKER[arm])
        assert len(found) == count and found[0]["lr"] == 1e-2
        params = [id(p) for group in found for p in group["params"]]
        assert sorted(params) == sorted(map(id, decoder.parameters()))
    assert found[1]["lr"] == pytest.approx(1e-3)
    assert {id(p) for p in found[1]["params"]} == {id(p) for p in decoder.tracker.parameters()}


@pytest.mark.slow  # 7 s
def test_decoders_learn_and_cells_are_not_run_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = scenes(tmp_path / "data", train=12, val=4, test=4)
    argv = ["--model", f"local-dir:{model}", "--data", str(data), "--out", str(tmp_path / "out"), "--size", "24", "32"]
    argv += ["--arms", *ARMS, *ON_CLIPS, "--control", "linear", "--seeds", "2", "--every", "2", "--steps", "60"]
    prompted.main(argv)
    first = capsys.readouterr().out
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in first and table.count("\n") == 2 + len(ARMS) + 2 + 1 + 2 + 3
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    scored = [json.loads(path.read_text()) for path in cells if path.name.endswith("test.json")]
    assert len(scored) == 2 * (len(ARMS) + 2) and all(each["images"] == 2 and each["miou"] > 0.4 for each in scored)
    prompted.main(argv)
    assert {path: path.stat().st_mtime_ns for path in cells} == cells and table in capsys.readouterr().out
