"""The tour runs in its time, and claims only what its seeds support."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.pages import Reader

import vimoe.demo.scenes
from vimoe.cli import main
from vimoe.demo.tour import compare
from vimoe.experiments.finished_run import FinishedRun

Scores = tuple[float, ...]  # of an arm, by seed


def verdict(ours: Scores, control: Scores, comparisons: int = 1) -> str:
    text = compare({"a": ours, "b": control}, "a", "b", comparisons, images=1000, what="top-1")
    return text.rpartition(": ")[2]


def test_a_clear_difference_is_told_and_noise_is_not() -> None:
    control = (0.80, 0.81, 0.79)
    assert verdict((0.90, 0.911, 0.889), control) == "better"
    assert verdict((0.70, 0.711, 0.689), control) == "worse"
    assert verdict((0.84, 0.79, 0.82), control) == "cannot be told apart"


def test_pairs_of_seeds_are_compared_not_means() -> None:
    """The seeds differ more than the arms; each pair differs by the same."""
    text = compare({"a": (0.92, 0.72, 0.822), "b": (0.90, 0.70, 0.80)}, "a", "b", 1, 1000, "mean IoU")
    assert "+2.07 points of mean IoU" in text and text.endswith("better")


def test_more_comparisons_need_a_clearer_difference() -> None:
    ours, control = (0.84, 0.828, 0.832), (0.80, 0.80, 0.80)
    assert [verdict(ours, control, comparisons) for comparisons in (1, 20)] == ["better", "cannot be told apart"]


def test_seeds_that_agree_by_chance_to_an_image_are_not_certain() -> None:
    assert verdict((0.801, 0.801, 0.801), (0.80, 0.80, 0.80)) == "cannot be told apart"


@pytest.mark.slow  # 20 s
def test_the_tour_of_scenes_tells_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, with few scenes and short trainings."""
    short = {"epochs": 1, "warmup_epochs": 0.0, "batch_size": 4}
    for name in ("FIRST", "FURTHER"):
        monkeypatch.setattr(vimoe.demo.scenes, name, replace(getattr(vimoe.demo.scenes, name), **short))
    for name, number in (("TRAIN", 8), ("VAL", 4), ("TEST", 5)):
        monkeypatch.setattr(vimoe.demo.scenes, name, number)
    assert main(["demo", "--task", "segmentation", "--out", str(tmp_path / "demo"), "--json"]) == 0
    check_tour_of_scenes(json.loads(capsys.readouterr().out.splitlines()[-1]), tmp_path / "demo", test=5)


def check_tour_of_scenes(values: dict, folder: Path, test: int) -> None:
    table = values["table"]
    arms = ["dense, continued", "dense, second FFN", "ViMoE, experts of low rank", "ViMoE"]
    assert {name: len(group) for name, group in table.items()} == {"parent": 1, **dict.fromkeys(arms, 3)}
    assert all(one["images"] == test for group in table.values() for one in group)
    dense, *activated, low_rank = (table[arms[i]][0]["activated_params"] for i in (0, 1, 3, 2))
    assert max(activated) < 1.01 * min(activated)  # equal but for the routers
    assert dense < low_rank < dense + 0.2 * (activated[0] - dense)
    assert table["ViMoE"][0]["macs"] < 1.01 * table[arms[1]][0]["macs"]
    assert [line.partition(":")[0] for line in values["comparisons"]] == [f"{a} against {arms[0]}" for a in arms[1:]]
    again = FinishedRun(folder / "vimoe-seed1").score()[1].to_dict()  # the table is of the models in the folders
    assert again.pop("per_class_iou") == table["ViMoE"][1]["per_class_iou"]
    assert again == pytest.approx({key: table["ViMoE"][1][key] for key in again})
    read = Reader(Path(values["report"]))
    page = read.text
    assert all(name in page for name in table) and all(each.startswith(("data:", "#")) for each in read.loaded)
    assert f"{values['patch_ceiling']:.2%}" in page and "background" in page and "says nothing about ViMoE" in page
    assert "Which class goes to which expert" in page and "Does the routing matter?" in page
    assert len(values["routing"]) == 6 and all(line in page for line in values["routing"])
    routing = [json.loads((folder / f"vimoe-seed{seed}/routing.json").read_text()) for seed in range(3)]
    assert all(len(each["layers"]) == 2 and each["layers"][0]["experts"] for each in routing)
    assert (folder / "figures/heatmaps.png").exists() and (folder / "figures/effects.png").exists()
    assert (folder / "figures/expert-maps.png").exists() and (folder / "scenes/classes.yaml").exists()


@pytest.mark.slow
def test_the_tour_takes_at_most_five_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    assert main(["demo", "--out", str(tmp_path / "demo"), "--json"]) == 0
    assert time.perf_counter() - start < 300
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    table = values["table"]
    assert {name: len(group) for name, group in table.items()}.pop("parent") == 1
    assert all(len(group) == 3 for name, group in table.items() if name != "parent")
    activated = [
        table[name][0]["activated_params"] for name in ("dense, second FFN", "ViMoE", "ViMoE, no shared expert")
    ]
    assert max(activated) < 1.01 * min(activated)  # equal but for the routers
    read = Reader(Path(values["report"]))
    assert all(name in read.text for name in table) and all(each.startswith(("data:", "#")) for each in read.loaded)


@pytest.mark.slow
def test_the_tour_of_scenes_takes_at_most_five_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    assert main(["demo", "--task", "segmentation", "--out", str(tmp_path / "demo"), "--json"]) == 0
    assert time.perf_counter() - start < 300
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    check_tour_of_scenes(values, tmp_path / "demo", vimoe.demo.scenes.TEST)
