"""Jobs of several processes, started as `torchrun` does it, on one machine without a GPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """The variables of a process of a job."""
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    launched |= {"RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1}
    return {**os.environ, **{k: str(v) for k, v in launched.items()}, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}


def start(count: int, *command: object) -> list[subprocess.Popen[str]]:
    """Starts `python *command` in each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], env=environment(rank, count, port), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(job: list[subprocess.Popen[str]], timeout: float = 300) -> list[tuple[int, str, str]]:
    """Waits for all; (status, standard output, standard error) of each. One that hangs fails the test."""
    try:
        printed = [process.communicate(timeout=timeout) for process in job]
    finally:
        for process in job:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(job, printed, strict=True)]
