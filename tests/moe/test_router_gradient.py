"""The gradient of routers from experts that were not chosen: beside the dense formula, and what must not change."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import helpers.kinds  # noqa: F401  registers kinds of routers and experts
import pytest
import torch
from helpers.mixing import DIM, EXPERTS, ffn, layer, of, tokens
from helpers.tiny import config, images, layers, perturb_experts, vit
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import vimoe
from vimoe.errors import SurgeryError
from vimoe.moe.router_gradient import DECAY

KINDS = ("default_vectors", "dense")
B = 0.5  # weight of the chosen experts together, with gate="choice"


def gates_of(layer: vimoe.MoE, scores: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Gates (R, N) of the chosen experts, and of all as if they were chosen."""
    p, k = scores.softmax(dim=1), chosen.sum(dim=1, keepdim=True)
    if layer.config.gate == "choice":
        return B / k + B * (p - p.detach()), B * p
    if layer.config.gate == "sigmoid":
        own = (scores + layer.router.gate.bias).sigmoid()
        return own, own
    return p, p


def reference(layer: vimoe.MoE, x: Tensor, vectors: Tensor | None) -> Tensor:
    """All experts of all tokens, those not chosen with the value 0; a vector, or its own output, stands for each."""
    image = layer.config.routing == "image"
    scores = (x[:, 0] if image else x.flatten(0, 1)) @ layer.router.weight.T
    best = scores.detach().topk(layer.config.top_k, dim=1).indices
    chosen = torch.zeros_like(scores).scatter(1, best, 1)
    used, of_all = gates_of(layer, scores, chosen)
    shape = (len(x), 1, EXPERTS) if image else (*x.shape[:2], EXPERTS)
    used, of_all, chosen = (each.view(shape) for each in (used, of_all, chosen))
    y = shared = torch.zeros_like(x) if layer.shared is None else ffn(of(layer, "shared"), x)
    for e in range(EXPERTS):
        change = ffn(of(layer, "experts", e), x)
        if layer.shared is not None and layer.config.combine == "mix":
            change = change - shared
        stands = (change if vectors is None else vectors[e]).detach()
        gate, is_chosen = of_all[..., e, None], chosen[..., e, None]
        y = y + is_chosen * used[..., e, None] * change + (1 - is_chosen) * (gate - gate.detach()) * stands
    return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", ["probability", "choice", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("routing", ["token", "image"])
@pytest.mark.parametrize("combine", ["mix", "sum"])
def test_outputs_and_gradients_are_those_of_the_dense_formula(
    combine: str, routing: str, k: int, gate: str, kind: str
) -> None:
    settings = {"combine": combine, "routing": routing, "top_k": k, "gate": gate}
    made, x = layer(**settings, router_gradient=kind), tokens().requires_grad_()
    plain = layer(**settings)
    y = made(x)
    assert torch.equal(y, plain(x))
    expected = reference(made, x, made.unchosen.mean if kind == "default_vectors" else None)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    gradients = [
        torch.autograd.grad((each * direction).sum(), [x, *of_.parameters()])
        for each, of_ in ((y, made), (expected, made), (plain(x), plain))
    ]
    torch.testing.assert_close(*gradients[:2], rtol=1e-9, atol=1e-12)
    names = [name for name, _ in made.named_parameters()]
    router = 1 + names.index("router.weight")
    assert (gradients[0][router] - gradients[2][router]).abs().max() > 1e-4, "other experts have no part in it"


@pytest.mark.parametrize("gate", ["probability", "choice", "sigmoid"])
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2])
def test_where_gates_sum_to_1_the_router_has_the_gradient_of_a_mixture_of_all_experts(
    k: int, router: str, gate: str
) -> None:
    """sum_j g_j E_j / sum_j g_j; so experts that are equal give the router no gradient."""
    settings = {"num_shared_experts": 0, "routing": "token", "top_k": k, "router": router, "gate": gate}
    made, x = layer(**settings, router_gradient="dense"), tokens()
    assert torch.equal(made(x), layer(**settings)(x))
    scores = x @ made.router.weight.T
    bias = made.router.gate.bias if gate == "sigmoid" else 0
    g = (scores + bias).sigmoid() if "sigmoid" in (router, gate) else scores.softmax(dim=-1)
    g = g / g.sum(dim=-1, keepdim=True)
    outputs = [ffn(of(made, "experts", e), x).detach() for e in range(EXPERTS)]
    mixture = sum(g[..., e, None] * outputs[e] for e in range(EXPERTS))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    found, expected = (torch.autograd.grad((y * direction).sum(), made.router.weight)[0] for y in (made(x), mixture))
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        for p in made.experts.parameters():
            p[:] = p[:1].clone()
    assert torch.autograd.grad((made(x) * direction).sum(), made.router.weight)[0].abs().max() < 1e-12


def test_vectors_are_means_of_what_experts_gave_over_three_steps() -> None:
    made = layer(routing="token", router_gradient="default_vectors")
    means = torch.zeros(EXPERTS, DIM, dtype=torch.float64)
    for step in range(3):
        x = tokens().roll(step, dims=2) * (step + 1)
        with torch.no_grad():
            rows = x.flatten(0, 1)
            chosen = (rows @ made.router.weight.T).argmax(dim=1)
            for e in chosen.unique().tolist():
                mine = rows[chosen == e]
                change = ffn(of(made, "experts", e), mine) - ffn(of(made, "shared"), mine)
                means[e] = DECAY * means[e] + (1 - DECAY) * change.mean(dim=0)
        made(x)
    torch.testing.assert_close(made.unchosen.mean, means, rtol=1e-9, atol=1e-12)
    assert means.any(dim=1).sum() > 1


