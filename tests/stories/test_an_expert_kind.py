"""A newcomer's kind of experts in this one file: one base that all share, and a difference of low rank for each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.commands import QUICK, TINY, call
from helpers.pictures import roles
from helpers.slow import one_in
from torch import nn

import vimoe
from vimoe.config.moe import EXPERTS
from vimoe.moe import ffn
from vimoe.moe.experts import Experts, Role
from vimoe.moe.ffn_weights import Weights
from vimoe.moe.layer import moe_layers


class LowRank(Experts):
    def __init__(self, dense: nn.Module, config: vimoe.MoEConfig) -> None:
        super().__init__(dense, config)
        trained, n = config.experts == "low_rank_trained", config.num_experts
        self.base = nn.ModuleList([ffn.build(dense, ffn.read(dense)).requires_grad_(trained)])
        self.down = nn.Parameter(0.1 * torch.randn(n, 2, self.kind.dim))
        self.up = nn.Parameter(torch.zeros(n, self.kind.hidden, 2))

    @property
    def roles(self) -> dict[str, Role]:
        return {n: Role(matrix=p.ndim > 1, per_expert=n in ("up", "down")) for n, p in self.named_parameters()}

    def weights(self, expert: int) -> Weights:
        base = ffn.read(self.base[0])
        return {**base, "fc1.weight": base["fc1.weight"] + self.up[expert] @ self.down[expert]}


EXPERTS.update({"low_rank_trained": LowRank, "low_rank_frozen": LowRank})


@pytest.mark.parametrize(("routing", "base"), one_in(2, [("token", "trained"), ("image", "frozen")]))
def test_it_goes_through_every_verb(
    routing: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = [f"--moe.experts=low_rank_{base}", f"--moe.routing={routing}", "--moe.num_experts=4"]
    call(capsys, "train", "--data.path", roles(tmp_path / "photos"), *TINY, *QUICK, *moe, "--out", tmp_path / "run")
    model, images = vimoe.load(tmp_path / "run" / "model"), torch.randn(9, 3, 16, 16)
    torch.testing.assert_close(vimoe.load(vimoe.save(model, tmp_path / "again"))(images), model(images))
    own = [layer.experts.up.numel() + layer.experts.down.numel() for layer in moe_layers(model).values()]
    cost = vimoe.count(model)
    assert cost.params - cost.activated_params == sum(own) * 3 // 4  # one of four differences, and the base
    for layer in moe_layers(model).values():  # biases are 0 in the parent, until they are trained
        assert layer.experts.up.any() and layer.experts.base[0].fc1.bias.any() == (base == "trained")

    evidence = call(capsys, "analyze", tmp_path / "run", "--draws=2")
    assert all(set(layer["dense"]) == {"shared", "merge", "matched"} for layer in evidence["layers"])
    monkeypatch.setattr("vimoe.analysis.pruning._Greedy.layers", lambda *_: ())  # as if no layer could go
    call(capsys, "prune", tmp_path / "run", "--tolerance=9", "--experts=true", "--out", tmp_path / "small")
    small = vimoe.load(tmp_path / "small" / "model")
    assert [len(layer.experts.up) for layer in moe_layers(small).values()] == [1, 1]
