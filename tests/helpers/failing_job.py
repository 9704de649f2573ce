"""A process of a job of the command line in which one of them fails in the midst of the training.

python failing_job.py HOW RANK STEP VERB ...
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

import torch

import vimoe.data.classification
import vimoe.training.loop
from vimoe.cli import main
from vimoe.data.image_check import check_images
from vimoe.errors import DataError
from vimoe.training import checkpoint
from vimoe.training.loop import _Steps

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}


def fail(how: str) -> None:
    if how == "error":
        raise DataError("the image is gone: expected it to be there; restore it")
    if how in SIGNALS:
        os.kill(os.getpid(), SIGNALS[how])


def arm(how: str, rank: int, step: int) -> None:
    """Lets this process fail in its so manieth step, if it has the rank."""
    if int(os.environ["RANK"]) != rank:
        return
    before, write, losses_of = _Steps.epoch, checkpoint.write, vimoe.training.loop.auxiliary_losses
    steps = 0

    def epoch(self: _Steps, state: Any) -> Any:
        nonlocal steps
        for _ in before(self, state):
            steps += 1
            if steps == step:
                fail(how)
            yield

    def losses(*args: Any) -> Any:
        total, parts = losses_of(*args)
        return total + torch.tensor(float("nan") if steps == step else 0.0), parts

    def full(*args: Any) -> None:
        if steps >= step:
            raise OSError(errno.ENOSPC, "No space left on device", "last.pt")
        write(*args)

    def fewer(sources: Any, folder: Any) -> Any:
        checked = check_images(sources, folder)
        del checked.digests[sources[step]]
        return checked

    _Steps.epoch = epoch
    changed = {
        "nan": (vimoe.training.loop, "auxiliary_losses", losses),
        "full": (checkpoint, "write", full),
        "blind": (vimoe.data.classification, "check_images", fewer),
    }
    if how in changed:
        setattr(*changed[how])


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    sys.exit(main(sys.argv[4:]))
