"""Predicted correctness: it finds what features say beyond the maximum probability, and no more than there is."""

from __future__ import annotations

import torch
from torch import Tensor

from vimoe.analysis.correctness import Correctness
from vimoe.analysis.trust import auroc
from vimoe.metrics.calibration import calibration_gaps


def known(number: int, seed: int, told: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, features and rightness; a feature says when the model is wrong, or (not told) probabilities say it."""
    random = torch.Generator().manual_seed(seed)
    features, logits = torch.randn(number, 6, generator=random), torch.randn(number, 3, generator=random) * 3
    best = logits.topk(2, dim=1).values
    odds = 3 * features[:, 2] if told else (best[:, 0] - best[:, 1]) / 2 - 0.5
    return logits, features, torch.rand(number, generator=random) < odds.sigmoid()


def test_a_feature_that_tells_of_mistakes_is_found() -> None:
    head = Correctness(6).fit(*known(500, 1, told=True))
    logits, features, right = known(500, 2, told=True)
    ours, plain = head(logits, features), logits.softmax(dim=1).amax(dim=1)
    assert auroc(ours.numpy(), right.numpy()) > 0.85
    assert auroc(plain.numpy(), right.numpy()) < 0.6
    assert calibration_gaps(ours, right).abs().sum() / 500 < 0.08


def test_probabilities_that_say_all_are_calibrated_and_as_good() -> None:
    head = Correctness(6).fit(*known(500, 1, told=False))
    logits, features, right = known(500, 2, told=False)
    ours, plain = head(logits, features), logits.softmax(dim=1).amax(dim=1)
    assert auroc(ours.numpy(), right.numpy()) > auroc(plain.numpy(), right.numpy()) - 0.03
    gaps = [calibration_gaps(score, right).abs().sum() / 500 for score in (ours, plain)]
    assert gaps[0] < 0.08 < gaps[1]


def test_certain_logits_stay_finite() -> None:
    head = Correctness(6).fit(*known(100, 1, told=False))
    certain = torch.tensor([[500.0, 0.0, 0.0]])
    assert head(certain, torch.zeros(1, 6)).isfinite().all() and head(certain, torch.zeros(1, 6)) > 0.5
