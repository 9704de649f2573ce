"""The start "drop": a share of each expert's hidden units is drawn anew."""

from __future__ import annotations

import torch

from vimoe.moe import ffn_weights
from vimoe.moe.experts import Experts
from vimoe.moe.router import Router
from vimoe.moe.start import Calibration, Start


class Drop(Start):
    """Drop-Upcycling (arXiv 2502.19261): copies that lose a share r of their hidden units, each expert other ones.

    For each expert round(r F) hidden units are drawn, the same in all of its matrices: rows of the first one (of both
    halves of a gated FFN), columns of the last. Each matrix' dropped weights are drawn anew from a normal distribution
    with the mean and the standard deviation of these weights. r = 0 is the start "copy".

    The source has FFNs without biases. Here a bias of the first matrix, and a scale or shift of an inner norm, belong
    to their hidden unit and are drawn likewise. The output bias belongs to none and stays. The indices are shared
    between matrices as in the paper's text; the released code is said to draw them for each matrix.
    """

    keeps_function = False
    sets_weights = True

    @torch.no_grad()
    def __call__(self, experts: Experts, router: Router, seen: Calibration | None) -> None:
        hidden = experts.kind.hidden
        count = round(self.config.drop_ratio * hidden)
        for e in range(experts.num_experts if count else 0):
            weights = {name: w.clone() for name, w in experts.weights(e).items()}
            dropped = torch.randperm(hidden)[:count]
            for units in ffn_weights.by_unit(weights, experts.kind.gated):
                old = units[dropped].to(torch.promote_types(units.dtype, torch.float32))
                units[dropped] = (old.mean() + old.std(correction=0) * torch.randn_like(old)).to(units.dtype)
            experts.set_weights(e, weights)
