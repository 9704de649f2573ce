"""Cells that are left, in order, and workers that compute them, each cell in a process of its own.

Nothing is stored about the queue: what is left follows from the files in the results folder and the locks that other
processes hold. So processes may come, go and be killed, and several may work on one folder.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from vimoe.study.one_cell import file_of, is_claimed
from vimoe.study.plan import Cell, Study
from vimoe.study.results import Results

POLL = 5.0  # seconds between looks at the folder where others compute what is left


@dataclass(frozen=True)
class Queue:
    """Cells of a study that are not there yet.

    Args:
        study: the study.
        keys: `Study.keys`.
        runs: folder with the claims.
        macs: multiply-adds of an image in a cell's model; asked for arms without a finished cell.
        arms: arms to compute; all if empty.
    """

    study: Study
    keys: Mapping[str, Sequence[str]]
    runs: Path
    macs: Callable[[Cell], float]
    arms: tuple[str, ...] = ()
    _macs: dict[tuple[str, str], float] = field(default_factory=dict)

    def done(self) -> Results:
        """Return the cells that are there, of these settings and data, and of code that counts."""
        return Results.read(self.study, self.keys)

    def left(self, done: Results) -> tuple[list[Cell], list[Cell]]:
        """Return the cells that can be computed now, cheap ones first, and those that wait for a search."""
        ready: list[Cell] = []
        waiting: list[Cell] = []
        for data in self.study.data:
            for arm in self.arms or self.study.arms:
                search = self.study.search_cells(data, arm)
                rate = done.rate(data, arm)
                ready += [cell for cell in search if cell.fingerprint not in done.cells]
                final = self.study.final_cells(data, arm, self.study.rates[0] if rate is None else rate)
                (waiting if rate is None else ready).extend(c for c in final if c.fingerprint not in done.cells)
        cost = self.estimates(done, [*ready, *waiting])
        return sorted(ready, key=lambda cell: (cost[cell.fingerprint], cell.name)), waiting

    def number(self) -> int:
        """Return the number of cells of these arms, there or not, at the rates that are chosen or will be."""
        return sum(
            len(self.study.search_cells(data, arm)) + len(self.study.seeds_of(data, arm))
            for data in self.study.data
            for arm in self.arms or self.study.arms
        )

    def estimates(self, done: Results, cells: list[Cell]) -> dict[str, float]:
        """Return the seconds that cells will take, by fingerprint: the median of finished cells of the arm.

        An arm without one has that of all others, scaled by multiply-adds. Before any cell is finished, the numbers are
        epochs times multiply-adds, which serve the order alone.
        """
        seconds: dict[tuple[str, str, bool], list[float]] = {}
        per_mac: list[float] = []
        for of in done.cells.values():
            took = of["seconds"]["cell"]
            seconds.setdefault((of["data"], of["arm"], of["search"]), []).append(took)
            per_mac.append(took / (of["cost"]["macs"] * of["settings"]["train"]["epochs"]))
        scale = statistics.median(per_mac) if per_mac else 1.0
        found = {}
        for cell in cells:
            mine = seconds.get((cell.data, cell.arm, cell.search)) or seconds.get(
                (cell.data, cell.arm, not cell.search)
            )
            guess = statistics.median(mine) if mine else scale * self._cost(cell)
            found[cell.fingerprint] = guess
        return found

    def _cost(self, cell: Cell) -> float:
        where = (cell.data, cell.arm)
        if where not in self._macs:
            self._macs[where] = self.macs(cell)
        return self._macs[where] * float(cell.settings["train"]["epochs"])

    def key(self, cell: Cell) -> str:
        """Return the key of a cell that is still to be computed."""
        return self.keys[cell.fingerprint][0]

    def is_claimed(self, cell: Cell) -> bool:
        """Return True if a process computes the cell."""
        return is_claimed(self.runs, cell, self.key(cell))

    def is_there(self, cell: Cell) -> bool:
        """Return True if the cell has been computed by this version of the package."""
        return file_of(self.study, cell, self.key(cell)).exists()


class CellProcesses(Protocol):
    """Cells in processes of their own."""

    def run(self, cell: Cell, key: str) -> str | None:
        """Compute a cell; return None, or why it failed."""

    def end(self) -> None:
        """Ask those that run to end."""


class Workers:
    """Threads that take cells from a queue until none is left.

    Args:
        queue: the queue.
        processes: what computes a cell of a key, and says why it failed; `vimoe.study.work.Processes`.
        say: function that prints a line.
    """

    def __init__(self, queue: Queue, processes: CellProcesses, say: Callable[[str], Any]) -> None:
        self.queue, self.processes, self.say = queue, processes, say
        self.lock, self.running, self.failed = threading.Lock(), set[str](), set[str]()
        self.stopped = False

    def work(self, number: int) -> list[str]:
        """Compute until nothing is left, and return the names of the cells that failed.

        Args:
            number: number of cells at a time.
        """
        with ThreadPoolExecutor(number) as pool:
            try:
                for each in [pool.submit(self._work, number) for _ in range(number)]:
                    each.result()
            except BaseException:
                self.stopped = True
                self.processes.end()
                raise
        return sorted(self.failed)

    def _work(self, number: int) -> None:
        while not self.stopped:
            with self.lock:
                cell, more = self._next()
                if cell:
                    self.running.add(cell.name)
            if cell is None:
                if not more:
                    return
                time.sleep(POLL)
                continue
            began = time.monotonic()
            failure = self.processes.run(cell, self.queue.key(cell))
            with self.lock:
                self.running.discard(cell.name)
                if self.stopped or (failure is None and not self.queue.is_there(cell)):  # another process has it
                    continue
                took = duration(time.monotonic() - began)
                if failure is not None:
                    self.failed.add(cell.name)
                    self.say(f"{cell.name} failed in {took}: {failure}")
                else:
                    self.say(f"{cell.name} done in {took}; {self.state(number)}")

    def _next(self) -> tuple[Cell | None, bool]:
        """Return a cell to compute, if there is one, and whether others may come."""
        ready, _ = self.queue.left(self.queue.done())
        ready = [cell for cell in ready if cell.name not in self.failed]
        mine = [cell for cell in ready if cell.name not in self.running and not self.queue.is_claimed(cell)]
        return (mine[0] if mine else None), bool(ready)

    def state(self, number: int) -> str:
        """Return what is done, what runs and when all will be finished, for a person."""
        done = self.queue.done()
        ready, waiting = self.queue.left(done)
        left = [cell for cell in (*ready, *waiting) if cell.name not in self.failed]
        running = [cell.name for cell in ready if cell.name in self.running or self.queue.is_claimed(cell)]
        whole = self.queue.number()
        there = whole - len(ready) - len(waiting)
        text = f"{there} of {whole} cells"
        if running:
            text += f", running: {', '.join(running)}"
        if left and there:
            busy = max(number, len(running))
            seconds = sum(self.queue.estimates(done, left)[cell.fingerprint] for cell in left) / busy
            text += f", about {duration(seconds)} left, until {datetime.now() + timedelta(seconds=seconds):%d %b %H:%M}"
        return text


def duration(seconds: float) -> str:
    """Return a time for a person: 42 s, 5 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
