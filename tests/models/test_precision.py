"""Which number format trains a model fastest on this machine, and who is told of a slow one."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.tiny import vit
from torch import nn

import vimoe
from vimoe.config.train import TrainConfig
from vimoe.models import precision
from vimoe.models.precision import has_bfloat16, resolve, warn_of_slow_bfloat16
from vimoe.models.segmenter import Segmenter

NARROW, WIDE = {"embed_dim": 96, "num_heads": 3}, {"embed_dim": 192, "num_heads": 3}

# what the machine has: device, bfloat16, what auto means for a narrow and for a wide model
MACHINES = {
    "a CPU with bfloat16": ("cpu", True, "no", "bf16"),
    "a CPU without": ("cpu", False, "no", "no"),
    "a GPU with bfloat16": ("cuda", True, "bf16", "bf16"),
    "a GPU without": ("cuda", False, "no", "no"),
    "another accelerator": ("mps", True, "no", "no"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_auto_is_bfloat16_where_it_is_known_to_be_faster(
    machine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device, native, narrow, wide = MACHINES[machine]
    monkeypatch.setattr(precision, "_device", lambda: device)
    monkeypatch.setattr(precision, "has_bfloat16", lambda: native)
    for shape, expected in ((NARROW, narrow), (WIDE, wide)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "vimoe"):
            resolved = resolve(TrainConfig(), vit(depth=1, **shape))
        assert resolved == TrainConfig(precision=expected)
        assert f"train.precision auto: {expected}, because" in caplog.text and len(caplog.records) == 1
        assert resolve(resolved, vit(depth=1, **shape)) is resolved and len(caplog.records) == 1


def test_auto_looks_at_the_vit_in_a_segmenter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "_device", lambda: "cpu")
    for shape, expected in ((NARROW, "no"), (WIDE, "bf16")):
        assert resolve(TrainConfig(), Segmenter(vit(num_classes=0, depth=1, **shape), 3)).precision == expected
    assert resolve(TrainConfig(), nn.Linear(2, 2)).precision == "no"  # whose width nothing says


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
def test_avx_512_alone_is_no_bfloat16(instructions: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's test passes it, which only asks whether oneDNN computes."""
    monkeypatch.setattr(precision, "_device", lambda: "cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    assert has_bfloat16() == (instructions and onednn)


@pytest.mark.parametrize("native", [True, False])
def test_who_asks_for_what_is_slow_is_told_so_once(
    native: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: native)
    monkeypatch.setattr(precision, "_device", lambda: "cpu")
    warn_of_slow_bfloat16.cache_clear()
    for _ in range(2):
        vimoe.optimize(vit(depth=1), torch.bfloat16)
    said = "vimoe.optimize to torch.bfloat16 is slow: this CPU has no bfloat16 and emulates it; leave dtype out"
    assert [record.getMessage() for record in caplog.records] == ([] if native else [said])
    vimoe.optimize(vit(depth=1))
    assert len(caplog.records) == (not native)
