"""What every kind of router has to do, with every gate: start, folder, casts, removal of experts, analysis, pruning."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.layers import make, tokens
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from torch import nn

import vimoe
from vimoe.analysis.interventions import Without
from vimoe.config.moe import ROUTERS

LEARNT = ["softmax", "sigmoid", "cosine"]
CASES = [
    *((router, routing) for router in (*LEARNT, "random") for routing in ("image", "token")),
    ("hash", "token"),
    ("expert_choice", "token"),
]
every_kind = pytest.mark.parametrize(("router", "routing"), CASES)
every_gate = pytest.mark.parametrize("gate", ["probability", "choice", pytest.param("sigmoid", marks=pytest.mark.slow)])


def mixture(router: str, routing: str, **settings: object) -> nn.Module:
    return perturb_experts(upcycle(vit(), config(router=router, routing=routing, top_k=2, **settings)))


@pytest.mark.parametrize("router", ["hash", "expert_choice"])
def test_a_unit_that_a_router_cannot_do_is_refused_in_one_line_before_anything_changes(router: str) -> None:
    model = vit()
    for surgery in (vimoe.upcycle, vimoe.plan):
        with pytest.raises(vimoe.VimoeError, match=f"router='{router}' with routing='image': expected routing='token'"):
            surgery(model, config(router=router))
    assert not layers(model)


@every_gate
@every_kind
@torch.no_grad()
def test_with_a_shared_expert_the_function_is_kept(router: str, routing: str, gate: str) -> None:
    parent = vit().double()
    model = upcycle(copy.deepcopy(parent), config(router=router, routing=routing, top_k=2, gate=gate))
    x = images(parent).double()
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), parent.train(mode)(x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(perturb_experts(model)(x), parent(x), atol=1e-3)


@every_gate
@pytest.mark.parametrize("router", [*LEARNT, "random", "hash"])
@torch.no_grad()
def test_without_a_shared_expert_too_where_every_token_has_an_expert(router: str, gate: str) -> None:
    parent = vit().double()
    settings = config(router=router, routing="token", top_k=2, gate=gate, num_shared_experts=0)
    x = images(parent).double()
    torch.testing.assert_close(upcycle(copy.deepcopy(parent), settings)(x), parent(x), rtol=1e-9, atol=1e-9)


@every_gate
@every_kind
def test_densified_at_once_it_is_the_parent_to_the_bit(router: str, routing: str, gate: str) -> None:
    parent = vit()
    for how in ("shared", "merge"):
        settings = config(router=router, routing=routing, top_k=2, gate=gate)
        model = vimoe.densify(upcycle(copy.deepcopy(parent), settings), how=how)
        assert all(torch.equal(w, parent.state_dict()[name]) for name, w in model.state_dict().items())


@every_gate
@every_kind
def test_a_folder_gives_the_same_outputs(router: str, routing: str, gate: str, tmp_path: Path) -> None:
    model = mixture(router, routing, gate=gate, layers="last:1")
    for parameter in layers(model)[0].router.gate.parameters():
        parameter.data.fill_(0.7)
    x = images(model)
    torch.manual_seed(1)
    again = vimoe.load(vimoe.save(model, tmp_path / "m"))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert layers(again)[0].router.state_dict().keys() == layers(model)[0].router.state_dict().keys()


@every_kind
def test_copies_and_states_hold_all_of_it(router: str, routing: str) -> None:
    model, x = mixture(router, routing), images(vit())
    other = upcycle(vit(), config(router=router, routing=routing, top_k=2))
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.add_(1)
    other.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    for layer in layers(model):
        layer.router.weight.data.neg_()  # what the copies share with it would change
    with torch.no_grad():
        assert torch.equal(copied(x), other(x))


@every_gate
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float64])
@every_kind
def test_scores_and_gates_are_float32_at_least(router: str, routing: str, cast: torch.dtype, gate: str) -> None:
    model = mixture(router, routing, gate=gate).to(cast)
    precise = torch.promote_types(cast, torch.float32)
    with vimoe.record(model) as routings:
        y = model(images(model).to(cast))
    assert y.dtype == cast and y.isfinite().all()
    assert all(r.logits.dtype == r.gates.dtype == precise for r in routings)
    y.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    made = upcycle(vit().to(cast), config(router=router, routing=routing, gate=gate))
    assert {t.dtype for t in layers(made)[0].router.state_dict().values()} == {cast}


@pytest.mark.parametrize("options", [{}, {"router_noise": 1.0}], ids=str)
@every_gate
@every_kind
def test_a_step_of_training_reaches_what_can_be_trained(router: str, routing: str, gate: str, options: dict) -> None:
    model = mixture(router, routing, gate=gate, **options).train()
    if layers(model)[0].router.adjustable:
        vimoe.set_random_share(model, 0.5)
    with vimoe.record(model) as routings:
        loss = model(images(model, 6)).square().mean() + 0.01 * vimoe.balance_loss(routings)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert ".router." not in name or p.grad.any(), name
    learns = {name.split(".router.")[1] for name, _ in model.named_parameters() if ".router." in name}
    rows = {"cosine": {"weight", "projection", "log_scale"}, "hash": set(), "random": set()}.get(router, {"weight"})
    assert learns == rows | ({"gate.bias"} if gate == "sigmoid" else set())


@every_kind
def test_ties_are_broken_into_different_experts(router: str, routing: str) -> None:
    decided = make(router=router).router.route(torch.zeros(6, 4), (1, 6))
    for row in decided.experts.tolist():
        chosen = [e for e in row if e >= 0]
        assert len(set(chosen)) == len(chosen)
    assert decided.load.sum() == 12
    filled = decided.gates[decided.experts >= 0]
    assert torch.equal(filled, torch.full_like(filled, 0.5 if router == "sigmoid" else 0.25))


@every_gate
@every_kind
@torch.no_grad()
def test_an_expert_that_is_ruled_out_gets_nothing(router: str, routing: str, gate: str) -> None:
    layer, x = make(layout={"image": "image by mean"}.get(routing, routing), router=router, gate=gate), tokens(8)
    with vimoe.record(layer) as routings:
        layer(x)
    for expert in range(4):
        assert routings[0].load[expert] > 0 or router == "random"
        without = Without(expert)(layer, routings[0], torch.arange(8))
        assert without.load[expert] == 0 and without.load.sum() > 0
        assert without.gates.isfinite().all() and not without.gates[without.experts < 0].any()


@every_kind
@torch.no_grad()
def test_experts_that_are_kept_keep_their_scores_and_their_way_of_training(router: str, routing: str) -> None:
    layer, x = make(layout={"image": "image by mean"}.get(routing, routing), router=router), tokens()
    before, weight = layer.router(x), layer.router.weight
    layer.keep_experts([3, 0, 1])
    after = layer.router(x)
    torch.testing.assert_close(after.logits, before.logits[:, [3, 0, 1]])
    assert after.experts.max() <= 2 and after.load.sum() > 0
    assert isinstance(layer.router.weight, nn.Parameter) == isinstance(weight, nn.Parameter)
    assert layer.router.weight.requires_grad == weight.requires_grad == (router not in ("random", "hash"))
    assert layer(x).isfinite().all()
    if not layer.router.tokens_interact:  # else those that remain take more tokens each
        for row, left in zip(before.experts.tolist(), after.experts.tolist(), strict=True):
            assert [e for e in row if e != 2] == [(3, 0, 1)[e] for e in left][: len([e for e in row if e != 2])]


@every_kind
def test_it_is_analysed_and_pruned(router: str, routing: str) -> None:
    model = mixture(router, routing, gate="choice")
    batches = [(images(model, 10), torch.arange(10) % 5)]
    evidence = vimoe.analyze(model, batches, draws=2)
    for found in evidence.layers:
        assert found.load.sum() == pytest.approx(1) and found.gate_mass.min() >= 0 and len(found.experts) == 4
        assert found.permuted is not None and set(found.dense) == {"shared", "merge", "matched"}
    pruned = vimoe.prune(model, evidence, batches, tolerance=9, experts=True)
    assert len(pruned.steps) == 2 and not layers(model)


@every_kind
def test_its_experts_are_pruned_down_to_top_k(router: str, routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vimoe.analysis.pruning._Greedy.layers", lambda *_: ())  # as if no layer could go
    model = mixture(router, routing)
    batches = [(images(model, 10), torch.arange(10) % 5)]
    pruned = vimoe.prune(model, vimoe.analyze(model, batches, draws=2), batches, tolerance=9, experts=True)
    assert len(pruned.steps) == 4 and [layer.config.num_experts for layer in layers(model)] == [2, 2]
    assert model(images(model)).isfinite().all()


@every_kind
def test_its_parameters_and_arithmetic_are_counted(router: str, routing: str) -> None:
    model, parent = upcycle(vit(), config(router=router, routing=routing, top_k=2)), vimoe.count(vit())
    layer, found = layers(model)[0], vimoe.count(model)
    rows, expert = {"image": 1, "token": 5}[routing], sum(p[0].numel() for p in layer.experts.parameters())
    params = {"cosine": 12 * 24 + 4 * 12 + 1, "hash": 0, "random": 0}.get(router, 4 * 24)
    macs = {"cosine": 12 * 24 + 4 * 12, "hash": 0}.get(router, 4 * 24)
    assert found.params == parent.params + 2 * (4 * expert + params)
    assert found.activated_params == parent.params + 2 * (2 * expert + params)
    assert found.macs == parent.macs + 2 * (rows * macs + 5 * 2 * layer.experts.macs)
    planned = vimoe.plan(vit(), config(router=router, routing=routing, top_k=2))
    assert planned.moe == found and f"{router} router" in str(planned)


def test_the_names_of_built_in_routers_are_those_of_their_files() -> None:
    for router, _ in CASES:
        assert ROUTERS.find(router).__module__ == f"vimoe.moe.routers.{router}"
