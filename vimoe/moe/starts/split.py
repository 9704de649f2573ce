"""The start "split": the hidden units of the FFN are parted among the experts, like with like.

Axes: N experts, F hidden units of the dense FFN, D channels.
"""

from __future__ import annotations

import torch

from vimoe.config.moe import MoEConfig
from vimoe.errors import ConfigError, SurgeryError
from vimoe.moe import ffn_weights
from vimoe.moe.experts import Experts
from vimoe.moe.kmeans import balanced_kmeans
from vimoe.moe.router import Router
from vimoe.moe.start import Calibration, Start


class Split(Start):
    """EMoE (arXiv 2310.10908): balanced k-means of the first matrix' rows gives each expert F / N hidden units.

    Rows are compared by cosine; of a gated FFN they are those of the gate's half, which says when a unit is active. A
    row of the router is the mean of its expert's rows (without biases), so that a score is the mean input of the
    expert's units, and trained by itself from then on. There are no other new parameters.

    Expert e has the last matrix k W_e and the whole output bias b. With gate="choice" each of the k chosen ones
    has the gate 1/k, so the layer computes sum_chosen W_e h_e + b: EMoE, which has gates of 1 and b / k. With top_k = N
    that is the dense FFN. With gate="probability" the chosen experts do not weigh equally.
    """

    keeps_function = False
    sets_weights = sets_rows = pieces = True

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        for name, expected in (("num_shared_experts", 0), ("combine", "mix")):
            if (value := getattr(config, name)) != expected:
                raise ConfigError(
                    f"{name}={value!r} with init='split', whose experts are the FFN itself, in parts: expected "
                    f"{expected!r}; set it, or use init='copy'"
                )

    def width(self, hidden: int) -> int:
        n = self.config.num_experts
        if self.config.expert_width is None and hidden % n:
            raise SurgeryError(
                f"num_experts={n} with init='split' of an FFN with {hidden} hidden units: expected a number that "
                f"divides them; use such as {next(m for m in range(min(n, hidden), 0, -1) if hidden % m == 0)}"
            )
        return self.config.expert_width or hidden // n

    def check(self, experts: Experts, router: Router, hidden: int) -> None:
        if experts.num_experts * experts.kind.hidden != hidden:
            raise SurgeryError(
                f"expert_width={experts.kind.hidden} with init='split' of {hidden} hidden units among "
                f"{experts.num_experts} experts: expected {hidden / experts.num_experts:g}; leave it out"
            )
        super().check(experts, router, hidden)

    @torch.no_grad()
    def __call__(self, experts: Experts, router: Router, seen: Calibration | None) -> None:
        n, gated = experts.num_experts, experts.kind.gated
        dense = ffn_weights.join([ffn_weights.scaled(experts.weights(e), 1 / n, 1 / n) for e in range(n)], gated)
        rows_FD = dense["fc1.weight"].chunk(1 + gated)[0]
        label_F = balanced_kmeans(rows_FD, n).to(rows_FD.device)
        for e in range(n):
            units = (label_F == e).nonzero()[:, 0]
            experts.set_weights(e, ffn_weights.scaled(ffn_weights.take(dense, units, gated), self.config.top_k, 1))
            router.weight[e] = rows_FD[units].mean(dim=0)
