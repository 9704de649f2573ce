"""A newcomer's router in this one file: a token gets every expert with a sigmoid score above a half, so 0 to N."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.commands import QUICK, TINY, call
from helpers.pictures import roles
from helpers.slow import one_in

import vimoe
from vimoe.config.moe import ROUTERS
from vimoe.moe.layer import moe_layers
from vimoe.moe.router import Router


class AnyNumber(Router):
    ragged = True

    @property
    def slots(self) -> int:
        return self.config.num_experts

    def decide(self, logits: torch.Tensor, batch: tuple[int, int]) -> vimoe.Routing:
        gates = logits.sigmoid()
        return self.assign(logits, gates, gates > 0.5, batch)


ROUTERS["any_number"] = AnyNumber


@pytest.mark.parametrize("routing", one_in(2, ["image", "token"]))
def test_it_goes_through_every_verb(
    routing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    moe = ["--moe.router=any_number", f"--moe.routing={routing}", "--moe.layers=all", "--moe.num_experts=4"]
    pooled = TINY[-1].replace("}", ', "class_token": false, "global_pool": "avg"}')  # class tokens are too alike
    settings = [*TINY[:-1], pooled, *QUICK, *moe]
    call(capsys, "train", "--data.path", roles(tmp_path / "photos"), *settings, "--out", run)
    model, images = vimoe.load(run / "model"), torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), vimoe.record(model) as routings:
        logits = model(images)
    numbers = torch.cat([(routing.experts >= 0).sum(dim=1) for routing in routings])
    assert numbers.min() == 0 and numbers.max() > 1
    torch.testing.assert_close(model(images[5:6]), logits[5:6])  # whatever is in its batch
    torch.testing.assert_close(vimoe.load(vimoe.save(model, tmp_path / "again"))(images), logits)

    evidence = call(capsys, "analyze", run, "--draws=2")
    assert all(sum(layer["load"]) == pytest.approx(1) and min(layer["gate_mass"]) >= 0 for layer in evidence["layers"])
    assert evidence["routes"]["possible"] == (2**4) ** 2
    call(capsys, "prune", run, "--tolerance=9", "--out", tmp_path / "dense")
    assert not moe_layers(vimoe.load(tmp_path / "dense" / "model"))
    monkeypatch.setattr("vimoe.analysis.pruning._Greedy.layers", lambda *_: ())  # as if no layer could go
    steps = call(capsys, "prune", run, "--tolerance=9", "--experts=true", "--out", tmp_path / "small")["steps"]
    left = moe_layers(vimoe.load(tmp_path / "small" / "model")).values()
    assert len(steps) == 6 and [layer.config.num_experts for layer in left] == [1, 1]
