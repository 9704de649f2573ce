"""Cells in processes of their own: their logs, and how they end."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from helpers.studies import write_study

from vimoe.study.work import Processes


def test_a_cell_in_a_process_has_a_log_until_it_is_there(tmp_path: Path) -> None:
    cell = write_study(tmp_path).search_cells("digits", "dense")[0]
    command = [sys.executable, "-c", "import sys; print(sys.argv[1:], '\\n'); sys.exit(3 * ('bad' in sys.argv))"]
    assert Processes([*command, "good"], tmp_path / "runs").run(cell, "k") is None
    assert not list((tmp_path / "runs").iterdir())
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
    assert found == ["here"]
