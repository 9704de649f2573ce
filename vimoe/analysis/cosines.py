"""Cosines, correlations and means of what may be undefined, for comparisons of experts.

Axes: N vectors, P pairs of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-6  # what differs by less, relative to its size, is taken as equal


def cosines(gram: Tensor) -> Tensor:
    """(..., N, N) inner products to (..., P) cosines of all pairs; NaN where a vector is zero."""
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    i, j = torch.triu_indices(gram.shape[-1], gram.shape[-1], offset=1, device=gram.device)
    return (gram[..., i, j] / (norms[..., i] * norms[..., j])).clamp(-1, 1)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """(...,) correlations over the last axis of cosines or ranks; NaN where one is constant to rounding."""
    a, b = a - a.mean(dim=-1, keepdim=True), b - b.mean(dim=-1, keepdim=True)
    spread = torch.minimum(a.abs().amax(dim=-1), b.abs().amax(dim=-1))
    correlation = (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return torch.where(spread > ROUNDING, correlation.clamp(-1, 1), torch.nan)


def mean(values: Tensor) -> float | None:
    """Return the mean of the defined values, None without any."""
    defined = values[values.isfinite()]
    return defined.mean().item() if defined.numel() else None


def precise(w: Tensor) -> Tensor:
    """Return a tensor without gradient in float32 at least."""
    return w.detach().to(torch.promote_types(w.dtype, torch.float32))
