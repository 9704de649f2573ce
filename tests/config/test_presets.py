"""The presets are valid, mark the source of each setting, and cost what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vimoe.cli import main
from vimoe.config.command_line import PRESETS, Parser, read_settings
from vimoe.config.settings import SECTIONS
from vimoe.errors import ConfigError

ROOT = Path(__file__).parents[2]
FULL = ("imagenet-1k", "ade20k")
IMAGES = 1_281_167  # of ImageNet-1K's train split


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid(name: str) -> None:
    read_settings(PRESETS[name].read_text("utf-8"))


@pytest.mark.parametrize("name", FULL)
def test_every_setting_of_the_paper_s_size_says_where_it_is_from(name: str) -> None:
    text = PRESETS[name].read_text("utf-8")
    told = re.findall(r"^  (\w+): \S+(?:  # (paper|guess|ours))?.*$", text, re.MULTILINE)
    unmarked = {setting for setting, source in told if not source}
    assert unmarked == {"imagenet-1k": {"test_split"}, "ade20k": {"task", "train_split", "test_split"}}[name]
    assert {source for _, source in told} >= {"paper", "guess", "ours"}


@pytest.mark.parametrize(("name", "classes", "layers"), [("imagenet-1k", 1000, 2), ("ade20k", 150, 1)])
def test_the_paper_s_size_is_planned_without_weights_or_data(
    name: str, classes: int, layers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", name, "--model.pretrained=false", f"--model.num_classes={classes}", "--json"]
    assert main(["plan", *given]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(planned["moe"]["layers"]) == layers


def test_the_hours_of_imagenet_are_those_of_the_measured_throughput() -> None:
    measured = json.loads((ROOT / "benchmarks/results/h100.json").read_text("utf-8"))[0]
    assert measured["of"].startswith("vit_small_patch14_dinov2, image routing, 256 images of (3, 224, 224), bfloat16")
    speed = {row["name"]: 256 / row["seconds"] for row in measured["timings"]["training"]}
    epochs = read_settings(PRESETS["imagenet-1k"].read_text("utf-8")).train.epochs
    hours = {name: IMAGES * epochs / rate / 3600 for name, rate in speed.items()}
    page = " ".join((ROOT / "docs/guides/training.md").read_text("utf-8").split())
    assert f"takes {speed['vimoe']:,.0f} images a second (the dense ViT: {speed['dense']:,.0f};" in page
    assert f"at least {hours['vimoe']:.1f} GPU hours (dense: {hours['dense']:.1f})" in page


def test_a_file_may_have_the_sections_of_other_verbs() -> None:
    parser = Parser(prog="test")
    parser.add_sections("model", "moe")
    settings = parser.settings(parser.parse_args(["--config", "frozen-trunk", "--moe.num_experts", "4"]))
    assert (settings.moe.num_experts, settings.train.epochs) == (4, 10)
    assert "train" in SECTIONS and settings.moe.expert_dropout == 0.1


def test_a_section_that_no_verb_has_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("trian:\n  epochs: 3\n")
    parser = Parser(prog="test")
    parser.add_sections("model", "moe")
    with pytest.raises(ConfigError, match="trian"):
        parser.parse_args(["--config", str(file)])
