"""Long tensors taken piece by piece, so that what is computed in float32 on the way stays in a CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = 2**17  # for each thread: half a megabyte of float32, of which a few fit in the caches that a core has


def blocks(like: Tensor) -> Iterator[slice]:
    """Slices of the first axis; on a GPU one for all of it."""
    rows = len(like)
    fit = ELEMENTS * torch.get_num_threads() * rows // max(1, like.numel()) if like.device.type == "cpu" else rows
    step = max(1, fit)
    return (slice(start, start + step) for start in range(0, rows, step))
