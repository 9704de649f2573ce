"""The losses by hand and against references, and what each loss teaches the router and the experts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import helpers.kinds  # noqa: F401  registers kinds of routers and experts
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import config, images, layers, perturb_experts, randomise, upcycle, vit
from timm.layers import Mlp
from torch import Tensor, nn

import vimoe
from vimoe.moe.router import TokenLayout


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


def test_entropy_loss_by_hand() -> None:
    even, sure = [0.25] * 4, [1 - 3e-9, 1e-9, 1e-9, 1e-9]
    assert vimoe.entropy_loss([routing([even, even])]).item() == pytest.approx(math.log(4))
    assert vimoe.entropy_loss([routing([sure])]).item() == pytest.approx(0, abs=1e-6)
    assert vimoe.entropy_loss([routing([even, sure])]).item() == pytest.approx(math.log(4) / 2)


def test_a_probability_that_rounds_to_0_has_a_finite_gradient() -> None:
    logits = torch.tensor([[0.0, -500.0], [300.0, 0.0]], requires_grad=True)
    record = vimoe.Routing(logits, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.long), "image", (2, 5))
    (vimoe.entropy_loss([record]) + vimoe.variance_loss([record])).backward()
    assert torch.isfinite(logits.grad).all()


def test_variance_loss_by_hand() -> None:
    # means (0.5, 0.5): each expert deviates by 0.3 in both rows
    assert vimoe.variance_loss([routing([[0.8, 0.2], [0.2, 0.8]])]).item() == pytest.approx(-0.09)
    assert vimoe.variance_loss([routing([[0.8, 0.2], [0.8, 0.2]])]).item() == pytest.approx(0)
    own = torch.eye(4).clamp(min=1e-12).tolist()  # every expert has rows of its own
    assert vimoe.variance_loss([routing(own)]).item() == pytest.approx(-3 / 16)


def entropy_reference(logits: Tensor) -> Tensor:
    total = 0.0
    for row in logits:
        p = row.exp() / row.exp().sum()
        total = total - sum(each * each.log() for each in p)
    return total / len(logits)


def variance_reference(logits: Tensor) -> Tensor:
    p = torch.stack([row.exp() / row.exp().sum() for row in logits])
    total = 0.0
    for expert in range(p.shape[1]):
        mean = sum(p[:, expert]) / len(p)
        total = total - sum((each - mean) ** 2 for each in p[:, expert])
    return total / p.numel()


@pytest.mark.parametrize(
    ("loss", "reference"),
    [(vimoe.entropy_loss, entropy_reference), (vimoe.variance_loss, variance_reference)],
    ids=["entropy", "variance"],
)
def test_losses_of_scores_and_their_gradients_are_those_of_the_reference(loss, reference) -> None:
    found = []
    for compute in (loss, reference):
        logits = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        experts = logits.detach().argmax(-1, keepdim=True)
        record = vimoe.Routing(logits, torch.ones(7, 1), experts, "image", (7, 5))
        value = compute([record]) if compute is loss else compute(logits)
        value.backward()
        found.append((value.detach(), logits.grad))
    torch.testing.assert_close(found[0], found[1])


def outputs_of_tokens(x: Tensor, weights: list[list[Tensor]], experts: Tensor) -> Iterator[list[Tensor]]:
    """The outputs of each token's experts; arguments as of `orthogonal_reference`."""
    for token, own in zip(x.flatten(0, 1), experts.flatten(0, 1).tolist(), strict=True):
        of_each = [[w[e] for w in weights] for e in own if e >= 0]
        yield [fc2 @ F.gelu(fc1 @ token + b1) + b2 for fc1, b1, fc2, b2 in of_each]


def orthogonal_reference(x: Tensor, weights: list[list[Tensor]], experts: Tensor) -> Tensor:
    """Tokens (B, T, D) through maps fc1, b1, fc2, b2 of each expert (-1 is none); experts (B, T, K)."""
    total = 0.0
    for outputs in outputs_of_tokens(x, weights, experts):
        for j, one in enumerate(outputs):
            for k, other in enumerate(outputs):
                if j != k:
                    projected = (one @ other) ** 2 / (other @ other + 1e-6)
                    total = total + projected
    return total / (x.shape[0] * x.shape[1])


