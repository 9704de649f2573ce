"""The router "superclass" gives each group of classes an expert, from the first step and by a loss."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from helpers.tiny import config, images, perturb_experts, vit
from torch import Tensor, nn

import vimoe
from vimoe.errors import ConfigError
from vimoe.moe.layer import moe_layers
from vimoe.moe.router import TokenLayout
from vimoe.moe.routers.superclass import SuperclassRouter
from vimoe.moe.start import Calibration

DIM = 16


def seen(images: int = 12, classes: int = 6, absent: int = 0, seed: int = 0) -> Calibration:
    """Features of which classes c and c + 3 are near each other; the last classes are in no image."""
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(classes).repeat_interleave(images)
    x = 8 * torch.eye(classes // 2, DIM)[label % (classes // 2)] + torch.eye(2, DIM).flip(1)[label // (classes // 2)]
    x = x + torch.randn(len(x), DIM, generator=g)
    return Calibration(x, torch.arange(len(x)), label, x, classes + absent, lambda: iter(()))


def made(num_experts: int = 3, start: Calibration | None = None, **settings: object) -> SuperclassRouter:
    torch.manual_seed(0)
    chosen = config(router="superclass", num_experts=num_experts, **settings)
    router = SuperclassRouter(DIM, chosen, TokenLayout(1, True), like=torch.zeros(1))
    router.calibrate(start or seen())
    return router


def test_classes_that_are_confused_share_an_expert_and_their_images_go_there() -> None:
    router, unseen = made(), seen(seed=1)
    assert torch.equal(router.superclass[:3], router.superclass[3:]) and len(router.superclass.unique()) == 3
    routing = router.route(router.score(unseen.features), (len(unseen.features), 1))
    assert torch.equal(routing.experts[:, 0], router.superclass[unseen.labels])
    assert routing.gates.mean() > 0.5  # of three experts, fresh rows give each a third


def naive(scores: Tensor, targets: list[dict[int, float]], superclass: list[int]) -> Tensor:
    """-sum_i m_i log p_i of each image, m_i the mass of the classes of expert i; and the mean."""
    losses = []
    for row, masses in zip(scores, targets, strict=True):
        total = sum(score.exp() for score in row)
        losses.append(
            sum((-m * (row[superclass[c]].exp() / total).log() for c, m in masses.items() if superclass[c] >= 0),
                scores.sum() * 0)
        )  # fmt: skip
    return sum(losses) / len(losses)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_is_the_cross_entropy_of_the_super_class(mixed: bool) -> None:
    router = made().double()
    router.superclass = torch.tensor([2, 0, 1, 0, -1, 2])
    labels = torch.tensor([0, 5, 3, 4])
    targets = [{int(c): 1.0} for c in labels]
    if mixed:
        targets = [{0: 0.7, 4: 0.2, 1: 0.1}, {5: 0.5, 0: 0.5}, {3: 1.0}, {4: 1.0}]
        labels = torch.tensor([[row.get(c, 0.0) for c in range(6)] for row in targets])
    scores = [torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double().requires_grad_() for _ in range(2)]
    losses = router.label_loss(scores[0], labels), naive(scores[1], targets, router.superclass.tolist())
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, score)[0] for loss, score in zip(losses, scores, strict=True)]
    torch.testing.assert_close(*gradients)


def test_a_class_without_images_has_no_expert_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vimoe"):
        router = made(start=seen(absent=2))
    assert router.superclass[6:].tolist() == [-1, -1] and router.superclass[:6].min() == 0
    assert "2 of 8 classes are in no calibration image" in caplog.text
    torch.testing.assert_close(router.label_loss(torch.randn(2, 3), torch.tensor([6, 7])), torch.tensor(0.0))
    with caplog.at_level(logging.WARNING, "vimoe"):
        caplog.clear()
        made()
    assert not caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 7}, "num_experts=7 with router='superclass' and images of 6 classes: expected 2 experts"),
        ({"num_experts": 1}, "num_experts=1 .* expected 2 experts or more, and a class for each; change num_experts"),
        ({"start": seen(images=1)}, "6 calibration images of 6 classes .*: expected 2 or more of a class; raise"),
        ({"routing": "token"}, "router='superclass' with routing='token': expected routing='image'"),
    ],
)  # fmt: skip
def test_what_does_not_do_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        made(**settings)
    assert "\n" not in str(raised.value)


def parent() -> nn.Module:
    torch.manual_seed(0)
    return vit()


def upcycled() -> nn.Module:
    given = [(images(parent(), 10, seed), torch.arange(10) % 5) for seed in range(3)]
    return vimoe.upcycle(parent(), config(router="superclass", num_experts=2), given)


def test_the_function_is_kept_and_the_model_saved_copied_and_cast(tmp_path: Path) -> None:
    model, x = upcycled(), images(parent())
    with torch.no_grad():
        torch.testing.assert_close(model(x), parent()(x), rtol=1e-5, atol=1e-5)
        expected = perturb_experts(model)(x)
        loaded = vimoe.load(vimoe.save(model, tmp_path / "model"))
        torch.testing.assert_close(loaded(x), expected)
        torch.testing.assert_close(vimoe.densify(copy.deepcopy(model))(x), parent()(x), rtol=1e-5, atol=1e-5)
        assert copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16()).isfinite().all()
    for layer, again in zip(moe_layers(model).values(), moe_layers(loaded).values(), strict=True):
        assert layer.router.superclass.shape == (5,) and torch.equal(layer.router.superclass, again.router.superclass)
    cast = next(iter(moe_layers(copy.deepcopy(model).to(torch.bfloat16)).values())).router
    assert cast.superclass.dtype == torch.int64
    empty = upcycled()
    for layer in moe_layers(empty).values():
        layer.router.superclass.fill_(0)
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty.blocks[1].mlp.router.superclass, model.blocks[1].mlp.router.superclass)
    assert empty.blocks[1].mlp.router.superclass is not model.blocks[1].mlp.router.superclass


def test_classes_of_a_removed_expert_have_none() -> None:
    router = made()
    before, rows = router.superclass.tolist(), router.weight.detach().clone()
    router.keep([2, 0])
    assert router.superclass.tolist() == [{2: 0, 0: 1, 1: -1}[expert] for expert in before]
    assert torch.equal(router.weight, rows[[2, 0]])
    assert router.label_loss(torch.randn(6, 2), torch.arange(6)).isfinite()


def test_it_is_a_softmax_router_with_these_rows() -> None:
    """The softmax router is compared with a naive loop in tests/moe/test_layer.py."""
    model = perturb_experts(upcycled()).double()
    plain = vimoe.upcycle(vit(), config(num_experts=2)).double()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("superclass")}
    plain.load_state_dict(state)
    x = images(model).double()
    outputs = [each(x) for each in (model, plain)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
