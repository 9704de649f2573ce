"""The command line of a study: workers as processes, jobs of a cluster, mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import study
from harness.slurm import submit
from helpers.studies import put, write_study

from vimoe.errors import ConfigError


def test_a_dry_run_lists_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_study(tmp_path)
    argv = [str(tmp_path), "--set", "DIGITS=digits", "--runs", str(tmp_path / "runs"), "--dry-run", "--arms", "vimoe"]
    assert study.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == sorted(cell.name for cell in made.search_cells("digits", "vimoe"))
    assert lines[4] == "and 2 cells at the rates that the search will choose; 0 of 6 cells, running: none"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "dens"], "--arms dens: "), (["--set", "DIGITS"], "--set DIGITS: expected NAME=VALUE"),
        (["--set", "DIGITS=digits", "--cell", "digits.dense"], "--cell digits.dense: "),
        (["--workers", "0"], "--workers 0: expected at least 1"),
        (["--set", "DIGITS=digits", "--slurm", "name=[a", "--dry-run"], "--slurm name=[a: "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    write_study(tmp_path)
    assert study.main([str(tmp_path), *more]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_a_report_needs_no_paths(tmp_path: Path) -> None:
    made = write_study(tmp_path)
    put(made, made.search_cells("digits", "dense")[0], 0.5)
    assert study.main([str(tmp_path), "--report"]) == 0
    assert "1 cells of the search, 0 of 4 cells" in (tmp_path / "README.md").read_text("utf-8")


def test_a_worker_computes_a_cell_in_a_process_and_keeps_the_log_of_a_failure(tmp_path: Path) -> None:
    cell = write_study(tmp_path).search_cells("digits", "dense")[0]
    command = [sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(3 * ('bad' in sys.argv))"]
    assert study.in_process([*command, "good"], cell, tmp_path / "runs", "k") == 0
    assert not list((tmp_path / "runs").iterdir())
    assert study.in_process([*command, "bad"], cell, tmp_path / "runs", "k") == 3
    (log,) = (tmp_path / "runs").iterdir()
    assert f"['bad', '--cell', '{cell.name}']" in log.read_text()


def test_a_dry_run_of_slurm_prints_the_jobs_and_needs_no_submitit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    write_study(tmp_path)
    options = ["--slurm", "timeout_min=240", "slurm_partition=gpu", "--workers", "2"]
    argv = [str(tmp_path), "--set", "DIGITS=digits", *options]
    assert study.main([*argv, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("job 1 of 2 with {'timeout_min': 240, 'slurm_partition': 'gpu'}: ")
    assert lines[0].endswith(f"study.py {tmp_path} --set DIGITS=digits --workers 1")
    assert study.main(argv) == 2
    assert "pip install submitit" in capsys.readouterr().err


def test_jobs_are_submitted_through_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list = []

    class Executor:
        def __init__(self, folder: Path) -> None:
            seen.append(folder)

        def update_parameters(self, **parameters: object) -> None:
            seen.append(parameters)

        def submit(self, job: object) -> SimpleNamespace:
            seen.append(job)
            return SimpleNamespace(job_id="7")

    fake = SimpleNamespace(AutoExecutor=Executor, helpers=SimpleNamespace(CommandFunction=tuple))
    monkeypatch.setitem(sys.modules, "submitit", fake)
    lines: list[str] = []
    submit(["python", "study.py"], 2, ["timeout_min=9"], tmp_path, False, lines.append)
    assert seen == [tmp_path, {"timeout_min": 9}, ("python", "study.py"), ("python", "study.py")]
    assert lines == ["submitted job 7"] * 2
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        submit([], 1, ["timeout_min"], tmp_path, False, lines.append)


def test_a_job_is_a_worker_without_the_options_of_its_submission() -> None:
    command = ["python", "study.py", "s", "--slurm", "a=1", "b=2", "--set", "X=y", "--workers=3", "--dry-run", "--keep"]
    assert study.without_slurm(command) == ["python", "study.py", "s", "--set", "X=y", "--keep"]
    assert study.without_slurm(["python", "study.py", "s", "--slurm=a=1"]) == ["python", "study.py", "s"]
    command = ["python", "study.py", "--dry-run", "--workers", "8", "s", "--slurm", "a=1"]
    assert study.without_slurm(command) == ["python", "study.py", "s"]


def test_an_option_is_not_shortened(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        study.arguments([str(tmp_path), "--slur", "a=1"])  # which a job would keep, and submit jobs in turn


def test_the_script_runs_from_anywhere(tmp_path: Path) -> None:
    script = Path(study.__file__).resolve()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(script), str(tmp_path), "--report"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "expected a study.yaml" in done.stderr, done.stderr