def test_outputs_that_are_orthogonal_lose_nothing_and_copies_the_most() -> None:
    record = routing([[0.6, 0.4]], k=2)
    for outputs, expected in (([[3.0, 0.0], [0.0, 2.0]], 0.0), ([[3.0, 0.0], [3.0, 0.0]], 18.0)):
        y = torch.tensor(outputs).view(1, 2, 1, 2)
        assert vimoe.orthogonal_loss([replace(record, outputs=y)]).item() == pytest.approx(expected)


def mutual_reference(x: Tensor, weights: list[list[Tensor]], experts: Tensor) -> Tensor:
    """Arguments as of `orthogonal_reference`."""
    total = 0.0
    for outputs in outputs_of_tokens(x, weights, experts):
        if outputs:
            mean = sum(outputs) / len(outputs)
            total = total + sum(((y - mean) ** 2).mean() for y in outputs) / len(outputs)
    return total / (x.shape[0] * x.shape[1])


OF_OUTPUTS = {
    "orthogonal": (vimoe.orthogonal_loss, orthogonal_reference),
    "mutual": (vimoe.mutual_loss, mutual_reference),
}


@pytest.mark.parametrize("name", ["orthogonal", "mutual"])
@pytest.mark.parametrize("router", ["softmax", "threshold"])
@pytest.mark.parametrize("unit_", ["image", "token"])
def test_losses_of_outputs_and_their_gradients_are_those_of_the_reference(unit_: str, router: str, name: str) -> None:
    """Of a router with empty slots too."""
    settings = vimoe.MoEConfig(num_experts=4, top_k=3, routing=unit_, router=router)
    torch.manual_seed(0)
    layer = vimoe.MoE(Mlp(6, 8), settings, TokenLayout(num_prefix_tokens=1, class_token=True)).double()
    randomise(layer, 1, 3.0)
    x = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    inputs = [x, *layer.experts.parameters()]
    with vimoe.record(layer, outputs=True) as routings:
        layer(x)
    (record,) = routings
    assert router == "softmax" or (record.experts < 0).any()
    compute, reference = OF_OUTPUTS[name]
    loss = compute(routings)
    e = layer.experts
    maps = [e.fc1.weight, e.fc1.bias, e.fc2.weight, e.fc2.bias]
    by_token = record.experts.view(3, -1, record.experts.shape[1]).expand(3, 5, -1)
    expected = reference(x, maps, by_token)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, inputs) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_outputs_that_are_alike_lose_nothing_and_an_empty_slot_does_not_count() -> None:
    record = routing([[0.6, 0.4]], k=2)
    for outputs, expected in (([[3.0, 1.0], [3.0, 1.0]], 0.0), ([[3.0, 0.0], [1.0, 0.0]], 0.5)):
        y = torch.tensor(outputs).view(1, 2, 1, 2)
        assert vimoe.mutual_loss([replace(record, outputs=y)]).item() == pytest.approx(expected)
    alone = replace(
        record, outputs=torch.tensor([[3.0, 1.0], [0, 0]]).view(1, 2, 1, 2), experts=torch.tensor([[0, -1]])
    )
    assert vimoe.mutual_loss([alone]).item() == 0


def test_losses_of_outputs_say_what_they_need() -> None:
    with pytest.raises(vimoe.VimoeError, match="mutual_loss of 1 expert of each token: expected at least 2"):
        vimoe.mutual_loss([routing([[0.6, 0.4]])])
    with pytest.raises(vimoe.VimoeError, match="the outputs of the experts were not recorded.*sends tokens to"):
        vimoe.orthogonal_loss([routing([[0.6, 0.4]], k=2)])
    with pytest.raises(vimoe.VimoeError, match="of 1 expert of each token: expected at least 2; set moe.top_k=2"):
        vimoe.orthogonal_loss([routing([[0.6, 0.4]])])


def test_the_distill_loss_and_its_gradient_are_those_of_the_reference() -> None:
    """Of classes (B, C), and of pixels (B, C, H, W)."""
    for shape in ((5, 3), (2, 3, 4, 2)):
        generator = torch.Generator().manual_seed(0)
        ours, theirs, teacher = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
        theirs = ours.clone().requires_grad_()
        ours, teacher = ours.requires_grad_(), teacher.requires_grad_()
        loss, expected = vimoe.distill_loss(ours, teacher), torch.zeros((), dtype=torch.float64)
        rows = [scores.movedim(1, -1).reshape(-1, 3) for scores in (theirs, teacher.detach())]
        for student, master in zip(*rows, strict=True):
            s, t = (row.exp() / row.exp().sum() for row in (student, master))
            expected = expected + sum(t[c] * (t[c] / s[c]).log() for c in range(3)) / len(rows[0])
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert teacher.grad is None


