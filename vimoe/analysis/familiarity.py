"""Familiarity of an image: how well a small network, trained on the training images, predicts a random one.

Axes: B images, D features, V validation images, K outputs.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

WIDTH, WIDER = 256, 1024  # hidden units of target and predictor
OUTPUTS = 64  # K
STEPS, BATCH, RATE, DECAY = 600, 256, 1e-3, 1.0  # of AdamW


class Familiarity(nn.Module):
    """Random network distillation on features, with a score that is calibrated on validation.

    With z the features x, standardised by mean and standard deviation of the training images, a fixed random network t
    and a predictor p that is trained to give the same,

        error(x) = 1/K sum_k (p_k(z) - t_k(z))^2
        familiarity(x) = (1 + number of validation images v with error(v) >= error(x)) / (1 + V)

    p learns t where there are training images, and errs elsewhere. So 0.02 says that 98% of the validation images are
    more familiar. Images like those of validation have scores that are uniform in 0..1: of them, a threshold of 0.05
    rejects 5% (a conformal p-value).

    Source: Burda et al., random network distillation (arXiv 1810.12894), eq. 1: there of observations, for exploration.
    Widths, steps and decay are those, of some that were tried, with the least error on validation images of birds.
    SERL (arXiv 2007.10835) rewards an agent by such an error on demonstrations. Calibration is defined here.

    Attributes:
        target: the fixed random network t, D -> 256 -> K.
        predictor: the trained network p, D -> 1024 -> K.
        known: (V,) errors of the validation images, rising.

    Args:
        dim: D.
        known: V.
        seed: seed of both networks and of the order of training.
    """

    mean: Tensor
    std: Tensor
    known: Tensor

    def __init__(self, dim: int, known: int, seed: int = 0) -> None:
        super().__init__()
        self._random = torch.Generator().manual_seed(seed)
        self.target = _network(dim, [WIDTH], self._random).requires_grad_(False)
        self.predictor = _network(dim, [WIDER], self._random)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.register_buffer("known", torch.zeros(known))

    @torch.enable_grad()
    def fit(self, train: Tensor, validation: Tensor) -> Self:
        """Train the predictor on features (n, D) of training images, and calibrate by those (V, D) of validation."""
        self.mean.copy_(train.mean(dim=0))
        self.std.copy_(train.std(dim=0, correction=0).clamp(min=1e-6))
        optimizer = torch.optim.AdamW(self.predictor.parameters(), lr=RATE, weight_decay=DECAY)
        for _ in range(STEPS):
            rows = torch.randint(len(train), (BATCH,), generator=self._random)
            optimizer.zero_grad()
            self.error(train[rows]).mean().backward()
            optimizer.step()
        with torch.no_grad():
            self.known.copy_(self.error(validation).sort().values)
        return self

    def error(self, features: Tensor) -> Tensor:
        """Return (B,) the predictor's mean squared error for features (B, D)."""
        z = (features - self.mean) / self.std
        return (self.predictor(z) - self.target(z)).square().mean(dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B,) the familiarity, in 0..1, of images with features (B, D)."""
        less = torch.searchsorted(self.known, self.error(features))  # number of validation images with smaller errors
        return (1 + len(self.known) - less) / (1 + len(self.known))


def _network(dim: int, widths: list[int], random: torch.Generator) -> nn.Sequential:
    """Return linear maps with ReLU between them, orthogonal so that signals keep their size."""
    sizes = [dim, *widths, OUTPUTS]
    parts: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        linear = nn.Linear(inputs, outputs)
        nn.init.orthogonal_(linear.weight, gain=2**0.5, generator=random)
        nn.init.zeros_(linear.bias)
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])
