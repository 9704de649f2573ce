"""The documentation site builds without a warning, and what its first pages tell to run, runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.pictures import roles
from helpers.scenery import scenes
from helpers.tiny import shrink_timm
from helpers.tiny_transformers import vit

import vimoe
from vimoe.cli import main

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(yaml|bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(page: str) -> dict[str, Any]:
    """Run a page's blocks one after the other in the working directory, and return the names of its Python.

    A YAML block is the file that its first line names. Trainings take one epoch, or two with a warm-up of one.
    """
    names: dict[str, Any] = {}
    for kind, code in BLOCK.findall((ROOT / "docs" / page).read_text("utf-8")):
        if kind == "yaml":
            Path(code.split()[1]).write_text(code, encoding="utf-8")
        elif kind == "python":
            exec(code, names)
        else:
            for line in code.replace("\\\n", "").splitlines():
                line = re.sub(r"--train\.warmup_epochs \d+ ", "", line)
                command(shlex.split(re.sub(r"--train\.epochs \d+", "--train.epochs 1", line)))
    return names


def command(words: list[str]) -> None:
    """Run `vimoe` in this process, and `torchrun` in others."""
    if words[0] == "vimoe":
        short = (
            ["--train.epochs=2", "--train.batch_size=2"] if words[1:4] == ["train", "--config", "frozen-trunk"] else []
        )
        assert main([*words[1:], *short]) == 0, words
        return
    assert words[0] == "torchrun"
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *words[1:]], check=True, capture_output=True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow  # 20 s; continuous integration runs it
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "-q", "-c", "docs", ".", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    study = (tmp_path / "studies/vimoe/README.html").read_text("utf-8")
    assert (
        re.search(r'<td class="figures"><p>\d+\.\d+ ± \d', study) and "<p>top\N{NON-BREAKING HYPHEN}1, %</p>" in study
    )
    assert "site.css" in study and "(vit_*, deit*)" in (tmp_path / "docs/compatibility.html").read_text("utf-8")
    reference = (tmp_path / "docs/reference/python.html").read_text("utf-8")
    assert all(name == "__version__" or f'id="vimoe.{name}"' in reference for name in vimoe.__all__)


@pytest.mark.slow  # 11 s
def test_five_minutes(here: Path) -> None:
    run("start.md")
    assert (here / "comparison.html").exists() and (here / "runs/pruned/model").is_dir()


@pytest.mark.slow  # 40 s
def test_the_tutorials_on_photos_and_on_evidence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    shrink_timm(monkeypatch, depth=3)  # two blocks with MoE layers behind a frozen one
    roles(here / "photos")
    run("tutorials/photos.md")
    assert (here / "runs/pruned/onnx/predict.py").exists()
    (code,) = (
        code for kind, code in BLOCK.findall((ROOT / "docs/tutorials/photos.md").read_text("utf-8")) if kind == "python"
    )
    exec(code.replace("runs/pruned", "runs/photos"), {})  # which has layers to record, whatever was pruned
    assert run("tutorials/evidence.md")["evidence"]["layers"]


@pytest.mark.slow  # 15 s
def test_the_tutorial_on_segmentation(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_timm(monkeypatch)
    scenes(here / "street")
    run("tutorials/segmentation.md")
    assert len(list((here / "masks").rglob("*.png"))) == 4  # masks, and as overlays


@pytest.mark.slow  # 15 s
def test_the_tutorial_on_transformers(here: Path) -> None:
    pytest.importorskip("transformers")
    vit("dinov2").save_pretrained("my-dinov2")
    roles(here / "photos")
    assert run("tutorials/transformers.md")["output"].logits.shape == (2, 3)
    assert (here / "dense-again/model.safetensors").exists()


@pytest.mark.slow  # 40 s
def test_the_tutorial_on_processes(here: Path) -> None:
    run("tutorials/processes.md")
    assert (here / "runs/two/summary.json").exists() and (here / "runs/experts/report.html").exists()
