"""A function in several processes of one gloo job on this machine, with a limit on the time."""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The server of forks imports these once, and its children start in a fraction of a second. Plain forks of this process
# could run no backward pass after one has run here.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "timm", "torch.distributed.fsdp", "torch.distributed.checkpoint", "vimoe.moe"]
)


def run(function: Callable[..., Any], count: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Call `function(*args)` in `count` processes that have joined one job, and return the result of each rank.

    The function is found by its module's name in the processes, so it is one of a module that they can import, such as
    `helpers.something`. Results are whatever torch saves.

    Raises:
        AssertionError: if a process raised, died, or was not done in time; none is left running.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(count)]
        store = Path(folder) / "store"
        processes = [
            _CONTEXT.Process(target=_work, args=(end, store, rank, count, timeout, function, args), daemon=True)
            for rank, (_, end) in enumerate(pipes)
        ]
        try:
            for process, (_, end) in zip(processes, pipes, strict=True):
                process.start()
                end.close()  # so that the death of a process is seen as the end of its pipe
            return _collected([ours for ours, _ in pipes], time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collected(ends: list[Connection], deadline: float) -> list[Any]:
    """Return what each process sends; raise at the first error, because the others would wait for that process."""
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        open_ends = [end for rank, end in enumerate(ends) if rank not in results]
        ready = wait(open_ends, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(set(range(len(ends))) - set(results))} of {len(ends)} were not done in time"
        for end in ready:
            rank = ends.index(end)  # type: ignore[arg-type]
            try:
                error, content = end.recv()  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert error is None, f"rank {rank} raised:\n{error}"
            results[rank] = torch.load(io.BytesIO(content), weights_only=False)
    return [results[rank] for rank in range(len(ends))]


def _work(
    end: Connection, store: Path, rank: int, count: int, timeout: float, function: Callable[..., Any], args: Any
) -> None:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # Accelerate asks; the job is there already
    os.environ["OMP_NUM_THREADS"] = "1"  # as torchrun does; Accelerate warns where it has to
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as in the suite
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=timeout)
        )
        file = io.BytesIO()
        torch.save(function(*args), file)
        end.send((None, file.getvalue()))
        dist.destroy_process_group()
    except BaseException:
        end.send((traceback.format_exc(), None))
