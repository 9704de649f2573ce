"""Checkpoints that a job of one mesh writes and a job of another one reads: work of a process of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.parallel_work import adamw, batch, full, losses, model
from torch import Tensor, nn

from vimoe.config.parallel import ParallelConfig
from vimoe.errors import FolderError
from vimoe.parallel import checkpoint
from vimoe.parallel.checkpoint import load_checkpoint, save_checkpoint
from vimoe.parallel.mesh import make_mesh
from vimoe.parallel.parallelize import parallelize

SETTINGS: dict[str, Any] = {"routing": "token", "top_k": 2, "router": "cosine", "bias_update_rate": 0.1}
SHARES = 4  # of a global batch, so that losses are the same for 1, 2 and 4 processes


def start(parallel: dict[str, int] | None) -> tuple[nn.Module, torch.optim.AdamW]:
    """A model and an optimiser of one process (None) or of a mesh."""
    made = model(SETTINGS)
    if parallel is not None:
        parallelize(made, make_mesh(ParallelConfig(**parallel)))
    return made, adamw(made)


def steps(made: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """Train on the global batch, of which each process computes its parts."""
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in numbers:
        optimizer.zero_grad()
        images, labels = (each.chunk(SHARES) for each in batch(step))
        parts = range(rank * SHARES // count, (rank + 1) * SHARES // count)
        torch.stack([losses(made, images[i], labels[i]) for i in parts]).mean().backward()
        optimizer.step()


def go_on(
    parallel: dict[str, int] | None, numbers: range, read: Path | None, write: Path | None
) -> dict[str, Tensor] | None:
    """Go on from a checkpoint, train some steps and write another one; return the weights and the buffers."""
    made, optimizer = start(parallel)
    if read is not None:
        values = load_checkpoint(read, made, optimizer)
        assert values == {"step": numbers.start, "share": torch.tensor(0.5)}, values
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 / numbers.start] * len(optimizer.param_groups)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    steps(made, optimizer, numbers)
    if write is not None:
        for group in optimizer.param_groups:
            group["lr"] = 0.5 / numbers.stop
        save_checkpoint(write, made, optimizer, {"step": numbers.stop, "share": torch.tensor(0.5)})
    weights = {name: full(tensor) for name, tensor in made.state_dict().items()}
    return None if parallel and dist.get_rank() else weights


def fails(folder: Path) -> dict[str, Any]:
    """Write where the disk of one process is full, over a checkpoint that is there; return what came of it."""
    made, optimizer = start({"expert": 2})
    save_checkpoint(folder / "last", made, None, {"step": 1})
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank():
            patch.setattr(checkpoint.FileSystemWriter, "write_data", _full_disk)
        try:
            save_checkpoint(folder / "last", made, optimizer)
            message = "no error"
        except FolderError as error:
            message = str(error)
    dist.barrier()
    left = sorted(path.name for path in folder.iterdir())
    return {"message": message, "left": left, "values": load_checkpoint(folder / "last", made)}


def _full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")
