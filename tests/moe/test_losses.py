"""The balancing losses by hand, and what each loss teaches the router and the experts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from torch import Tensor, nn

import vimoe


def routing(probabilities: list[list[float]], k: int = 1, shift: float = 1.0) -> vimoe.Routing:
    """The record of images with these probabilities; `shift` is the log-sum-exp of its logits."""
    logits = (torch.tensor(probabilities).log() + shift).requires_grad_()
    gates, experts = logits.softmax(-1).topk(k)
    return vimoe.Routing(logits, gates, experts, "image", (len(probabilities), 5))


def test_balance_loss_by_hand() -> None:
    # f = (2/3, 1/3), P = (0.8 + 0.6 + 0.1, 0.2 + 0.4 + 0.9) / 3 = (0.5, 0.5)
    assert vimoe.balance_loss([routing([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]])]).item() == pytest.approx(1.0)
    # f = (1, 0, 0), P = (0.75, 0.125, 0.125)
    collapsed = routing([[0.8, 0.1, 0.1], [0.7, 0.15, 0.15]])
    assert vimoe.balance_loss([collapsed]).item() == pytest.approx(3 * 0.75)
    # k = 2: f = (1, 0.5, 0.5), P = (0.5, 0.25, 0.25)
    assert vimoe.balance_loss([routing([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]], k=2)]).item() == pytest.approx(3 * 0.75)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_loss_is_k_at_perfect_balance(k: int) -> None:
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1])
    balanced = routing([scores.roll(i).tolist() for i in range(4)], k)
    assert balanced.load.tolist() == [k] * 4
    assert vimoe.balance_loss([balanced]).item() == pytest.approx(k)


def test_importance_loss_by_hand() -> None:
    # importance = (3, 1): mean 2, variance 1
    four = [[0.8, 0.2], [0.7, 0.3], [0.9, 0.1], [0.6, 0.4]]
    assert vimoe.importance_loss([routing(four)]).item() == pytest.approx(0.25)
    assert vimoe.importance_loss([routing([[0.8, 0.2], [0.2, 0.8]])]).item() == pytest.approx(0.0, abs=1e-9)


def test_router_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])  # log-sum-exp: log 2 and log 4
    record = vimoe.Routing(logits, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.long), "image", (2, 5))
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert vimoe.router_z_loss([record]).item() == pytest.approx(expected)


LOSSES = [vimoe.balance_loss, vimoe.importance_loss, vimoe.router_z_loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_average_over_layers(loss) -> None:
    one, other = routing([[0.8, 0.2], [0.7, 0.3]]), routing([[0.1, 0.9], [0.3, 0.7], [0.45, 0.55]], shift=2.0)
    assert loss([one]) != loss([other])
    torch.testing.assert_close(loss([one, other]), (loss([one]) + loss([other])) / 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_down_the_gradient_lowers_the_loss(loss) -> None:
    record = routing([[0.8, 0.15, 0.05], [0.7, 0.1, 0.2]])
    before = loss([record])
    before.backward()
    logits = (record.logits - 0.01 * record.logits.grad).detach()
    after = loss([vimoe.Routing(logits, record.gates, record.experts, "image", record.batch)])
    assert after < before - 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_recorded_is_an_error(loss) -> None:
    with pytest.raises(vimoe.VimoeError, match="no routing was recorded"):
        loss([])


# ----- in a model


@pytest.fixture(params=["image", "token"])
def unit(request: pytest.FixtureRequest) -> str:
    return request.param


def gradients(model: nn.Module, balance: float = 0.0, task: float = 1.0) -> list[vimoe.Routing]:
    """Backward of the weighted losses of ten images; returns the record."""
    model.zero_grad()
    with vimoe.record(model) as routings:
        logits = model(images(model, batch=10))
    loss = task * F.cross_entropy(logits, torch.arange(10) % 5) + balance * vimoe.balance_loss(routings)
    loss.backward()
    return routings


def norm(parameters: list[Tensor]) -> float:
    return torch.cat([p.grad.flatten() for p in parameters]).norm().item()


@pytest.mark.parametrize(("k", "shared"), [(1, 1), (2, 1), (2, 0), (1, 2)])
def test_the_task_trains_the_router_from_the_second_step_on(unit: str, k: int, shared: int) -> None:
    model = upcycle(vit(), config(routing=unit, top_k=k, num_shared_experts=shared)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    gradients(model)
    for layer in layers(model):  # experts agree, so it does not matter which one is chosen
        assert norm([layer.router.weight]) < 1e-6 * norm(list(layer.experts.parameters()))
    optimiser.step()
    gradients(model)
    for layer in layers(model):
        assert norm([layer.router.weight]) > 1e-6 * norm(list(layer.experts.parameters()))


def test_the_task_never_trains_a_router_whose_only_gate_is_one(unit: str) -> None:
    model = upcycle(vit(), config(routing=unit, top_k=1, num_shared_experts=0)).train()
    perturb_experts(model)
    gradients(model)
    for layer in layers(model):
        assert norm([layer.router.weight]) < 1e-6 * norm(list(layer.experts.parameters()))


def test_the_balance_loss_alone_moves_every_router_and_no_expert_of_the_last_layer(unit: str) -> None:
    model = upcycle(vit(), config(routing=unit)).train()
    gradients(model, balance=1.0, task=0.0)
    for layer in layers(model):
        assert norm([layer.router.weight]) > 1e-4
    assert norm(list(layers(model)[-1].experts.parameters())) == 0


def test_exactly_the_experts_that_received_something_get_a_gradient(unit: str) -> None:
    # pooled over all tokens: in the last block, a class token alone would be all that reaches the loss
    model = upcycle(vit(global_pool="avg"), config(routing=unit, num_experts=8)).train()
    with torch.no_grad():
        for layer in layers(model):  # the scores of expert 7 are below those of expert 0 or of expert 1
            layer.router.weight[7] = layer.router.weight[:2].mean(dim=0)
    perturb_experts(model)
    idle = 0
    for layer, record in zip(layers(model), gradients(model), strict=True):
        received = record.load > 0
        idle += (~received).sum()
        for p in layer.experts.parameters():
            assert torch.equal(p.grad.flatten(1).any(dim=1), received)
    assert idle
