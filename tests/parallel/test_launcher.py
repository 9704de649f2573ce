"""`accelerate launch --cpu` starts one process of several; vimoe starts the job as torchrun does."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from helpers.commands import TINY, refused
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from vimoe.cli import main
from vimoe.parallel.launcher import starts
from vimoe.verbs import SHARED

COMMANDS = {
    ("python3", "/bin/accelerate", "launch", "--num_processes", "2", "--cpu"): ["--standalone", "--nproc-per-node=2"],
    ("/bin/accelerate-launch", "--cpu", "--num_processes=3"): ["--standalone", "--nproc-per-node=3"],
    ("python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes=4", "--num_machines=2",
     "--machine_rank=1", "--main_process_ip=first", "--main_process_port=99"):
    ["--nnodes=2", "--node-rank=1", "--master-addr=first", "--master-port=99", "--nproc-per-node=2"],
}  # fmt: skip


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The environment of the one process; the arguments that torch's launcher got."""
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    calls: list[list[str]] = []
    monkeypatch.setattr(run, "main", calls.append)
    return calls


def by(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    """Lets these words, of a shell in between, be the command that started this process."""
    shell, launch = SimpleNamespace(cmdline=lambda: ["bash", "job.sh"]), SimpleNamespace(cmdline=lambda: list(command))
    monkeypatch.setattr(psutil.Process, "parents", lambda _: [shell, launch])


@pytest.mark.parametrize("verb", SHARED)
@pytest.mark.parametrize("command", COMMANDS)
def test_all_processes_are_started(
    launched: list[list[str]], monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], verb: str
) -> None:
    argv = [verb, "--data.path=launch", "--out=x"]
    by(monkeypatch, *command, "-m", "vimoe", *argv)
    assert main(argv) == 0
    assert launched == [[*COMMANDS[command], "-m", "vimoe", *argv]]


def test_the_status_is_that_of_the_first_failure(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    by(monkeypatch, *next(iter(COMMANDS)), "-m", "vimoe", "train")
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file="<N/A>")
    for error, status in ((ChildFailedError("vimoe", {1: failure}), 2), (SignalException("stopped", 15), 143)):

        def ends(_: list[str], error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(run, "main", ends)
        assert starts(["train"]) == status


def test_a_number_that_nobody_says_is_asked_for(
    launched: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["bash"], ["accelerate", "launch", "--config_file=two.yaml", "-m", "vimoe", "train"]):
        by(monkeypatch, *command)
        assert "expected --num_processes in its command; use torchrun" in refused(capsys, "train")
    assert not launched


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "0"}, {"PMI_RANK": "0"}, {"ACCELERATE_USE_CPU": "False"}, {"ACCELERATE_USE_CPU": None},
     {"MASTER_PORT": None}],
)  # fmt: skip
def test_nothing_else_is_started(
    launched: Any, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str | None]
) -> None:
    by(monkeypatch, *next(iter(COMMANDS)))
    for name, value in environment.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert starts(["train"]) is None and not launched


@pytest.mark.slow
def test_accelerate_itself_starts_two_on_cpus() -> None:
    """Which the mistake shows: a batch that two cannot share."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "-m", "vimoe"]
    command += ["train", *TINY, "--data.path=digits", "--train.batch_size=9", "--out=never"]
    done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, timeout=300, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("vimoe: ")]
    assert done.returncode != 0 and len(said) == 1 and "train.batch_size=9 over 2 processes" in said[0], done.stderr
