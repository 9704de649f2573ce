"""Cells in processes of their own: their logs, and how they end."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.studies import write_study

from vimoe.study.work import Processes, Work, gpus


def test_a_cell_in_a_process_has_a_log_until_it_is_there(tmp_path: Path) -> None:
    cell = write_study(tmp_path).search_cells("digits", "dense")[0]
    command = [sys.executable, "-c", "import sys; print(sys.argv[1:], '\\n'); sys.exit(3 * ('bad' in sys.argv))"]
    assert Processes([*command, "good"], tmp_path / "runs").run(cell, "k") is None
    assert not (tmp_path / "runs").exists()
    assert (
        Processes([*command, "bad"], tmp_path / "runs").run(cell, "k")
        == f"['bad', '--cell', '{cell.name}', '--key', 'k'] "
    )
    assert [log.name for log in (tmp_path / "runs").iterdir()] == [f"{cell.name}.k.log"]
    silent = [sys.executable, "-c", "import sys; sys.exit(3)"]
    assert Processes(silent, tmp_path / "others").run(cell, "k") == "exit status 3"


def test_what_runs_is_asked_to_end(tmp_path: Path) -> None:
    cell = write_study(tmp_path).search_cells("digits", "dense")[0]
    processes = Processes([sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"], tmp_path)
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(processes.run(cell, "k")))
    thread.start()
    log = tmp_path / f"{cell.name}.k.log"
    while not (log.exists() and log.read_text()):
        time.sleep(0.05)
    processes.end()
    thread.join(30)
    assert found == [f"ended by SIGTERM; the log is {log}"]
    assert processes.run(cell, "k") == found[0]  # one that begins after that, too


@pytest.mark.parametrize(
    ("listed", "count", "names"),
    [(None, 0, []), (None, 2, ["0", "1"]), ("4,6", 2, ["4", "6"]), ("GPU-a,b,9", 2, ["GPU-a", "b"]), ("", 0, [])],
)  # fmt: skip
def test_gpus_have_the_names_that_the_system_gave_them(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, count: int, names: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    if listed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert gpus() == names


@pytest.mark.parametrize(("there", "seen"), [(["0", "1"], "0 0 1"), (["5"], "all all all"), ([], "all all all")])
def test_workers_take_gpus_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str], seen: str
) -> None:
    """Three workers; one GPU is that of the environment, as it is for a single training."""
    study = write_study(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("vimoe.study.work.gpus", lambda: there)
    work = Work(study, ["DIGITS=digits"], tmp_path / "runs", lambda *_: {})
    code = "import os, sys, time; print(os.environ.get('CUDA_VISIBLE_DEVICES', 'all')); time.sleep(1); sys.exit(1)"
    monkeypatch.setattr(Work, "command", lambda self: [sys.executable, "-c", code])
    processes, said = work.workers(work.queue(), 3, print).processes, []
    cells = study.search_cells("digits", "dense")[:3]
    threads = [threading.Thread(target=lambda c=cell: said.append(processes.run(c, "k"))) for cell in cells]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert " ".join(sorted(said)) == seen
