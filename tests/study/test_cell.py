"""A cell on digits: what it holds, and that a kill costs nothing of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.kills import Killed
from helpers.kills import kill_after as kill_after
from helpers.pictures import folder
from helpers.scenery import scenes
from helpers.studies import TINY, put, write_study

from vimoe.errors import DataError, VimoeError
from vimoe.study import one_cell
from vimoe.study.one_cell import Environment, claim, compute, file_of
from vimoe.study.plan import Cell, Study
from vimoe.study.work import macs
from vimoe.verbs import VERBS

VALUES, INPUTS = {"DIGITS": "digits"}, {"DIGITS": "d", "OTHER": "o"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def verb(name: str, *argv: str) -> dict:
    return VERBS[name]([*argv])[1]


def run(study: Study, cell: Cell, keep: bool = False, values: dict[str, str] = VALUES) -> bool:
    environment = Environment(
        values=values, inputs=INPUTS, code=dict.fromkeys((False, True), "c"), runs=study.folder / "runs", verb=verb,
        keep=keep,
    )  # fmt: skip
    return compute(study, cell, "k", environment)


def result(study: Study, cell: Cell) -> dict:
    return json.loads(file_of(study, cell, "k").read_text("utf-8"))


def test_a_cell_of_the_search_never_sees_test(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    cell = study.search_cells("digits", "vimoe")[0]
    assert run(study, cell)
    found = result(study, cell)
    assert found["val"]["images"] == 359 and "test" not in found and found["analysis"] is None and not found["after"]
    assert found["inputs"] == {"DIGITS": "d"} and found["rate"] == 1e-3 and found["settings"] == cell.settings
    assert found["seconds"]["cell"] > 0 and found["precision"] == "no"


def test_a_cell_has_the_analysis_and_the_score_after_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vimoe.analysis.pruning._TIMED_SECONDS", 0.1)
    monkeypatch.setattr("vimoe.verbs.analyze.DRAWS", 4)
    study = write_study(tmp_path)
    cell = study.final_cells("digits", "vimoe", 1e-3)[0]
    assert run(study, cell)
    found = result(study, cell)
    (layer,) = found["analysis"]["layers"]
    assert {"adjusted_mutual_information", "permuted", "dense"} <= set(layer) and "shared" in layer["dense"]
    assert found["analysis"]["routes"]["possible"] == 4
    merged = found["after"]["merge_all"]
    assert merged["test"]["images"] == found["test"]["images"] == 719 and not merged["kept"]
    assert [step["how"] for step in merged["steps"]] == ["merge"]
    assert merged["after"]["macs"] < found["cost"]["macs"]
    left = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert left == [f"{cell.name}.k.lock"]  # the run folders are gone


def test_a_killed_cell_does_not_exist_and_goes_on_to_the_same_score(tmp_path: Path, kill_after: object) -> None:
    base = {**TINY["base"], "train": {"epochs": 2, "batch_size": 32, "precision": "no"}}
    (tmp_path / "whole").mkdir()
    whole, study = write_study(tmp_path / "whole", base=base), write_study(tmp_path, base=base)
    cell = study.final_cells("digits", "dense", 1e-3)[0]
    assert run(whole, cell)
    kill_after(4)  # of 6 steps, in the second epoch
    with pytest.raises(Killed):
        run(study, cell)
    assert not list(study.results.iterdir())
    kill_after(3)  # of those that are left, so that a training from the beginning would be killed again
    assert run(study, cell, keep=True)
    assert result(study, cell)["test"] == result(whole, cell)["test"]
    assert result(study, cell)["val"] == result(whole, cell)["val"]
    assert (tmp_path / "runs" / f"{cell.name}.k" / "summary.json").exists()  # kept


def test_a_cell_that_is_claimed_or_there_is_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = write_study(tmp_path)
    cell = study.search_cells("digits", "dense")[0]
    monkeypatch.setattr(one_cell, "_measured", lambda *args: pytest.fail("computed"))
    with claim(tmp_path / "runs", cell, "k"):
        assert not run(study, cell)
    study.results.mkdir()
    file_of(study, cell, "k").write_text("{}")
    assert run(study, cell)


def test_a_result_of_other_code_is_set_aside_by_the_new_one(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    cell, other = study.search_cells("digits", "dense")[:2]
    older, left = put(study, cell, 0.5, key="older"), put(study, other, 0.5, key="older")
    assert run(study, cell)
    assert sorted(study.results.glob("*.json")) == sorted([file_of(study, cell, "k"), left])
    assert (study.results / "older" / older.name).exists()


def test_what_fails_leaves_no_cell(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    cell = study.search_cells("digits", "dense")[0]
    with pytest.raises(VimoeError, match="nowhere"):
        run(study, cell, values={"DIGITS": str(tmp_path / "nowhere")})
    assert not list(study.results.iterdir())


def test_a_path_that_looks_like_a_number_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "12e4" / "train", 6)
    folder(tmp_path / "12e4" / "test", 2, seed=1)
    monkeypatch.chdir(tmp_path)
    study = write_study(tmp_path, base={**TINY["base"], "data": {"workers": 0, "val_fraction": 0.34}})
    cell = study.search_cells("digits", "dense")[0]
    assert run(study, cell, values={"DIGITS": "12e4"})
    assert result(study, cell)["val"]["images"] == 6


def test_data_without_test_images_are_refused_by_the_first_cell(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", 6)
    study = write_study(tmp_path, base={**TINY["base"], "data": {"workers": 0, "val_fraction": 0.34}})
    cell = study.search_cells("digits", "dense")[0]  # told before the search is whole
    with pytest.raises(DataError, match=r"no test images: expected some.*data\.test_split") as said:
        run(study, cell, values={"DIGITS": str(photos)})
    assert "\n" not in str(said.value) and not list(study.results.iterdir())


def test_macs_are_of_the_model_that_the_settings_name(tmp_path: Path) -> None:
    model = {**TINY["base"]["model"], "name": "${MODEL}"}
    cell = write_study(tmp_path, base={**TINY["base"], "model": model}).final_cells("digits", "dense", 1e-3)[0]
    assert macs(cell, {"MODEL": "vit_tiny_patch16_224", "DIGITS": "digits"}, verb) > 0
    with pytest.raises(VimoeError, match="12e4"):
        macs(cell, {"MODEL": "12e4", "DIGITS": "digits"}, verb)


@pytest.mark.slow  # 6 s
def test_a_cell_of_scenes_has_its_metric_and_its_cost_is_that_of_the_vit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vimoe.analysis.pruning._TIMED_SECONDS", 0.1)
    monkeypatch.setattr("vimoe.verbs.analyze.DRAWS", 4)
    scenes(tmp_path / "scenes", height=24, width=40)
    base = {
        "model": {**TINY["base"]["model"], "decoder": "linear"},
        "data": {"task": "segmentation", "cache": "features", "views": 1, "workers": 0},
        "train": {"train_only": "last:1", "epochs": 1, "batch_size": 2, "precision": "no"},
    }
    token = {"moe": {"layers": "last:1", "num_experts": 4, "routing": "token"}, "after": ["analyze", "merge_all"]}
    arms = {**TINY["arms"], "vimoe": token}
    study = write_study(tmp_path, base=base, arms=arms, data={"digits": {"data": {"path": str(tmp_path / "scenes")}}})
    cell = study.final_cells("digits", "vimoe", 1e-3)[0]
    assert macs(cell, {}, verb) > macs(study.final_cells("digits", "dense", 1e-3)[0], {}, verb) > 0
    assert run(study, cell, values={})
    found = result(study, cell)
    assert found["val"]["miou"] >= 0 and found["test"]["images"] == 2 and found["features"]["views"] == 1
    assert found["after"]["merge_all"]["test"]["pixels"] == found["test"]["pixels"]
