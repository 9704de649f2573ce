"""In a job of one process nothing waits, and nothing changes. For two: stories/test_a_second_process.py."""

from __future__ import annotations

import pytest
import torch

from vimoe.errors import VimoeError
from vimoe.process import Process


def test_alone_nothing_changes() -> None:
    process, tensor = Process(), torch.tensor([1.0])
    assert (process.rank, process.count, process.first) == (0, 1, True)
    assert process.sum(tensor) is tensor and process.any(True) and not process.any(False)
    assert process.once(lambda: 3) == process.broadcast(3) == 3
    with process.first_then_others():
        process.barrier()
    with pytest.raises(VimoeError, match="its own"):
        process.once(_refuse)


def _refuse() -> None:
    raise VimoeError("its own")
