"""The queue: what is left and in which order, claims, and several workers on one folder."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.studies import put, write_study

from vimoe.study.one_cell import claim, file_of, is_claimed
from vimoe.study.plan import Cell, Study
from vimoe.study.queue import Queue, Workers, duration


def queue(study: Study, runs: Path, **macs: float) -> Queue:
    keys = {cell.fingerprint: ["k", "counts too"] for cell in study.all_cells()}
    return Queue(study, keys, runs, lambda cell: macs.get(cell.arm, 1.0))


class Functions:
    """Cells computed by a function, in the place of processes."""

    def __init__(self, compute: Callable[[Cell], str | None]) -> None:
        self.compute, self.ended = compute, 0

    def run(self, cell: Cell, key: str) -> str | None:
        assert key == "k"
        return self.compute(cell)

    def end(self) -> None:
        self.ended += 1


def names(cells: list[Cell]) -> list[str]:
    return [cell.name for cell in cells]


def test_the_search_comes_first_and_small_models_before_large_ones(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    ready, waiting = (lambda q: q.left(q.done()))(queue(study, tmp_path / "runs", dense=2, vimoe=1))
    assert [cell.arm for cell in ready] == ["vimoe"] * 4 + ["dense"] * 4
    assert all(cell.search for cell in ready) and len(waiting) == 4


def test_finished_cells_say_what_others_take(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    cell = study.search_cells("digits", "vimoe")[0]
    put(study, cell, 0.5, seconds={"train": 29, "after": 1, "cell": 30}, cost={"macs": 3})
    q = queue(study, tmp_path / "runs", dense=2, vimoe=1)
    ready, waiting = q.left(q.done())
    assert [cell.arm for cell in ready] == ["dense"] * 4 + ["vimoe"] * 3
    seconds = q.estimates(q.done(), [*ready, *waiting])
    assert {c.arm: seconds[c.fingerprint] for c in ready} == {"dense": pytest.approx(20), "vimoe": 30}


def test_the_chosen_rate_alone_is_trained_on_all_seeds(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    for cell in study.search_cells("digits", "dense"):
        put(study, cell, {1e-3: 0.6, 3e-3: 0.7}[cell.rate])
    q = queue(study, tmp_path / "runs")
    ready, _ = q.left(q.done())
    dense = [cell for cell in ready if cell.arm == "dense"]
    assert names(dense) == ["digits.dense.lr0.003.seed0", "digits.dense.lr0.003.seed1"]


def test_a_result_of_other_settings_data_or_code_is_not_used(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    cell = study.search_cells("digits", "dense")[0]
    put(study, cell, 0.5, key="older")
    q = queue(study, tmp_path / "runs")
    assert cell.name in names(q.left(q.done())[0])
    put(study, cell, 0.5)
    assert cell.name not in names(q.left(q.done())[0])


def test_a_result_of_a_version_that_counts_is_used(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    cell = study.search_cells("digits", "dense")[0]
    put(study, cell, 0.5, key="counts too")
    q = queue(study, tmp_path / "runs")
    assert cell.name not in names(q.left(q.done())[0])


def test_a_claim_ends_with_its_holder(tmp_path: Path) -> None:
    cell = write_study(tmp_path).search_cells("digits", "dense")[0]
    assert not is_claimed(tmp_path, cell, "k")
    with claim(tmp_path, cell, "k"):
        assert is_claimed(tmp_path, cell, "k") and not is_claimed(tmp_path, cell, "l")
    assert not is_claimed(tmp_path, cell, "k")


def test_two_processes_of_two_workers_compute_each_cell_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vimoe.study.queue.POLL", 0.01)
    study, computed, lines = write_study(tmp_path), Counter[str](), list[str]()

    def compute(cell: Cell) -> str | None:
        lock = claim(tmp_path / "runs", cell, "k")
        try:
            lock.acquire()
        except TimeoutError:
            return None
        with lock:
            if not file_of(study, cell, "k").exists():
                computed[cell.name] += 1
                put(study, cell, 0.5 + cell.rate)
            lock.release()
            return None

    q = queue(study, tmp_path / "runs")
    threads = [threading.Thread(target=Workers(q, Functions(compute), lines.append).work, args=(2,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(computed.values()) == {1} and len(computed) == 12
    assert sum("seed" in name for name in computed) == 4 and "digits.vimoe.lr0.003.seed1" in computed
    assert any("12 of 12 cells" in line for line in lines)


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vimoe.study.queue.POLL", 0.01)
    study, lines = write_study(tmp_path), list[str]()

    def compute(cell: Cell) -> str | None:
        if cell.arm == "vimoe" and cell.rate == 3e-3:
            return "no such file"
        put(study, cell, 0.5)
        return None

    failed = Workers(queue(study, tmp_path / "runs"), Functions(compute), lines.append).work(1)
    assert failed == ["digits.vimoe.lr0.003.search10", "digits.vimoe.lr0.003.search11"]
    assert len(list(study.results.glob("*.json"))) == 8  # vimoe's seeds wait for its search
    assert any("vimoe.lr0.003.search10 failed in 0 s: no such file" in line for line in lines)


def test_times_for_a_person() -> None:
    assert [duration(s) for s in (9.6, 300, 12_000)] == ["10 s", "5 min", "3 h 20 min"]


def test_an_interrupt_ends_what_runs_and_takes_no_more_cells(tmp_path: Path) -> None:
    study, lines, begun = write_study(tmp_path), list[str](), list[str]()

    def compute(cell: Cell) -> str | None:
        begun.append(cell.name)
        raise KeyboardInterrupt

    functions = Functions(compute)
    with pytest.raises(KeyboardInterrupt):
        Workers(queue(study, tmp_path / "runs"), functions, lines.append).work(1)
    assert functions.ended == 1 and len(begun) == 1 and not lines
