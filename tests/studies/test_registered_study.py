"""The registered study as it is in the repository: its tables come from its files, and its words from its tables."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.pictures import folder
from helpers.scenery import scenes

from vimoe.config.command_line import PRESETS
from vimoe.study.plan import Study
from vimoe.study.report import write_report
from vimoe.study.results import Results
from vimoe.study.work import Work

ROOT = Path(__file__).parents[2]
STUDY, DEPTH, CONTINUAL = (ROOT / "studies" / name for name in ("vimoe", "depth", "continual"))
SCENES, EARLIER = ROOT / "studies/scenes", ROOT / "studies/camvid"  # of which the second has a table of its own kind
INTERVAL = re.compile(r"(?:[-+]?[\d.]+ )?\[[-+\d.]+, [-+\d.]+\]")


def table(study: Path = STUDY) -> str:
    return (study / "README.md").read_text("utf-8").partition("<!-- the table begins -->")[2]


@pytest.mark.parametrize("study", [STUDY, SCENES, DEPTH], ids=lambda path: path.name)
def test_the_tables_regenerate_without_a_difference(study: Path, tmp_path: Path) -> None:
    page = (study / "README.md").read_text("utf-8")
    copied = shutil.copytree(study, tmp_path / "study")
    (copied / "README.md").write_text(page.replace(table(study), "\n<!-- the table ends -->\n"))
    write_report(Study(copied))
    assert (copied / "README.md").read_text("utf-8") == page


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """NAME=PATH of the names in the studies: an architecture without weights, and as few images as will do."""
    root = tmp_path_factory.mktemp("inputs")
    for split in ("train", "test"):
        folder(root / "photos" / split, 20, tuple(f"class{i:03d}" for i in range(100) if split == "train" or i < 2))
    scenes(root / "scenes", train=20)
    (root / "vit").mkdir()
    (root / "vit" / "config.json").write_text(json.dumps({"architecture": "vit_small_patch14_dinov2"}))
    photos = {name: root / "photos" for name in ("CUB100", "DOMAINS")}
    given = {**photos, "CAMVID": root / "scenes", "CCP59": root / "scenes", "DINOV2": root / "vit"}
    return [f"{name}={path}" for name, path in given.items()]


@pytest.mark.parametrize(
    "study", [pytest.param(STUDY, marks=pytest.mark.slow), pytest.param(SCENES, marks=pytest.mark.slow), DEPTH],
    ids=lambda path: path.name,
)  # fmt: skip
def test_every_arm_can_be_trained(study: Path, tmp_path: Path, inputs: list[str]) -> None:
    asked = Study(study)
    cells = [asked.final_cells(data, arm, asked.rates[0])[0] for data in asked.data for arm in asked.arms]
    Work(asked, inputs, tmp_path, lambda *_: {}).check_trainings(cells)


@pytest.mark.parametrize(
    ("page", "studies"),
    [
        ("studies/vimoe/README.md", [STUDY, SCENES]),
        ("studies/scenes/README.md", [SCENES, EARLIER]),
        ("README.md", [STUDY, SCENES]),
        ("docs/guides/continual_learning.md", [CONTINUAL]),
        ("studies/continual/README.md", [CONTINUAL]),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_every_interval_in_words_is_one_of_the_tables(page: str, studies: list[Path]) -> None:
    words, tables = (ROOT / page).read_text("utf-8"), [table(study) for study in studies]
    for each in tables:
        words = words.replace(each, "")
    said = INTERVAL.findall(" ".join(words.split()))
    assert said and not [each for each in said if not any(each in rows for rows in tables)]


def test_the_recommended_preset_is_the_mixture_that_lost_least() -> None:
    study = Study(STUDY)
    results = Results.read(study)
    tops = {
        arm: {seed: score["top1"] for seed, score in results.outcome("cub100", arm).items() if seed in study.seeds}
        for arm in study.contrasts["C1"].candidates
    }
    assert max(tops, key=lambda arm: sum(tops[arm].values())) == "lora" and len({*map(len, tops.values())}) == 1
    rate = results.rate("cub100", "lora")
    assert rate is not None
    arm = study.final_cells("cub100", "lora", rate)[0].settings
    preset = yaml.safe_load(PRESETS["recommended"].read_text("utf-8"))
    own = {"path", "val_fraction", "workers", "precision", "seed", "tensorboard"}  # of the user's images and machine
    for section in ("moe", "data", "train"):
        assert preset[section] == {name: value for name, value in arm[section].items() if name not in own}


def test_the_recommended_preset_says_what_the_tables_say() -> None:
    words = " ".join(line.lstrip("# ") for line in PRESETS["recommended"].read_text("utf-8").splitlines())
    row = next(line for line in table().splitlines() if line.startswith("| lora |"))
    for figure in ("78.87 ± 0.64", *INTERVAL.findall(words)):
        assert figure in words and figure in row