@pytest.mark.parametrize("combine", ["mix", "sum"])
@pytest.mark.parametrize("unit_", ["image", "token"])
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_all_experts_are_weighted_by_their_probabilities(unit_: str, combine: str, router: str) -> None:
    """Those of independent scores are divided by their sum, or four experts would weigh twice the shared one."""
    settings = vimoe.MoEConfig(num_experts=4, routing=unit_, combine=combine, gate="choice", router=router)
    torch.manual_seed(0)
    layer = vimoe.MoE(Mlp(6, 8), settings, TokenLayout(num_prefix_tokens=1, class_token=True)).double().eval()
    randomise(layer, 1)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    before = layer(x)
    with vimoe.all_experts(layer):
        together = layer(x)
    assert torch.equal(layer(x), before) and not torch.allclose(together, before)
    read = x if unit_ == "token" else x[:, :1]
    scores = read @ layer.router.weight.T
    p = scores.softmax(-1) if router == "softmax" else scores.sigmoid() / scores.sigmoid().sum(-1, keepdim=True)
    shared, expected = layer.shared(x), layer.shared(x)
    for i in range(4):
        fc1, fc2 = layer.experts.fc1, layer.experts.fc2
        y = F.gelu(x @ fc1.weight[i].T + fc1.bias[i]) @ fc2.weight[i].T + fc2.bias[i]
        expected = expected + p[..., i : i + 1] * (y - shared if combine == "mix" else y)
    torch.testing.assert_close(together, expected)


@pytest.mark.parametrize("shared", [0, 1])
def test_all_experts_of_independent_scores_are_a_mean(shared: int) -> None:
    dense = vit()
    x = images(dense)
    parent = dense(x)
    model = upcycle(dense, config(router="sigmoid", num_shared_experts=shared, top_k=2))
    with vimoe.all_experts(model), vimoe.record(model) as routings:
        torch.testing.assert_close(model(x), parent, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(routings[0].gates.sum(dim=1), torch.ones(len(x)))


def test_blocks_of_all_experts_may_be_nested() -> None:
    model = upcycle(vit(), config())
    with vimoe.record(model) as routings:
        with vimoe.all_experts(model):
            with vimoe.all_experts(model):
                model(images(model))
            model(images(model))
        model(images(model))
    assert [routing.experts.shape[1] for routing in routings] == [4] * (len(routings) // 3 * 2) + [1] * (
        len(routings) // 3
    )


LOSSES = [
    vimoe.balance_loss,
    vimoe.importance_loss,
    vimoe.router_z_loss,
    vimoe.entropy_loss,
    vimoe.variance_loss,
]


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
    assert after < before - 1e-7


@pytest.mark.parametrize("loss", [*LOSSES, vimoe.orthogonal_loss, vimoe.mutual_loss])
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


def taught(weight: float) -> tuple[float, float]:
    """Distance of all experts' outputs from their mean, and of the merged model's logits from the mixture's."""
    torch.manual_seed(0)
    model = perturb_experts(upcycle(vit(), config(top_k=2))).train()
    x, labels = images(model, batch=10), torch.arange(10) % 5
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(50):
        with vimoe.record(model, outputs=True) as routings:
            loss = F.cross_entropy(model(x), labels) + weight * vimoe.mutual_loss(routings)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        with vimoe.all_experts(model.eval()), vimoe.record(model, outputs=True) as routings:
            model(x)
        mixture = model(x)
        gap = (vimoe.densify(model, how="merge")(x) - mixture).norm() / mixture.norm()
    return vimoe.mutual_loss(routings).item() ** 0.5, gap.item()


def test_the_more_experts_learn_from_one_another_the_nearer_they_end() -> None:
    """And the mean of their weights is nearer to the mixture than without."""
    distances, gaps = zip(*map(taught, (0.0, 0.1, 0.3, 1.0)), strict=True)
    assert distances == tuple(sorted(distances, reverse=True)) and distances[-1] < distances[0] / 3
    assert max(gaps[1:]) < 0.8 * gaps[0]
