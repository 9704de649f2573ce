"""Kinds of routers and experts that tests register, each with the naive loop that it is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vimoe
from vimoe.config.moe import EXPERTS, ROUTERS
from vimoe.moe import ffn
from vimoe.moe.experts import Experts, Role
from vimoe.moe.ffn_weights import Weights
from vimoe.moe.router import Router

RANK = 2


class Threshold(Router):
    """Every expert whose sigmoid score is above 1/2, as in DynMoE; so none, or all of them."""

    ragged = adjustable = True

    @property
    def slots(self) -> int:
        return self.config.num_experts

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def decide(self, logits: Tensor, batch: tuple[int, int]) -> vimoe.Routing:
        gates = self.probabilities(logits)
        return self.assign(logits, gates, self.preferences(gates.detach()) > 0.5, batch)


class LowRank(Experts):
    """One base that all experts share, and a difference of low rank; `forward` is the inherited loop over `weights`."""

    def __init__(self, dense: nn.Module, config: vimoe.MoEConfig) -> None:
        super().__init__(dense, config)
        n = config.num_experts
        self.base = nn.ParameterDict(
            {name.replace(".", "_"): nn.Parameter(w.detach().clone()) for name, w in ffn.read(dense).items()}
        )
        for layer in ("fc1", "fc2"):
            outputs, inputs = self.base[f"{layer}_weight"].shape
            self.register_parameter(f"{layer}_a", nn.Parameter(0.1 * torch.randn(n, RANK, inputs)))
            self.register_parameter(f"{layer}_b", nn.Parameter(torch.zeros(n, outputs, RANK)))

    @property
    def roles(self) -> dict[str, Role]:
        names = [name for name, _ in self.named_parameters()]
        return {n: Role(n.endswith(("weight", "_a", "_b")), per_expert=not n.startswith("base.")) for n in names}

    def weights(self, expert: int) -> Weights:
        return low_rank_weights(dict(self.named_parameters()), expert)


def low_rank_weights(own: dict[str, Tensor], e: int) -> dict[str, Tensor]:
    """Canonical weights of an expert, from the parameters of `LowRank` by name."""
    weights = {n.removeprefix("base.").replace("_", "."): w for n, w in own.items() if n.startswith("base.")}
    for layer in ("fc1", "fc2"):
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + own[f"{layer}_b"][e] @ own[f"{layer}_a"][e]
    return weights


class Scaled(Experts):
    """The dense FFN with a scale on each output channel: experts that say that they are no FFNs."""

    are_ffns = False

    def __init__(self, dense: nn.Module, config: vimoe.MoEConfig) -> None:
        super().__init__(dense, config)
        self.dense = ffn.build(dense, ffn.read(dense))
        self.scale = nn.Parameter(torch.ones(config.num_experts, self.kind.dim))

    @property
    def roles(self) -> dict[str, Role]:
        shared = {n: Role(p.ndim == 2, per_expert=False) for n, p in self.named_parameters()}
        return {**shared, "scale": Role(matrix=False)}

    def forward(self, x: Tensor, source: Tensor | None, load: Tensor) -> Tensor:
        rows = x if source is None else x[source]
        expert = torch.repeat_interleave(load, output_size=len(rows))
        return self.dense(rows) * self.scale[expert][:, None]

    @property
    def macs(self) -> int:
        return ffn.macs(self.dense)


ROUTERS["threshold"] = Threshold
EXPERTS.update({"low_rank": LowRank, "scaled": Scaled})


def threshold(scores: list[Tensor], top_k: int) -> list[dict[int, Tensor]]:
    """The decisions of `Threshold` for an image, with its own weights."""
    gates = [[1 / (1 + (-s).exp()) for s in token] for token in scores]
    return [{i: gate for i, gate in enumerate(token) if gate > 0.5} for token in gates]


def expert_choice(scores: list[Tensor], top_k: int) -> list[dict[int, Tensor]]:
    """The decisions of vimoe's "expert_choice" for an image, with its own weights."""
    weights = [F.softmax(token, dim=0) for token in scores]
    decided: list[dict[int, Tensor]] = [{} for _ in scores]
    capacity = max(1, round(top_k * len(scores) / len(scores[0])))
    for e in range(len(scores[0])):
        for t in sorted(range(len(scores)), key=lambda t: -weights[t][e].item())[:capacity]:
            decided[t][e] = weights[t][e]
    return decided


DECIDE = {"threshold": threshold, "expert_choice": expert_choice}
UNITS: list[tuple[str, str]] = [("threshold", "image"), ("threshold", "token"), ("expert_choice", "token")]
