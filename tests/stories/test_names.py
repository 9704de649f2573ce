"""Names of classes and files that file systems allow, and that text, figures, locales or terminals do not expect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import QUICK, TINY, call
from helpers.pictures import folder, picture

from vimoe.cli import main
from vimoe.run_folder import Run, write_validation

ODD = {
    "not UTF-8": os.fsdecode(b"caf\xe9"),
    "dollars": "$0_$50",
    "mathematics": r"$50_\frac$",
    "a line separator": "x\u2028y\u0085z\x0bw",
    "a newline": "new\r\nline",
    "quoted": '"quoted"',
    "long": "ä" * 125,  # 250 bytes
    "markup": "<b>&amp;",
    "Cyrillic": "кот",
}
TRAIN = ["train", *TINY, *QUICK, "--train.epochs=1", "--moe.layers=last:1", "--moe.num_experts=2"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose classes and files have these names; a run of it."""
    root = tmp_path_factory.mktemp("odd")
    for c, name in enumerate(ODD.values()):
        (root / "photos" / name).mkdir(parents=True)
        for i, file in enumerate(ODD.values()):
            picture((20 * c, 90, 200), 100 * c + i).save(root / "photos" / name / f"{file}.png")
    command = [*TRAIN, "--data.path", str(root / "photos"), "--data.val_fraction=0.5", "--out", str(root / "run")]
    assert main(command) == 0
    return root


def test_every_verb_takes_every_name(odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = call(capsys, "evaluate", odd / "run")
    assert scored["images"] == 4 * len(ODD)  # the very ones that were split off
    said = call(capsys, "predict", odd / "run", odd / "photos", "--top=9")["predictions"]
    assert {each["name"] for each in said[0]["classes"]} == set(ODD.values())
    assert {Path(each["file"]).stem for each in said} == set(ODD.values())
    assert len(call(capsys, "analyze", odd / "run", "--draws=1")["classes"]) == len(ODD)
    assert call(capsys, "prune", odd / "run", "--out", tmp_path / "pruned", "--tolerance=100")["steps"]
    assert call(capsys, "evaluate", tmp_path / "pruned")["images"] == scored["images"]
    call(capsys, "report", odd / "run", tmp_path / "pruned", "--out", tmp_path / "both.html")
    page = (odd / "run" / "report.html").read_bytes()
    assert b"&lt;b&gt;&amp;amp;" in page and rb"\u043a\u043e\u0442" in page


def test_a_data_path_may_have_such_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (ODD["not UTF-8"], ODD["a newline"], ODD["dollars"]):
        photos = folder(tmp_path / name, images=8, classes=("blue", "red"))
        out = tmp_path / f"run {name}"
        assert call(capsys, *TRAIN, "--data.path", photos, "--out", out)["val"]["images"] == 2
        assert call(capsys, "evaluate", out)["images"] == 2


@pytest.mark.parametrize("encoding", ["ascii", *(pytest.param(e, marks=pytest.mark.slow) for e in ("cp1252", "utf-8"))])
def test_what_a_terminal_cannot_write_ends_nothing(odd: Path, encoding: str) -> None:
    command = [sys.executable, "-m", "vimoe.cli", "predict", str(odd / "run"), str(odd / "photos" / "кот")]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    shown = "кот".encode() if encoding == "utf-8" else rb"\u043a\u043e\u0442"
    lines = done.stdout.splitlines()
    assert len(lines) == len(ODD) and all(b".png: " in line or b'.png": ' in line for line in lines)
    assert shown in done.stdout and any(line.startswith(b'"') and b"new\\r\\nline" in line for line in lines)


@pytest.mark.slow  # 8 s
def test_a_reader_that_has_enough_ends_it_quietly(odd: Path) -> None:
    command = f'"{sys.executable}" -m vimoe.cli predict "$RUN" "$PHOTOS" --top=1 | head -c 1'
    environment = {**os.environ, "RUN": str(odd / "run"), "PHOTOS": str(odd / "photos")}
    done = subprocess.run(command, shell=True, capture_output=True, check=True, env=environment)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


@pytest.mark.slow  # tests/test_files.py sees every text without an encoding
def test_a_locale_that_is_not_utf8_changes_nothing(tmp_path: Path) -> None:
    """Python's text is then ASCII: a run is trained, and everything in it read again."""
    for name in ("blau", "grün"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            picture((20, 90, 200), i).save(tmp_path / "photos" / name / f"bär{i}.png")
    (tmp_path / "settings.yaml").write_text("# größer\ntrain: {lr: 0.001}\n", encoding="utf-8")
    code = """
import sys
from vimoe.cli import main
open("locale", "w").write(sys.getfilesystemencoding())
assert main([*sys.argv[1:], "--config", "settings.yaml", "--data.path", "photos", "--out", "run"]) == 0
for verb in (["evaluate", "run"], ["analyze", "run", "--draws=1"], ["report", "run"], ["predict", "run", "photos"]):
    assert main(verb) == 0
"""
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *TRAIN]
    subprocess.run(command, cwd=tmp_path, check=True, env=environment, capture_output=True)
    assert (tmp_path / "locale").read_text() == "ascii"
    assert "bär" in (tmp_path / "run" / "validation.txt").read_text(encoding="utf-8")
    assert main(["evaluate", str(tmp_path / "run")]) == 0  # in this locale too
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["classes"] == ["blau", "grün"]
    command = [sys.executable, "-m", "vimoe.cli", *TRAIN, "--data.path", "photos", "--out", "run2"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    command = [sys.executable, "-m", "vimoe.cli", "evaluate", "run2"]
    subprocess.run(command, cwd=tmp_path, check=True, env=environment, capture_output=True)


def test_a_list_of_names_is_read_as_it_was_written(tmp_path: Path) -> None:
    names = sorted([*ODD.values(), "a/plain.png"])
    write_validation(tmp_path, names)
    assert Run(tmp_path, settings=None).validation() == names
    lines = (tmp_path / "validation.txt").read_bytes().split(b"\n")
    assert b"a/plain.png" in lines and b"caf\xe9" in lines and json.dumps("new\r\nline").encode() in lines
