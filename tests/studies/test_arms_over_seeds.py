"""The table of a study from its results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import arms_over_seeds
import pytest

from vimoe.errors import FolderError
from vimoe.study.report import BEGIN, END


def result(arm: str, seed: int, miou: float, ious: tuple[float | None, ...] = (0.5, None)) -> dict:
    return {
        "arm": arm, "seed": seed, "classes": ["sky", "car"], "versions": {"torch": "2", "timm": "1"},
        "test": {"miou": miou, "loss": 1.0, "images": 9, "per_class_iou": list(ious)},
        "val": {"miou": miou + 0.1}, "patch_ceiling": 0.7, "settings": "a",
        "cost": {"activated_params": 2e6, "macs": 3e8},
    }  # fmt: skip


def test_a_paired_difference_of_a_hand_computed_case() -> None:
    # differences 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.3027, half = 4.3027 / sqrt(3) = 2.484
    assert arms_over_seeds.difference([1.0, 2.0, 3.0], comparisons=1) == "+2.00 [-0.48, +4.48]"
    assert arms_over_seeds.difference([1.0, 2.0, 3.0], comparisons=2) == "+2.00 [-1.58, +5.58]"
    assert arms_over_seeds.difference([1.0], comparisons=1) == "too few seeds"


def test_the_table_stands_between_its_marks_and_pairs_by_seed(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(f"Before.\n{BEGIN}\nold\n{END}\nAfter.\n")
    scores = {("dense", 0): 0.30, ("dense", 1): 0.40, ("vimoe", 1): 0.42, ("vimoe", 0): 0.31, ("vimoe", 2): 0.90}
    for (arm, seed), miou in scores.items():
        (tmp_path / "results" / f"{arm}-seed{seed}.json").write_text(json.dumps(result(arm, seed, miou)))
    arms_over_seeds.write_table(tmp_path, "dense")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("Before.\n") and text.endswith("After.\n") and "old" not in text
    lines = text.splitlines()
    assert "| dense | 2 | 35.00 ± 7.07 |  | 1.0000 ± 0.0000 | 45.00 ± 7.07 | 2.00 | 0.300 |" in lines
    (vimoe,) = (line for line in lines if line.startswith("| vimoe | 3 |"))
    assert "+1.50 [-4.85, +7.85]" in vimoe  # of seeds 0 and 1: 1 and 2 points
    assert "| sky | 50.0 | 50.0 |" in lines and "| car | – | – |" in lines
    arms_over_seeds.write_table(tmp_path, "dense")
    assert (tmp_path / "README.md").read_text() == text


def test_the_table_of_camvid_regenerates_unchanged(tmp_path: Path) -> None:
    study = shutil.copytree(Path(arms_over_seeds.__file__).parent / "camvid", tmp_path / "camvid")
    page = (study / "README.md").read_text("utf-8")
    assert "| vimoe-last1 | 3 | 32.11" in page
    (study / "README.md").write_text(f"{page.partition(BEGIN)[0]}{BEGIN}\n{END}{page.partition(END)[2]}", "utf-8")
    arms_over_seeds.write_table(study, "dense")
    written = (study / "README.md").read_text("utf-8")
    assert written.split() == page.split()  # the notes are wrapped by hand


def test_seeds_of_different_settings_are_not_put_together(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    for seed, settings in enumerate("ab"):
        values = {**result("dense", seed, 0.3), "settings": settings}
        (tmp_path / "results" / f"dense-seed{seed}.json").write_text(json.dumps(values))
    with pytest.raises(SystemExit, match="the seeds of dense had different settings"):
        arms_over_seeds.write_table(tmp_path, "dense")


def test_a_score_on_validation_is_not_reported_as_one_on_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "dense-seed0"
    run.mkdir(parents=True)
    (run / "summary.json").write_text("{}")
    for arm in ("base", "dense"):
        (tmp_path / f"{arm}.yaml").write_text("")
    monkeypatch.setattr(arms_over_seeds, "vimoe", lambda *_: {"split": "val", "miou": 0.5})
    with pytest.raises(SystemExit, match="a score on val: expected one on test"):
        arms_over_seeds.run_one(tmp_path, tmp_path / "dense.yaml", 0, tmp_path / "runs", [])
    assert not (tmp_path / "results").exists()


def test_a_readme_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("Nothing.\n")
    with pytest.raises(FolderError, match="has no marks"):
        arms_over_seeds.write_table(tmp_path, "dense")


def test_every_arm_of_the_studies_is_a_config() -> None:
    from vimoe.config.command_line import Parser
    from vimoe.config.settings import SECTIONS

    for folder in (path for path in Path(arms_over_seeds.__file__).parent.iterdir() if (path / "base.yaml").exists()):
        for arm in (folder / "arms").glob("*.yaml"):
            parser = Parser(prog="test")
            parser.add_sections(*SECTIONS)
            given = parser.parse_args(["--config", str(folder / "base.yaml"), "--config", str(arm)])
            settings = parser.settings(given)
            assert settings.train.epochs > 10  # of base.yaml
            assert (settings.moe.layers == "none") == (arm.stem == "dense")
