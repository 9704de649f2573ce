"""The verb of studies: from a first study.yaml to answers, workers as processes, jobs of a cluster, mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.pictures import folder
from helpers.studies import TINY, put, write_study

import vimoe
from vimoe.cli import main
from vimoe.config.yaml_reader import read_yaml, write_yaml
from vimoe.study.one_cell import claim
from vimoe.study.plan import Study
from vimoe.study.work import Work

TINY_VIT = [
    "--model.name=vit_tiny_patch16_224", "--model.pretrained=false", "--model.img_size=16",
    "--model.args={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
]  # fmt: skip
NEW = [*TINY_VIT, "--moe.layers=last:1", "--train.epochs=1", "--train.batch_size=8", "--data.workers=0"]


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    assert main(["study", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["study", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and not printed.out
    return printed.err


def test_a_first_study_compares_the_vimoe_with_its_dense_vit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    photos = tmp_path / "my photos"
    photos.mkdir()
    argv = ["--data.path", f"{photos}/", *NEW, "--train.lr=3.5e-4"]
    path = answer(capsys, str(tmp_path / "mine"), "--new", *argv)["study"]
    assert path == str(tmp_path / "mine" / "study.yaml")
    written = read_yaml(Path(path).read_text("utf-8"))
    assert written["paths"] == {"DATA": str(photos)} and list(written["data"]) == ["my-photos"]
    assert written["data"]["my-photos"] == {"data": {"path": "${DATA}", "workers": 0}}
    assert written["search"]["rates"] == [1e-4, 3.5e-4, 1e-3]
    assert written["base"]["train"] == {"epochs": 1, "batch_size": 8} and written["base"]["model"]["img_size"] == 16
    moe = {arm: of["moe"] for arm, of in written["arms"].items()}
    assert moe["dense"] == {"layers": "none"} and moe["vimoe"] == {"layers": "last:1"}
    dense, wide = (Study(tmp_path / "mine").contrasts[f"beats-{arm}"] for arm in ("dense", "dense-wide"))
    assert (dense.of, dense.against, wide.against) == ("vimoe", "dense", "dense-wide")


def test_a_first_study_takes_a_preset_and_trains_the_same_ffns_in_every_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("photos", "dinov2"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "frozen-trunk", "--data.path", "photos", "--model.name", "local-dir:dinov2"]
    written = read_yaml(Path(answer(capsys, str(tmp_path), "--new", *argv)["study"]).read_text("utf-8"))
    assert written["paths"] == {"DATA": str(tmp_path / "photos"), "MODEL": str(tmp_path / "dinov2")}
    assert written["base"]["model"]["name"] == "local-dir:${MODEL}"
    assert written["base"]["train"]["train_only"] == "last:2" and "lr" not in written["base"]["train"]
    assert written["arms"]["vimoe"]["moe"] == {"layers": "last:2", "expert_dropout": 0.1}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--moe.layers=none", "--data.path=digits"], "moe.layers='none' with --new"),
        (["--train.seed=1", "--data.path=digits"], "train.seed with --new"), ([], "--new needs data.path"),
        (["--data.path=digits", "--train.epoch=3"], "did you mean '--train.epochs'"),
        (["--data.path=p"], "data.path='p': no such folder"),
        (["--data.path=digits", "--dry_run"], "--dry_run with --new: expected one of both"),
    ],
)  # fmt: skip
def test_settings_that_are_no_study_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], message: str
) -> None:
    assert message in refused(capsys, str(tmp_path / "mine"), "--new", *more)
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("more", "width"),
    [
        ([], 2), (["--moe.top_k=3", "--moe.num_experts=8"], 4), (["--moe.num_shared_experts=0", "--moe.top_k=2"], 2),
        (["--moe.experts=lora", "--moe.rank=4"], 1), (["--moe.router=soft", "--moe.routing=token"], 1),
        (["--moe.num_shared_experts=0", "--moe.top_k=1"], 1),
    ],
)  # fmt: skip
def test_the_wide_dense_arm_activates_as_much_as_the_vimoe_or_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], width: int
) -> None:
    answer(capsys, str(tmp_path), "--new", "--data.path=digits", *NEW, *more)
    study = Study(tmp_path)
    assert list(study.arms) == (["dense", "dense-wide", "vimoe"] if width > 1 else ["dense", "vimoe"])
    if width > 1:
        params = []
        for arm in ("dense-wide", "vimoe"):
            cell = study.final_cells("digits", arm, study.rates[0])[0]
            (tmp_path / "cell.yaml").write_text(write_yaml({s: cell.settings[s] for s in ("model", "moe")}))
            assert main(["count", "--config", str(tmp_path / "cell.yaml"), "--json"]) == 0
            params.append(json.loads(capsys.readouterr().out.splitlines()[-1])["moe"]["activated_params"])
        assert params[0] == pytest.approx(params[1], rel=0.01)  # but for the router


def test_a_study_that_is_there_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_study(tmp_path)
    before = (tmp_path / "study.yaml").read_bytes()
    assert "study.yaml is there" in refused(capsys, str(tmp_path), "--new", "--data.path=digits")
    assert (tmp_path / "study.yaml").read_bytes() == before


@pytest.mark.slow  # 2 min: 9 cells, each in a process of its own
def test_from_a_folder_of_images_to_an_answer(tmp_path: Path) -> None:
    """As a user does it, in a folder that has one named vimoe, which is not the package."""
    (tmp_path / "vimoe").mkdir()
    for split, images in (("train", 12), ("test", 4)):
        folder(tmp_path / "photos" / split, images, seed=images)
    command = [sys.executable, "-m", "vimoe", "study", "mine"]
    environment = {**os.environ, "PYTHONPATH": str(Path(vimoe.__file__).parents[1])}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )

    run("--new", "--data.path", "photos", *NEW, "--data.val_fraction=0.34")
    text = (tmp_path / "mine" / "study.yaml").read_text("utf-8")
    seeds = "seeds:\n- 0\n- 1\n- 2\n- 3\n- 4\n"
    assert seeds in text
    text = text.replace(seeds, "seeds: [0, 1]\n").replace("  - 0.0001\n", "").replace("  - 0.0009\n", "")
    (tmp_path / "mine" / "study.yaml").write_text(text, encoding="utf-8")
    done = run("--workers", "2", "--json")
    values = json.loads(done.stdout.splitlines()[-1])
    assert "6 of 6 cells" in done.stderr
    (first, second) = values["contrasts"]["photos"]
    assert first["contrast"] == "beats-dense" and first["difference"]["n"] == second["difference"]["n"] == 2
    page = (tmp_path / "mine" / "README.md").read_text("utf-8")
    assert (
        "0 cells of the search, 6 of 6 cells at the chosen rates." in page and "| beats-dense | vimoe | dense |" in page
    )
    assert "beats-dense: vimoe against dense: " in run("--report").stdout
    assert not [path for path in (tmp_path / "mine" / "runs").iterdir() if path.suffix != ".lock"]


def test_a_dry_run_lists_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_study(tmp_path)
    argv = [str(tmp_path), "--set", "DIGITS=digits", "--runs", str(tmp_path / "runs"), "--dry_run", "--arms", "vimoe"]
    assert main(["study", *argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == sorted(cell.name for cell in made.search_cells("digits", "vimoe"))
    assert lines[4] == "and 2 cells at the rates that the search will choose; 0 of 6 cells"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "dens"], "--arms dens: "), (["--set", "DIGITS"], "--set DIGITS: expected NAME=VALUE"),
        (["--cell", "digits.dense"], "--cell digits.dense: "), (["--workers", "0"], "--workers 0: expected at least 1"),
        (["--slurm", "name=[a", "--dry_run"], "--slurm name=[a: "), (["--datasets", "birds"], "--datasets birds: "),
        (["--cell", "digits.dense.lr0.001.search10", "--dry_run"], "--dry_run with --cell: expected one of both"),
        (["--key", "k"], "--key without --cell"), (["--report", "--arms", "dense"], "with --report: expected one of"),
        (["--slur", "a=1"], "unknown option --slur"),  # which a job would keep, and submit jobs in turn
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    write_study(tmp_path)
    assert message in refused(capsys, str(tmp_path), "--set", "DIGITS=digits", *more)


def test_a_page_without_marks_is_refused_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path)
    (tmp_path / "README.md").write_text("My notes.")
    assert "README.md has no marks" in refused(capsys, str(tmp_path), "--set", "DIGITS=digits")


def test_data_without_test_images_are_told_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = folder(tmp_path / "photos", 6)
    base = {**TINY["base"], "data": {"workers": 0, "val_fraction": 0.34}}
    write_study(tmp_path, base=base)
    assert "study.yaml: digits, dense: no test images: expected some" in refused(
        capsys, str(tmp_path), "--set", f"DIGITS={photos}"
    )
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_an_arm_that_cannot_be_trained_is_told_before_those_that_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """The cells of deep arms come last: a registered study once had such arms for days, and nobody knew."""
    base = {**TINY["base"], "train": {**TINY["base"]["train"], "train_only": "last:1"}}
    deep = {"moe": {"layers": "last:2"}, "data": {"cache": "features"}, "train": {"train_only": "last:2"}}
    write_study(tmp_path, base=base, arms={**TINY["arms"], "deep": deep})
    said = refused(capsys, str(tmp_path), "--set", "DIGITS=digits", *more)
    assert "study.yaml: digits, deep: data.cache='features': blocks.0.mlp is in the first block and trained" in said
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_the_page_keeps_the_data_sets_that_were_not_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {**TINY["data"], "other": {"data": {"path": "${DIGITS}", "images_per_class": 6}}}
    made = write_study(tmp_path, data=data)
    work = Work(made, ["DIGITS=digits"], tmp_path / "runs", lambda *_: {})
    for name in data:
        for arm in made.arms:
            for cell in (*made.search_cells(name, arm), *made.final_cells(name, arm, 1e-3)):
                put(made, cell, 0.5, key=work.keys[cell.fingerprint][0])
    answer(capsys, str(tmp_path), "--report")
    page = (tmp_path / "README.md").read_bytes()
    assert answer(capsys, str(tmp_path), "--set", "DIGITS=digits", "--datasets", "other")["cells"] == 12
    assert (tmp_path / "README.md").read_bytes() == page


def test_a_report_needs_no_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_study(tmp_path)
    put(made, made.search_cells("digits", "dense")[0], 0.5)
    (tmp_path / "README.md").unlink()
    found = answer(capsys, str(tmp_path), "--report")
    assert [each["verdict"] for each in found["contrasts"]["digits"]] == ["not yet", "not yet"]
    assert "1 cells of the search, 0 of 4 cells" in Path(found["report"]).read_text("utf-8")


def test_answers_are_printed_and_are_plain_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_study(tmp_path)
    for arm in made.arms:
        for cell in made.search_cells("digits", arm):
            put(made, cell, 0.5)
        put(made, made.final_cells("digits", arm, 1e-3)[0], {"dense": 0.5, "vimoe": 0.53}[arm])
    one = answer(capsys, str(tmp_path), "--report")["contrasts"]["digits"][0]
    assert one["difference"] == {"value": pytest.approx(3), "low": None, "high": None, "n": 1}
    for arm in made.arms:
        put(made, made.final_cells("digits", arm, 1e-3)[1], {"dense": 0.52, "vimoe": 0.56}[arm])
    assert main(["study", str(tmp_path), "--report"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "digits: C: vimoe against dense: +3.50 [-9.23, +16.23] points, 2 seeds: not decided"


def test_a_cell_that_another_process_has_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_study(tmp_path)
    argv = [str(tmp_path), "--set", "DIGITS=digits", "--runs", str(tmp_path / "runs")]
    cell = made.search_cells("digits", "dense")[0]
    work = Work(made, ["DIGITS=digits"], tmp_path / "runs", lambda *given: pytest.fail("computed"))
    with claim(tmp_path / "runs", cell, work.keys[cell.fingerprint][0]):
        assert answer(capsys, *argv, "--cell", cell.name)["done"] is False


def test_what_has_changed_since_the_workers_began_is_not_computed_under_another_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = write_study(tmp_path).search_cells("digits", "dense")[0]
    argv = [str(tmp_path), "--set", "DIGITS=digits", "--cell", cell.name, "--key", "older"]
    assert "vimoe's code have changed since the workers began" in refused(capsys, *argv)
    assert not (tmp_path / "results").exists()


def test_a_dry_run_of_slurm_prints_the_jobs_and_needs_no_submitit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    write_study(tmp_path)
    options = ["--workers", "2", "--datasets", "digits", "--slurm", "timeout_min=240", "slurm_partition=gpu"]
    argv = [str(tmp_path), "--set", "DIGITS=digits", "--arms", "vimoe", "--runs", "runs", *options]
    assert main(["study", *argv, "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("job 1 of 2 with {'timeout_min': 240, 'slurm_partition': 'gpu'}: ")
    worker = f"-m vimoe study {tmp_path} --runs runs --set DIGITS=digits --datasets digits --arms vimoe"
    assert lines[0].endswith(worker)
    assert "pip install submitit" in refused(capsys, *argv)
