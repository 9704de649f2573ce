"""The temperature that fits a model best, from the losses of each image at a few temperatures.

`vimoe.metrics.calibration.fit_temperature` reads logits. Interventions are too many models for their logits to be kept,
so of each image the losses at the temperatures of GRID are kept instead, and `fit_on_grid` interpolates them.

Axes: B images of a batch, M temperatures of GRID.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from scipy.optimize import minimize_scalar
from torch import Tensor

GRID = 2.0 ** (np.arange(-9, 10) / 3)  # 1/8 to 8 in 18 steps


def losses_on_grid(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (B, M) the cross-entropy of softmax(logits / T) of each image for each T of GRID, in float32.

    Args:
        logits: (B, classes).
        labels: (B,) int64.
    """
    logits = logits.float()
    above = logits - logits.gather(1, labels[:, None])
    return torch.stack([(above / T).logsumexp(dim=1) for T in GRID.tolist()], dim=1)


def fit_on_grid(losses: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the temperature T within GRID with the lowest mean loss, and the loss of each image at T.

    Between the temperatures of GRID, losses follow a spline of degree 5 in log T. Its error for the mean loss is below
    1e-4 nats. T is rounded to three decimals, which costs less than that. So an intervention that changes nothing has
    the same T as the untouched model, whatever rounding does to the means.

    Args:
        losses: (..., M) from `losses_on_grid`; one temperature for all of them.

    Returns:
        T, and losses (...) in nats.
    """
    at = np.log(GRID)
    weights = make_interp_spline(at, np.eye(len(GRID)), k=5)  # of the losses at GRID, for any log T
    mean = losses.reshape(-1, len(GRID)).mean(axis=0, dtype=np.float64)
    found = minimize_scalar(lambda log: weights(log) @ mean, bounds=at[[0, -1]], method="bounded")
    temperature = round(math.exp(found.x), 3)
    return temperature, (losses * weights(math.log(temperature))).sum(axis=-1)
