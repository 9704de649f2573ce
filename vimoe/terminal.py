"""Progress of long work: a bar if standard error is a terminal, else a line in the log every half minute."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from time import monotonic
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vimoe.process import writes

EVERY = 30.0  # seconds before the first line and between lines

Item = TypeVar("Item")
Show = Callable[[str, int], None]  # arguments: name of the current work, steps done since the last call

logger = logging.getLogger(__name__)


def track(work: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items of some work, and show how many are done.

    Args:
        work: items; each counts as done when the next one is asked for.
        what: name of the work, such as "evaluating"; "" shows nothing.
        total: number of items; by default the length of `work`, if it has one. One item shows nothing.

    >>> list(track(["a", "b"], "reading"))
    ['a', 'b']
    """
    total = total or length_hint(work) or None
    if not what or total == 1:
        yield from work
        return
    with progress(what, total) as show:
        for item in work:
            yield item
            show(what, 1)


@contextmanager
def progress(what: str, total: int | None, done: int = 0, stays: bool = False) -> Iterator[Show]:
    """Show progress during the block; yields a function to call after each step.

    Args:
        what: name of the work at first.
        total: number of steps; None if unknown.
        done: number of steps that were done before.
        stays: True to leave the bar on the terminal after the work.
    """
    if not writes():
        yield lambda what, steps: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(total, done).show
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=not stays) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda what, steps: bar.update(task, advance=steps, description=what)


class _Lines:
    """Progress as lines in the log."""

    def __init__(self, total: int | None, done: int) -> None:
        self.total, self.done, self.before = total, done, done
        self.start = self.last = monotonic()

    def show(self, what: str, steps: int) -> None:
        self.done += steps
        now = monotonic()
        if now - self.last < EVERY or self.done == self.total:
            return
        self.last = now
        if self.total is None or self.done == self.before:
            logger.info("%s: %d done", what, self.done)
            return
        left = (now - self.start) / (self.done - self.before) * (self.total - self.done)
        logger.info("%s: %d of %d, about %s left", what, self.done, self.total, _in_words(left))


def _in_words(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
