"""One of the two processes that `tests/stories/test_a_second_process.py` starts; it writes down what it saw."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from helpers.trainings import model

from vimoe import terminal
from vimoe.config.train import TrainConfig
from vimoe.errors import FolderError, VimoeError
from vimoe.process import Process, speaks
from vimoe.training.routing_health import Health
from vimoe.training.settle import settle
from vimoe.training.state import Totals


def message(function: Any, *args: Any) -> str:
    """Return the message of the error that a call raises."""
    try:
        function(*args)
    except VimoeError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def write(path: Path, text: str) -> str:
    path.write_text(path.read_text() + text if path.exists() else text)
    return path.name


def find(path: Path, rank: int) -> str:
    """Return what is in a file, which is made where it is missing."""
    found = f"{path.read_text()}, found by {rank}" if path.exists() else f"made by {rank}"
    path.write_text(found)
    return found


def refuse(text: str) -> None:
    raise FolderError(text)


def bug() -> None:
    raise KeyError("scan")


def broken(process: Process) -> str:
    """Return the kind of the error that a bug is in the first process."""
    try:
        process.once(bug)
    except Exception as error:
        return type(error).__name__
    return "no error"


def sums(process: Process) -> dict[str, Any]:
    """Return figures of an epoch in which the processes saw 2 and 4 images, and sent them to experts of their own."""
    totals, health = Totals(), Health()
    totals.add(2 * (process.rank + 1), loss=torch.tensor(float(process.rank)))
    load = torch.tensor([1, 0] if process.first else [0, 3])
    health._add("layer", load=load, units=load.sum())
    totals, health = totals.over(process), health.over(process)
    return {"images": totals.images, "loss": totals.means()["loss"], "shares": health.shares()["layer"]}


def shown(process: Process) -> list[str]:
    """Return the lines of a progress bar that shows each step, and of a log after `one_log`."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vimoe")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    terminal.EVERY = 0.0
    assert list(terminal.track(range(2), "counting")) == [0, 1]  # the work itself is done by all
    process.one_log()
    logging.getLogger("vimoe.training").warning("an alarm")
    return [line.partition(",")[0] for line in lines]


def main() -> None:
    folder, process = Path(sys.argv[1]), Process()
    one = torch.tensor([1.0, 10.0]) * (process.rank + 1)
    seen = {
        "rank": process.rank,
        "count": process.count,
        "first": process.first,
        "device": process.device.type,
        "sum": process.sum(one).tolist(),
        "kept": one.tolist(),
        "any": [process.any(False), process.any(process.rank == 1), process.any(True)],
        "broadcast": process.broadcast({"rank": process.rank}),
        "once": process.once(write, folder / "written", "x"),
        "refused": message(process.once, refuse, "the disk of rank 0 is full"),
        "broken": message(process.once, bug) if not process.first else broken(process),
        "epoch": sums(process),
        "mean": process.mean(one).tolist(),
        "gradient": torch.autograd.functional.jacobian(lambda x: process.mean(x).square().sum(), one).tolist(),
        "gathered": process.gather(f"rank {process.rank}"),
        "merged": process.merge({process.rank + 2 * i: f"{i} of {process.rank}" for i in range(2 - process.rank)}),
        "found": process.first_then_all(find, folder / "found", process.rank),
        "odd": message(settle, TrainConfig(batch_size=7), 100, model()),
        "pairs": message(settle, TrainConfig(batch_size=6, mixup=0.1), 100, model()),
        "lowered": settle(TrainConfig(batch_size=64, mixup=0.1), 15, model()).batch_size,
        "speaks": [speaks(), speaks()],
        "shown": shown(process),
    }
    (folder / f"{process.rank}.json").write_text(json.dumps(seen))
    process.any(False)  # the store of the job ends with the first process, and `speaks` asks it


if __name__ == "__main__":
    main()
