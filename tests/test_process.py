"""In a job of one process nothing waits, and nothing changes. For two: stories/test_a_second_process.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vimoe.errors import ConfigError, VimoeError
from vimoe.process import Alone, Process, joined, launched, others_ended


def test_alone_nothing_changes() -> None:
    process, tensor = Process(), torch.tensor([1.0])
    assert (process.rank, process.count, process.first) == (0, 1, True)
    assert process.sum(tensor) is tensor and process.any(True) and not process.any(False)
    assert process.once(lambda: 3) == process.broadcast(3) == 3
    with pytest.raises(VimoeError, match="its own"):
        process.once(_refuse)


def test_who_shares_with_nobody_joins_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    alone = Alone()
    assert (alone.rank, alone.count, alone.first) == (0, 1, True) and not torch.distributed.is_initialized()
    assert alone.merge({2: "c", 0: "a", 1: "b"}) == ["a", "b", "c"] and alone.gather(4) == [4]
    with pytest.raises(ConfigError, match="WORLD_SIZE=2"):  # it would join, and nobody says where
        joined()
    monkeypatch.delenv("RANK")
    assert isinstance(joined(), Alone)


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


@pytest.mark.parametrize(
    ("environment", "count"),
    [({}, 1), ({"WORLD_SIZE": "2"}, 1), ({"WORLD_SIZE": "2", "RANK": "1"}, 2), ({"WORLD_SIZE": "all", "RANK": "0"}, 1)],
)
def test_a_launcher_says_the_rank_too(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], count: int) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == count


@pytest.mark.parametrize("rank", [{}, {"RANK": "1"}])
def test_several_that_cannot_meet_do_not_train_alone(monkeypatch: pytest.MonkeyPatch, rank: dict[str, str]) -> None:
    """As in a job of a cluster whose script sets a part of what torchrun would."""
    for name, value in {"WORLD_SIZE": "4", **rank}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="WORLD_SIZE=4 .* start it by torchrun"):
        Process()


def test_an_error_that_names_a_file_is_not_one_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    waited = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert others_ended(waited) and others_ended(torch.distributed.DistNetworkError("timed out"))
    assert not others_ended(OSError("/data/gloo/1.jpg")) and not others_ended(RuntimeError("/data/igloo/1.jpg"))
    monkeypatch.delenv("RANK")
    assert not others_ended(waited)  # nobody waits for a process that is alone
