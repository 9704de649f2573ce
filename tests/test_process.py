"""In a job of one process nothing waits, and nothing changes. For two: stories/test_a_second_process.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vimoe.errors import VimoeError
from vimoe.process import Process


def test_alone_nothing_changes() -> None:
    process, tensor = Process(), torch.tensor([1.0])
    assert (process.rank, process.count, process.first) == (0, 1, True)
    assert process.sum(tensor) is tensor and process.any(True) and not process.any(False)
    assert process.once(lambda: 3) == process.broadcast(3) == 3
    with pytest.raises(VimoeError, match="its own"):
        process.once(_refuse)


def _refuse() -> None:
    raise VimoeError("its own")


def test_a_program_with_processes_of_its_own_is_not_made_to_wait() -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    code = (
        "import torch, timm, vimoe; model = vimoe.upcycle(timm.create_model('test_vit'), vimoe.MoEConfig(layers=[5]));"
        "vimoe.analyze(model, [(torch.randn(4, 3, 160, 160), torch.arange(4))], draws=1, progress=True);"
        "vimoe.optimize(model, torch.bfloat16); assert not torch.distributed.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **launched}, check=True, timeout=300)
