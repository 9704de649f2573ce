"""Processes whose forwards go abreast: a parallel model gathers its weights from all of them in each forward.

In a training step all processes compute one batch each. An evaluation counts every image once, so that the processes
may have different numbers of batches, or of windows of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vimoe.errors import DataError
from vimoe.process import Process

PLAIN = "_plain_of_vimoe"  # attribute of a parallel model, in a tuple: the model as it was, without weights


def is_parallel(model: nn.Module) -> bool:
    """Return True for a model that `vimoe.parallel.parallelize` has spread over processes."""
    return hasattr(model, PLAIN)


@contextmanager
def abreast(model: nn.Module, process: Process | None) -> Iterator[Callable[[], None]]:
    """Let processes compute different numbers of forwards of a parallel model inside the `with` block.

    Before each forward a process says that it computes one. The function that the block gets is called at its end, and
    returns when all have called it; until then it repeats this process's last forward when another computes one.
    Nothing is done for any other model.

    Args:
        model: model of `parallelize`, or any other.
        process: this one of the processes; None if it is the only one.

    Raises:
        DataError: from the function, if this process has computed no forward.
    """
    if process is None or not is_parallel(model):
        yield lambda: None
        return
    last: list[tuple[Any, ...]] = []

    def say(_model: nn.Module, args: tuple[Any, ...]) -> None:
        process.any(True)
        last[:] = [args]

    def wait() -> None:
        handle.remove()
        while process.any(False):
            if not last:
                raise DataError(
                    f"process {process.rank} of {process.count} has no image to evaluate: expected at least "
                    f"{process.count} images for validation; add some, or use fewer processes"
                )
            with torch.no_grad():
                model(*last[0])

    handle = model.register_forward_pre_hook(say)
    try:
        yield wait
    finally:
        handle.remove()
