"""Requests to end, by SIGTERM or Ctrl-C.

A handler can end a program only by an exception, wherever Python happens to be. In a destructor Python prints it and
goes on, and a library may take it for an error of its own. So the request is remembered too.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Request to end: number of the signal, None until one came."""

    signal: int | None = None


_asked = Stop()  # in the block of `interrupting`


@contextmanager
def interrupting() -> Iterator[Stop]:
    """Make SIGTERM end a block as Ctrl-C does, so that half-written files (features, masks) are removed."""

    def end(number: int, _frame: FrameType | None) -> None:
        _asked.signal = number
        raise KeyboardInterrupt(number)

    with _handled_by(end):
        try:
            yield _asked
        finally:
            _asked.signal = None


@contextmanager
def stopping() -> Iterator[Stop]:
    """Note SIGTERM and the first Ctrl-C during a block, which ends after a step; a second one ends it at once.

    A request from before, whose exception was lost, is noted from the beginning.
    """
    stop = Stop()
    stop.signal = _asked.signal

    def note(number: int, _frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt(number)
        stop.signal = number

    with _handled_by(note):
        yield stop


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, each in before.items():
            signal.signal(number, each)