def test_an_expert_without_tokens_keeps_its_vector() -> None:
    made = layer(routing="image", router_gradient="default_vectors")
    made.unchosen.mean += 1
    with torch.no_grad():
        made.router.weight.zero_()[1] = tokens()[0, 0]
    made(tokens()[:1])
    moved = (made.unchosen.mean != 1).any(dim=1)
    assert moved.tolist() == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_slots_that_stay_empty_count_as_not_chosen(kind: str) -> None:
    made, plain = (layer(router="threshold", routing="token", **more) for more in ({"router_gradient": kind}, {}))
    x, found = tokens(), []
    for each in (made, plain):
        with vimoe.record(each) as routings:
            found.append(each(x))
    assert torch.equal(*found)
    chosen = routings[0].chosen
    assert chosen.any() and not chosen.all()
    gradients = [
        torch.autograd.grad(y.sum(), each.router.weight)[0] for y, each in zip(found, (made, plain), strict=True)
    ]
    vectors = made.unchosen.mean if kind == "default_vectors" else None
    gates = (x.flatten(0, 1) @ plain.router.weight.T).sigmoid()
    outputs = [ffn(of(made, "experts", e), x) - ffn(of(made, "shared"), x) for e in range(EXPERTS)]
    stands = torch.stack(outputs, dim=2).flatten(0, 1) if vectors is None else vectors.expand(len(gates), -1, -1)
    extra = torch.autograd.grad((gates * ~chosen * stands.sum(dim=2).detach()).sum(), plain.router.weight)[0]
    torch.testing.assert_close(gradients[0], gradients[1] + extra, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_with_nothing_to_train_refuses_it(kind: str) -> None:
    with pytest.raises(SurgeryError, match=f"router_gradient='{kind}' with router='hash': expected 'chosen'"):
        layer(router="hash", routing="token", router_gradient=kind).check_start()
    layer(router="hash", routing="token", router_gradient=kind, gate="sigmoid").check_start()  # its bias learns


@pytest.mark.parametrize("training", [True, False])
def test_without_training_or_gradient_nothing_changes(training: bool) -> None:
    made = layer(routing="token", router_gradient="default_vectors").train(training)
    with torch.no_grad() if training else nullcontext():
        y = made(tokens())
    assert not made.unchosen.mean.any()
    plain = layer(routing="token")
    assert torch.equal(y, plain(tokens()))
    if not training:
        gradients = [torch.autograd.grad(each(tokens()).sum(), each.router.weight)[0] for each in (made, plain)]
        assert torch.equal(*gradients)


def test_checkpointing_moves_the_vectors_once_and_gives_the_same_gradient() -> None:
    found = []
    for run in (lambda made, x: made(x), lambda made, x: checkpoint(made, x, use_reentrant=False)):
        made = layer(routing="token", router_gradient="default_vectors")
        gradient = torch.autograd.grad(run(made, tokens().requires_grad_()).square().sum(), made.router.weight)[0]
        found.append((gradient, made.unchosen.mean))
    torch.testing.assert_close(*found)


def test_two_forwards_before_a_backward_pass() -> None:
    made = layer(routing="token", router_gradient="default_vectors")
    (made(tokens()).sum() + made(2 * tokens()).sum()).backward()
    assert made.router.weight.grad.isfinite().all()


def test_vectors_are_saved_kept_and_stay_precise(tmp_path: Path) -> None:
    model = vit()
    x, before = images(model), model(images(model))
    vimoe.upcycle(model, config(routing="token", router_gradient="default_vectors"))
    torch.testing.assert_close(model.train()(x), before, atol=1e-5, rtol=0)
    perturb_experts(model)(x)
    mean = layers(model)[0].unchosen.mean
    assert mean.any()
    loaded = vimoe.load(vimoe.save(model.eval(), tmp_path / "model"))
    assert torch.equal(layers(loaded)[0].unchosen.mean, mean)
    low = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(layers(low)[0].unchosen.mean, mean)
    assert low.train()(x.to(torch.bfloat16)).dtype == torch.bfloat16
    layers(model)[0].keep_experts([3, 1])
    assert torch.equal(layers(model)[0].unchosen.mean, mean[[3, 1]])
    assert model.train()(x).isfinite().all()


def test_a_router_with_constant_gates_is_trained_by_other_experts() -> None:
    made = layer(routing="token", num_shared_experts=0, router_gradient="dense")
    assert not made.router.blind and layer(routing="token", num_shared_experts=0).router.blind
    assert torch.autograd.grad(made(tokens()).sum(), made.router.weight)[0].abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_and_compiled(kind: str) -> None:
    made = layer(routing="token", router_gradient=kind, gate="choice").float()
    x = tokens().float()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    found = []
    for each in (made, compiled):
        for vectors in made.unchosen.buffers():
            vectors.zero_()
        found.append(torch.autograd.grad(each(x).square().sum(), made.router.weight)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_experts_keep_their_gradient(kind: str) -> None:
    """Experts that ran without gradient first would leave an autocast casts of their weights without gradient."""
    found = []
    for more in ({}, {"router_gradient": kind}):
        made = layer(routing="token", **more).float()
        with torch.autocast("cpu", torch.bfloat16):
            y = made(tokens().float())
        assert y.dtype == torch.bfloat16
        gradients = torch.autograd.grad(y.float().square().sum(), [made.router.weight, *made.experts.parameters()])
        found.append((y, *gradients[1:]))
        router = gradients[0]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert router.abs().max() > 0
