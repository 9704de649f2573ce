"""The start "noise": copies with normal noise on their matrices."""

from __future__ import annotations

import torch

from vimoe.moe import ffn_weights
from vimoe.moe.experts import Experts
from vimoe.moe.router import Router
from vimoe.moe.start import Calibration, Start


class Noise(Start):
    """W_e = W + s std(W) Z with Z standard normal, for each expert e and each of its matrices W; s is `noise_std`.

    The halves of a gated FFN's first matrix are two matrices. Biases and norms stay. Sparse upcycling (arXiv
    2212.05055) tried noise on the copies: a little did not help, and much of it hurt.
    """

    keeps_function = False
    sets_weights = True

    @torch.no_grad()
    def __call__(self, experts: Experts, router: Router, seen: Calibration | None) -> None:
        for e in range(experts.num_experts):
            weights = {name: w.clone() for name, w in experts.weights(e).items()}
            for units in ffn_weights.by_unit(weights, experts.kind.gated):
                if units.ndim == 2:  # a matrix; vectors are biases and norms
                    units += (
                        self.config.noise_std
                        * units.to(torch.promote_types(units.dtype, torch.float32)).std(correction=0)
                        * torch.randn_like(units)
                    )
            experts.set_weights(e, weights)
