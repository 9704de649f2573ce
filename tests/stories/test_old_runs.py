"""Runs that were made before (`tests/old/commands.sh`) go through every verb, and give the figures that they gave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import call

import vimoe
from vimoe.demo.composed_scenes import compose_scenes

OLD = Path(__file__).parents[1] / "old"
FIGURES: dict[str, Any] = json.loads((OLD / "figures.json").read_text(encoding="utf-8"))
OF_THE_MACHINE = {"images_per_second", "versions", "out", "report", "file", "mask", "overlay", "seconds"}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the runs, with the scenes that one of them was trained on."""
    root = tmp_path_factory.mktemp("old")
    for run in ("digits", "scenes"):
        shutil.copytree(OLD / run, root / run)
    compose_scenes(root / "photos", 12, 4, 4)
    config = root / "scenes" / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("PHOTOS", str(root / "photos")), encoding="utf-8")
    return root


def alike(found: Any, expected: Any, where: str = "") -> None:
    """Asserts that all that was said is still said, with the same figures; there may be more."""
    if isinstance(expected, dict):
        for key in expected.keys() - OF_THE_MACHINE:
            alike(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            alike(one, other, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("run", ["digits", "scenes"])
def test_every_verb_finds_in_it_what_it_found(
    run: str, old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = json.loads((OLD / run / "routing.json").read_text(encoding="utf-8"))
    config = old / run / "config.yaml"  # in those days experts were compared on all tokens of the last block
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("model:\n", "model:\n  read: all\n", 1), encoding="utf-8")
    alike(call(capsys, "evaluate", old / run), FIGURES[f"evaluate-{run}"])
    image = sorted((old / "photos" / "images" / "test").iterdir())[0]
    out = ["--out", tmp_path / "masks"] if run == "scenes" else []
    alike(call(capsys, "predict", old / run, image, *out), FIGURES[f"predict-{run}"])
    alike(call(capsys, "prune", old / run, "--tolerance=9", "--out", tmp_path / "pruned"), FIGURES[f"prune-{run}"])
    call(capsys, "report", old / run)
    call(capsys, "analyze", old / run, "--draws=4", *(["--overrule=100"] if run == "digits" else []))
    alike(json.loads((old / run / "routing.json").read_text(encoding="utf-8")), known)


def test_a_model_folder_is_loaded(old: Path) -> None:
    model = vimoe.load(old / "digits" / "model")
    assert list(vimoe.count(model).moe_layers) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert torch.isfinite(model(torch.zeros(1, 3, 16, 16))).all()


def test_the_comparison_can_fail() -> None:
    for found, expected in (({"loss": 1.0}, {"loss": 1.01}), ([1], [1, 2]), ({"a": {"b": "x"}}, {"a": {"b": "y"}})):
        with pytest.raises(AssertionError):
            alike(found, expected)
    with pytest.raises(KeyError):
        alike({}, {"loss": 1.0})
