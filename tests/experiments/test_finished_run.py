"""A finished run needs its data for what is about them, and for nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.commands import QUICK, TINY, call
from helpers.pages import Reader
from helpers.pictures import folder, roles

import vimoe.analysis.pruning
import vimoe.experiments.finished_run
from vimoe.cli import main
from vimoe.errors import ConfigError, DataError, VimoeError
from vimoe.experiments.finished_run import FinishedRun
from vimoe.moe.routers.softmax import SoftmaxRouter


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos and a run of them."""
    root = tmp_path_factory.mktemp("trained")
    photos = roles(root / "photos", train=4, val=2, test=2)
    train = ["train", "--data.path", str(photos), *TINY, *QUICK, "--train.epochs=1", "--moe.layers=last:1"]
    assert main([*train, "--out", str(root / "run")]) == 0
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(trained, tmp_path / "root"))
    config = root / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(trained), str(root)))
    return root


def test_a_run_predicts_and_scores_other_images_without_its_own(root: Path, tmp_path: Path) -> None:
    run, others = FinishedRun(root / "run"), folder(tmp_path / "others", 2)
    before = run.score(str(others))
    shutil.rmtree(root / "photos")
    again = FinishedRun(root / "run")
    assert again.score(str(others)) == before and before[0] == "all" and before[1].images == 6
    files = sorted(others.rglob("*.png"))
    predictions = again.predict(files, top=2)
    assert [each["file"] for each in predictions] == [str(file) for file in files]
    assert {len(each["classes"]) for each in predictions} == {2}
    with pytest.raises(DataError, match="no such folder"):
        again.score()


def test_a_damaged_image_is_told_before_the_pruning_that_recovers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vimoe.experiments.finished_run, "prune", lambda *_, **__: pytest.fail("it pruned"))
    (root / "photos/train/red/001.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"001\.png"):
        FinishedRun(root / "run").prune(root / "pruned", tolerance=9, recover=1)
    assert not (root / "pruned").exists()


def test_a_receipt_times_a_model_on_the_images_that_it_reports(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[torch.Tensor] = []
    times = lambda models, images: timed.append(images) or [1.0] * len(models)  # noqa: E731
    monkeypatch.setattr(vimoe.analysis.pruning, "images_per_second", times)
    run = FinishedRun(root / "run")
    run.prune(root / "pruned", tolerance=9)
    role, samples = run.reported
    assert role == "test" and torch.equal(timed[0], next(iter(run.task.loader(run.model, run.data, samples)))[0])


def test_the_reported_images_are_test_or_else_validation(root: Path) -> None:
    role, samples = FinishedRun(root / "run").reported
    assert role == "test" and len(samples) == 6
    shutil.rmtree(root / "photos" / "test")
    role, samples = FinishedRun(root / "run").reported
    assert role == "validation" and {Path(image).parts[-3] for image, _ in samples} == {"val"}


def test_a_diagnosis_is_written_printed_and_on_the_page(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = root / "run"
    values = call(capsys, "diagnose", run, "--overrule=5", "--seed=3")
    assert values["images"] == 5 and values["base"]["images"] == 6 and values["findings"]
    assert values["diagnosis"] == str(run / "diagnosis.json") and values["report"] == str(run / "report.html")
    written = json.loads((run / "diagnosis.json").read_text())
    assert written == {key: value for key, value in values.items() if key in written}
    assert set(values) - set(written) == {"schema", "command", "diagnosis", "report"}
    page = Reader(run / "report.html").text
    assert "Diagnosis" in page and "From 5 validation images" in page
    for finding in values["findings"]:
        assert f"{finding['name']}: {finding['says']}" in page and finding["because"] in page
    assert main(["diagnose", str(run)]) == 0
    text = capsys.readouterr().out.splitlines()
    assert any(line.startswith("1. ") for line in text) and text[-1] == str(run / "report.html")


def test_a_diagnosis_reads_the_analysis_of_the_run_unless_it_is_asked_for_draws(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FinishedRun(root / "run")
    analyses: list[int] = []
    real = vimoe.experiments.finished_run.analyze
    monkeypatch.setattr(
        vimoe.experiments.finished_run, "analyze", lambda *args: analyses.append(args[2]) or real(*args)
    )
    first = run.diagnose()
    assert analyses == [20] and (root / "run" / "routing.json").exists()
    evidence = json.loads((root / "run" / "routing.json").read_text())
    again = run.diagnose()
    assert analyses == [20] and again.to_dict() == first.to_dict()
    assert again.to_dict()["layers"][0]["permuted"] == evidence["layers"][0]["permuted"]
    run.diagnose(draws=2)
    assert analyses == [20, 2]


def test_a_diagnosis_of_one_image_is_refused_before_the_analysis(root: Path) -> None:
    with pytest.raises(ConfigError, match="overrule=0"):
        FinishedRun(root / "run").diagnose(overrule=0)
    assert not (root / "run" / "routing.json").exists()


def test_experts_that_cannot_be_left_out_are_told_before_the_analysis(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SoftmaxRouter, "overrulable", False)
    monkeypatch.setattr(FinishedRun, "analyze", lambda *_: pytest.fail("it analysed"))
    with pytest.raises(VimoeError, match="moe.router='softmax': expected routers whose decisions can be overruled"):
        FinishedRun(root / "run").prune(root / "pruned", experts=True)
    assert not (root / "pruned").exists()
