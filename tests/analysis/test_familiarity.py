"""Familiarity: what is unlike the training images has large errors, and the score is a share of validation images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from vimoe.analysis.familiarity import Familiarity
from vimoe.analysis.trust import auroc


def digits() -> Tensor:
    images = torch.from_numpy(load_digits().data).float()
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def fitted() -> Familiarity:
    return Familiarity(64, 400).fit(digits()[:1000], digits()[1000:1400])


def test_digits_are_told_from_noise(fitted: Familiarity) -> None:
    known, random = digits()[1400:], torch.Generator().manual_seed(1)
    noise = 16 * torch.rand(397, 64, generator=random)
    strange = known[:, torch.randperm(64, generator=random)]  # the same grey values at other places
    right = np.repeat([True, False], 397)
    for other in (noise, strange):
        with torch.no_grad():
            assert auroc(fitted(torch.cat([known, other])).numpy(), right) > 0.95


def test_the_score_is_the_share_of_validation_images_that_are_no_more_familiar(fitted: Familiarity) -> None:
    some = torch.cat([digits()[:5], digits()[1000:1005], 99 * torch.ones(1, 64)])
    with torch.no_grad():
        errors, known = fitted.error(some), fitted.error(digits()[1000:1400])
        counted = (1 + (known >= errors[:, None]).sum(dim=1)) / 401
        torch.testing.assert_close(fitted(some), counted)
        assert fitted(some)[-1] == pytest.approx(1 / 401)
        ranks = fitted(digits()[1400:])  # of images like those of validation
    assert all(abs((ranks <= t).float().mean() - t) < 0.08 for t in (0.1, 0.5, 0.9))


def test_the_target_never_changes_and_the_predictor_learns_it_where_it_was_trained(fitted: Familiarity) -> None:
    fresh, x = Familiarity(64, 400), digits()
    before = {name: p.clone() for name, p in fresh.target.state_dict().items()}
    with torch.no_grad():  # fit needs gradients whatever is around it
        fresh.mean.copy_(fitted.mean)
        fresh.std.copy_(fitted.std)
        untrained = fresh.error(x[:1000]).mean()
        fresh.fit(x[:1000], x[1000:1400])
        assert fresh.error(x[:1000]).mean() < 0.2 * untrained
    assert all(torch.equal(p, before[name]) for name, p in fresh.target.state_dict().items())
    assert not any(p.requires_grad for p in fresh.target.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), fitted.state_dict().values(), strict=True)
    )


def test_another_seed_has_other_networks() -> None:
    first, second = (Familiarity(8, 0, seed).target[0].weight for seed in (0, 1))
    assert not torch.equal(first, second)
