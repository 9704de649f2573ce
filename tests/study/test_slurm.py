"""Workers as jobs of a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vimoe.errors import ConfigError
from vimoe.study.slurm import submit


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
    assert submit(["vimoe", "study"], 2, ["timeout_min=9"], tmp_path, False) == ["submitted job 7"] * 2
    assert seen == [tmp_path, {"timeout_min": 9}, ("vimoe", "study"), ("vimoe", "study")]
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        submit([], 1, ["timeout_min"], tmp_path, False)
