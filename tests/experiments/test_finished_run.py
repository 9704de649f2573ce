"""A finished run needs its data for what is about them, and for nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.commands import QUICK, TINY, call
from helpers.pages import Reader
from helpers.pictures import folder, roles
from torch.nn.functional import cross_entropy

import vimoe.analysis.pruning
import vimoe.experiments.finished_run
from vimoe.analysis.trust import Trust, see
from vimoe.cli import main
from vimoe.errors import ConfigError, DataError, VimoeError
from vimoe.experiments.finished_run import FinishedRun
from vimoe.metrics.calibration import KeptLogits, fit_temperature
from vimoe.moe.routers.softmax import SoftmaxRouter
from vimoe.tasks.segmentation import Segmentation


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


def test_a_run_predicts_and_scores_other_images_without_its_own(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, others = FinishedRun(root / "run"), folder(tmp_path / "others", 2)
    before = run.score(str(others))
    shutil.rmtree(root / "photos")
    again = FinishedRun(root / "run")
    assert before[0] == "all" and before[1].images == 6 and "temperature" in before[2]
    with caplog.at_level("INFO", "vimoe"):
        assert again.score(str(others)) == (*before[:2], {})
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("without a temperature, which the run's own validation decides: ") and "\n" not in line
    files = sorted(others.rglob("*.png"))
    predictions = again.predict(files, top=2)
    assert [each["file"] for each in predictions] == [str(file) for file in files]
    assert {len(each["classes"]) for each in predictions} == {2}
    with pytest.raises(DataError, match="no such folder"):
        again.score()


def logits_of(run: FinishedRun, samples: Sequence[object]) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [(run.model.eval()(x), y) for x, y in run.task.loader(run.model, run.data, samples)]
    return torch.cat([z.detach() for z, _ in batches]), torch.cat([y for _, y in batches])


def test_the_temperature_is_fitted_on_validation_and_tried_on_what_is_scored(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = folder(tmp_path / "others", 2)
    values, elsewhere = (
        call(capsys, "evaluate", root / "run"),
        call(capsys, "evaluate", root / "run", "--data.path", others),
    )
    run = FinishedRun(root / "run")
    fitted = fit_temperature(*logits_of(run, run.data.val))
    assert values["temperature"] == elsewhere["temperature"] == pytest.approx(fitted, rel=1e-4)
    logits, labels = logits_of(run, run.data.test)
    assert fit_temperature(logits, labels) != pytest.approx(fitted, rel=1e-2)
    at = [float(cross_entropy(logits / T, labels)) for T in (1, fitted)]
    assert [values["loss"], values["loss_at_temperature"]] == pytest.approx(at, rel=1e-4) and at[0] != at[1]
    assert elsewhere["loss_at_temperature"] not in (values["loss_at_temperature"], elsewhere["loss"])
    assert 0 <= values["ece_at_temperature"] <= 1 and values["ece_at_temperature"] != values["ece"] > 0
    assert main(["evaluate", str(root / "run")]) == 0
    said = f"; at temperature {values['temperature']:.3f}, fitted on validation: loss {at[1]:.4f}, calibration error "
    assert said in capsys.readouterr().out


def test_a_validation_without_a_mistake_decides_no_temperature(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(KeptLogits, "temperature", lambda _kept: None)
    with caplog.at_level("INFO", "vimoe"):
        _, _, facts = FinishedRun(root / "run").score()
    assert "all validation images are right" in caplog.text
    assert not {"temperature", "loss_at_temperature"} & facts.keys()


def test_without_test_images_validation_is_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(root / "photos" / "test")
    run, read = FinishedRun(root / "run"), list[str]()
    real = run.task.evaluate
    monkeypatch.setattr(run.task, "evaluate", lambda *args: read.append(args[2]) or real(*args))
    split, score, facts = run.score()
    assert (split, read) == ("validation", ["evaluating"])
    assert facts["loss_at_temperature"] < score.to_dict()["loss"]  # it is the lowest on these


def test_a_damaged_validation_image_is_told_by_a_score_of_test_and_not_of_other_images(root: Path) -> None:
    next((root / "photos" / "val").rglob("*.png")).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"\.png cannot be read as an image"):
        FinishedRun(root / "run").score()
    assert FinishedRun(root / "run").score(str(root / "photos" / "test"))[2] == {}


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


def test_trust_is_fitted_once_and_predict_gives_its_scores(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((root / "photos" / "test").rglob("*.png"))
    before = call(capsys, "predict", root / "run", *files)["predictions"]
    assert all(set(each) == {"file", "classes"} for each in before)
    facts = call(capsys, "trust", root / "run")
    assert json.loads((root / "run" / "trust.json").read_text()) == facts
    run = FinishedRun(root / "run")
    assert (facts["train_images"], facts["validation_images"]) == (len(run.data.train), len(run.data.val))
    after = call(capsys, "predict", root / "run", *files)["predictions"]
    assert [{name: each[name] for name in ("file", "classes")} for each in after] == before
    fitted = Trust.load(root / "run" / "trust.safetensors")
    seen = see(run.model, run.task.loader(run.model, run.data, [(file, 0) for file in files]))
    expected = fitted.of(seen.logits, seen.features)
    for each, scores in zip(after, expected, strict=True):
        assert {name: each[name] for name in scores} == pytest.approx(scores, abs=1e-4)
    assert main(["predict", str(root / "run"), str(files[0])]) == 0
    assert "; familiarity " in capsys.readouterr().out


def test_trust_needs_images_of_one_class(root: Path) -> None:
    run = FinishedRun(root / "run")
    run.task.trusts = False
    with pytest.raises(ConfigError, match="a run of data.task='classification': expected"):
        run.trust()
    assert not Segmentation.trusts
