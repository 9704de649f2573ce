"""Losses at a few temperatures fit the same temperature as logits do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vimoe.analysis.temperatures import GRID, fit_on_grid, losses_on_grid
from vimoe.metrics.calibration import fit_temperature


def drawn(images: int, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of 5 classes, and labels drawn from the probabilities that the logits times 1 / scale give."""
    chance = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, 5, generator=chance)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=chance)[:, 0]
    return scale * logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_on_the_grid_are_cross_entropies(dtype: torch.dtype) -> None:
    logits, labels = drawn(20, 30.0)
    logits = logits.to(dtype)
    expected = [F.cross_entropy(logits.double() / T, labels, reduction="none") for T in GRID.tolist()]
    found = losses_on_grid(logits, labels)
    torch.testing.assert_close(found, torch.stack(expected, dim=1).float(), rtol=1e-5, atol=1e-5)
    assert GRID[0] == 1 / 8 and 1.0 in GRID and GRID[-1] == 8


@pytest.mark.parametrize("scale", [0.2, 1.0, 1.9, 6.0])
def test_between_temperatures_of_the_grid_the_fit_is_that_of_the_logits(scale: float) -> None:
    logits, labels = drawn(500, scale)
    T, losses = fit_on_grid(losses_on_grid(logits, labels).numpy())
    exact = fit_temperature(logits, labels)
    assert pytest.approx(exact, rel=5e-3) == T
    expected = F.cross_entropy(logits.double() / exact, labels, reduction="none").numpy()
    assert losses.mean() == pytest.approx(expected.mean(), abs=1e-5) and losses == pytest.approx(expected, abs=2e-2)


def test_the_grid_has_ends_and_equal_losses_have_equal_temperatures() -> None:
    logits, labels = drawn(30)
    right = losses_on_grid(F.one_hot(labels).float(), labels).numpy()
    wrong = losses_on_grid(-F.one_hot(labels).float(), labels).numpy()
    assert fit_on_grid(right)[0] == GRID[0] and fit_on_grid(wrong)[0] == GRID[-1]
    once = losses_on_grid(logits, labels).numpy()
    T, losses = fit_on_grid(once)
    again, repeated = fit_on_grid(once[:, None].repeat(7, axis=1))
    assert again == T and (repeated == losses[:, None]).all() and repeated.shape == (30, 7)
