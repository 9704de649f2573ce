"""The study of tasks one after the other: what a cell keeps, and that its tables are those of its results."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import continual_tasks as study
import pytest
from helpers.pictures import COLOURS, picture

import vimoe.cli
from vimoe.study.report import put_between_marks

TINY = {
    "model.pretrained": "false", "model.img_size": 16,
    "model.args": '{"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}',
    "moe.layers": "last:1", "moe.num_experts": 3, "data.workers": 0, "data.val_fraction": 0.3, "train.epochs": 1,
    "train.warmup_epochs": 0, "train.batch_size": 4, "train.tensorboard": "false",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study without results, whose trainings are small and in this process."""
    monkeypatch.setattr(study, "FOLDER", tmp_path / "study")
    monkeypatch.setattr(study, "SHARED", TINY)
    monkeypatch.setattr(study, "RENDERINGS", "light+dark")
    monkeypatch.setitem(study.TASKS, "renderings", {"data.tasks": "splits", "data.train_split": "light+dark"})

    def run(words: list[str], **given: object) -> None:
        assert vimoe.cli.main(words[3:]) == 0

    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "study" / "results").mkdir(parents=True)
    (tmp_path / "study" / "README.md").write_text("before\n<!-- the table begins -->\n<!-- the table ends -->\nafter\n")
    return tmp_path / "study"


def test_arms_are_trained_and_stand_in_the_table(folder: Path, tmp_path: Path) -> None:
    for split, factor in (("light", 1), ("dark", 4)):
        for name, colour in COLOURS.items():
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(7):
                image = picture(colour, seed=i).point(lambda pixel, factor=factor: pixel // factor)
                image.save(tmp_path / "photos" / split / name / f"{i}.png")
    for arm in ("mixture", "joint mixture", "joint dense"):
        study.run_one("renderings", arm, 3, tmp_path / "photos", "vit_tiny_patch16_224")
    files = sorted(folder.glob("results/*.json"))
    assert [file.name for file in files] == [
        "renderings.joint-dense.seed3.json", "renderings.joint-mixture.seed3.json", "renderings.mixture.seed3.json"
    ]  # fmt: skip
    joint, mixture = (json.loads(file.read_text()) for file in files[1:])
    assert len(mixture["own"]["accuracy"]) == 2 and list(mixture["lift"]) == ["blocks.2.mlp"]
    assert list(joint["own"]) == ["mean"] and "data.tasks" not in joint["options"]
    assert joint["own"]["mean"] > 0.3 and 0 <= mixture["own"]["mean"] <= 1
    assert all(str(tmp_path) not in file.read_text() for file in files)
    study.report()
    text = (folder / "README.md").read_text()
    assert f"| joint mixture |  | {100 * joint['own']['mean']:.1f} |  |  |" in text and "seen" not in text


def test_a_table_has_means_and_paired_differences(folder: Path) -> None:
    for seed, (own, other) in enumerate([(0.5, 0.4), (0.7, 0.62)]):
        for arm, value in (("mixture", own), ("locality loss", other)):
            found = {"mean": value, "forgetting": 0.1, "accuracy": [[value], [0.0, 0.9]]}
            lift = {"blocks.0.mlp": [[0.5, -0.2], [-0.4, 0.5]]}
            result = {"seed": seed, "own": found, "seen": {"mean": 0.1, "forgetting": 0.9}, "lift": lift}
            study.result_of("classes", arm, seed).write_text(json.dumps(result))
    text = study.table("classes")
    assert "| mixture | 75.0 | 60.0 | 10.0 | 10.0 | 90.0 | -0.30 |" in text
    assert (
        "| locality loss | -4.5 [-10.9, +1.9] | -9.0 [-21.7, +3.7] | +0.0 [+0.0, +0.0] |" in text
    )  # t of 1 degree of freedom


def test_the_tables_on_the_page_are_those_of_the_results(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text((study.FOLDER / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    there = [tasks for tasks in study.TASKS if list(study.FOLDER.glob(f"results/{tasks}.mixture.*.json"))]
    assert there, "no results"
    put_between_marks(page, "\n\n".join(map(study.table, there)))
    assert page.read_text(encoding="utf-8") == (study.FOLDER / "README.md").read_text(encoding="utf-8")
