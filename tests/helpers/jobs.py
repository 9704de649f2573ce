"""Jobs of several processes as `torchrun` starts them, without a GPU, from a process that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

TESTS = Path(__file__).parent.parent
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["vimoe.cli", "vimoe.experiments.train", "vimoe.tasks.segmentation"])


@dataclass
class Started:
    """A process of a job, and the files of what it prints."""

    process: BaseProcess
    printed: Path
    said: Path


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """The variables of a process of a job."""
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    launched |= {"RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1}
    return {**os.environ, **{k: str(v) for k, v in launched.items()}, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}


def start(count: int, *command: object) -> list[Started]:
    """Starts `python *command` in each of so many processes: a script, or -m and a module, and arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, job = Path(tempfile.mkdtemp()), []
    for rank in range(count):
        printed, said = folder / f"{rank}.out", folder / f"{rank}.err"
        arguments = (environment(rank, count, port), [str(each) for each in command], printed, said)
        job.append(Started(_SERVER.Process(target=_run, args=arguments), printed, said))
        job[-1].process.start()
    return job


def finish(job: list[Started], timeout: float = 300) -> list[tuple[int | None, str, str]]:
    """Waits for all; (status, standard output, standard error) of each. One that hangs has the status None."""
    until = time.monotonic() + timeout
    for each in job:
        each.process.join(max(0.1, until - time.monotonic()))
    statuses = [each.process.exitcode for each in job]
    for each in job:
        each.process.kill()
    return [(s, e.printed.read_text(), e.said.read_text()) for s, e in zip(statuses, job, strict=True)]


def _run(variables: dict[str, str], command: list[str], printed: Path, said: Path) -> None:
    for number, path in ((1, printed), (2, said)):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(variables)
    sys.path.insert(0, str(TESTS))
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
