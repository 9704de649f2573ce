"""Long tensors in chunks, so that float32 copies of a chunk stay in a CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = 2**17  # for each thread: half a megabyte of float32; a few of these fit in the caches of a core


def chunks(like: Tensor) -> Iterator[slice]:
    """Yield slices of the first axis; on a GPU one slice covers all of it."""
    rows = len(like)
    fit = ELEMENTS * torch.get_num_threads() * rows // max(1, like.numel()) if like.device.type == "cpu" else rows
    step = max(1, fit)
    return (slice(start, start + step) for start in range(0, rows, step))
