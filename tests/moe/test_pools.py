"""Pools of experts: no token leaves its pool, and a pool is a layer of its own to losses, figures and removal."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.layers import DIM, HIDDEN, assert_agrees, assert_exports_and_compiles, make, tokens
from helpers.routers import MANY, routing_of, softmax
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from timm.layers import Mlp
from torch import Tensor, nn

import vimoe
from vimoe.analysis.analyze import most_frequent
from vimoe.analysis.interventions import Without
from vimoe.explore.session import Session
from vimoe.moe.router import TokenLayout
from vimoe.training.routing_health import Health

PREFIX, LENGTH = 2, 6
GROUPS = (1, 3)


def layer_of(groups: tuple[int, ...] = GROUPS, prefix: int = PREFIX, **settings: object) -> vimoe.MoE:
    """A layer in eval mode whose tokens are two prefix tokens and patches."""
    torch.manual_seed(0)
    given = {"num_experts": sum(groups), "groups": groups, "routing": "token", **settings}
    layer = vimoe.MoE(Mlp(DIM, HIDDEN), vimoe.MoEConfig(**given), TokenLayout(prefix, bool(prefix)))
    nn.init.normal_(layer.router.weight)  # scores that differ much
    for name, parameter in layer.experts.named_parameters():
        nn.init.normal_(parameter, std=0.3) if "weight" in name else None
    return layer.eval()


def model_of(**settings: object) -> nn.Module:
    """A ViT of a class token and four patches, with a pool of two experts for either."""
    given = {"groups": [2, 2], "routing": "token", **settings}
    return perturb_experts(upcycle(vit(), config(**given)))


def by_pool(scores: list[Tensor], k: int, groups: tuple[int, ...] = GROUPS) -> list[dict[int, Tensor]]:
    """The decisions of the softmax router with a pool for prefix tokens and one for patches, as they are defined."""
    decided = []
    for place, row in enumerate(scores):
        own = range(groups[0]) if place < PREFIX else range(groups[0], sum(groups))
        weights = dict(zip(own, softmax(row[own.start : own.stop]), strict=True))
        best = sorted(own, key=lambda e: -weights[e].item())[:k]
        decided.append({e: weights[e] for e in best})
    return decided


@pytest.mark.parametrize("settings", [{}, {"num_shared_experts": 0}, {"combine": "sum"}], ids=str)
@pytest.mark.parametrize(("groups", "k"), [((1, 3), 1), ((2, 2), 1), ((2, 2), 2), ((3, 1), 1)])
def test_it_agrees_with_the_loop_in_outputs_and_gradients(groups: tuple[int, ...], k: int, settings: dict) -> None:
    layer, x = layer_of(groups, top_k=k, **settings).double(), tokens(3, LENGTH).double()
    assert_agrees(layer, x, all_used=False, decide=lambda scores, k: by_pool(scores, k, groups))
    assert layer.router.blind or layer.router.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("moved", [{}, {"router_noise": 9.0}, {"bias_update_rate": 0.1}, {"random": 1.0}], ids=str)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("router", ["softmax", "sigmoid", "cosine", "hash", "random"])
def test_no_token_leaves_its_pool_whatever_moves_the_choice(router: str, k: int, moved: dict) -> None:
    moved = dict(moved)
    share = moved.pop("random", 0.0)
    layer = layer_of((2, 2), top_k=k, router=router, **moved).train()
    if layer.router.choice_bias is not None:
        layer.router.choice_bias.copy_(torch.tensor([-9.0, 9.0, 5.0, -5.0]))
    vimoe.set_random_share(layer, share)
    routing = routing_of(layer, tokens(200, LENGTH))
    for row, chosen in enumerate(routing.experts.tolist()):
        assert set(chosen) <= ({0, 1} if row % LENGTH < PREFIX else {2, 3}) and len(set(chosen)) == k
    assert routing.load.bool().all() or share == 0
    assert routing.kinds.tolist() == [int(row % LENGTH >= PREFIX) for row in range(200 * LENGTH)]


def test_no_pair_of_scores_moves_a_token_out_of_its_pool() -> None:
    """Every order of the experts, as scores of every token."""
    layer = layer_of((1, 3), prefix=1, top_k=1)
    for order in itertools.permutations(range(4)):
        with torch.no_grad():
            layer.router.weight.zero_()
            layer.router.weight[:, 0] = torch.tensor(order, dtype=torch.float32) * 100
        x = torch.zeros(1, 2, DIM)
        x[..., 0] = 1
        assert layer.router(x).experts[:, 0].tolist() == [0, 1 + max(range(3), key=lambda e: order[1 + e])]


@pytest.mark.parametrize("routing_settings", [{}, {"router_noise": 1.0}], ids=str)
def test_one_pool_is_none_to_the_bit(routing_settings: dict) -> None:
    x, found = tokens(3, LENGTH), []
    for groups in (None, (4,)):
        layer = make(groups=groups, **routing_settings).train()
        torch.manual_seed(3)
        with vimoe.record(layer) as routings:
            loss = layer(x).square().sum()
        for term in (vimoe.balance_loss, vimoe.importance_loss, vimoe.variance_loss, vimoe.entropy_loss):
            loss = loss + term(routings)
        loss.backward()
        assert routings[0].kinds is None
        found.append([loss.detach(), *(p.grad for p in layer.parameters()), layer.router.neutral_gate_mass()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def alone(layer: vimoe.MoE, routing: vimoe.Routing, kind: int) -> vimoe.Routing:
    """The decisions of a layer that has the experts and the tokens of one pool and no other."""
    first, size = sum(layer.config.pools[:kind]), layer.config.pools[kind]
    rows = [r for r in range(len(routing.experts)) if int(routing.kinds[r]) == kind]
    return vimoe.Routing(
        routing.logits[rows, first : first + size], routing.gates[rows], routing.experts[rows] - first, "token",
        (len(rows), 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    "loss",
    [vimoe.balance_loss, vimoe.importance_loss, vimoe.variance_loss, vimoe.entropy_loss, vimoe.router_z_loss],
)
def test_a_loss_is_the_mean_over_pools_that_are_layers_of_their_own(loss: object) -> None:
    layer = layer_of((2, 3))
    routing = routing_of(layer, tokens(9, LENGTH))
    expected = (loss([alone(layer, routing, 0)]) + loss([alone(layer, routing, 1)])) / 2
    found = loss([routing])
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(each, layer.router.weight, retain_graph=True)[0] for each in (found, expected)]
    torch.testing.assert_close(*grads)
    assert grads[0].isfinite().all() and grads[0].any()


@pytest.mark.parametrize("groups", [(1, 3), (2, 2), (3, 5)])
@pytest.mark.parametrize("k", [1, 2])
def test_the_balance_loss_of_an_even_load_is_k_whatever_the_sizes_of_pools_and_kinds(
    groups: tuple[int, ...], k: int
) -> None:
    if k > min(groups):
        with pytest.raises(vimoe.VimoeError, match="each at least top_k=2"):
            layer_of(groups, top_k=k)
        return
    layer = layer_of(groups, top_k=k)
    nn.init.zeros_(layer.router.weight)  # all probabilities equal, so that any load has the loss of an even one
    for length in (3, LENGTH, 50):
        assert vimoe.balance_loss([routing_of(layer, tokens(2, length))]).item() == pytest.approx(k)


def test_a_pool_without_tokens_counts_in_no_loss() -> None:
    """As in the last block, where a ViT computes its class token alone."""
    layer = layer_of((2, 3))
    routing = routing_of(layer, tokens(9, PREFIX))
    assert [len(part.experts) for part in routing.by_pool] == [18]
    torch.testing.assert_close(vimoe.balance_loss([routing]), vimoe.balance_loss([alone(layer, routing, 0)]))
    nobody = routing_of(layer, tokens(0, PREFIX))
    assert [len(part.experts) for part in nobody.by_pool] == [0]


def test_recorded_outputs_go_with_their_pool() -> None:
    layer = layer_of((2, 2), top_k=2).train()
    with vimoe.record(layer, outputs=True) as routings:
        layer(tokens(4, LENGTH))
    expected = []
    for kind in (0, 1):
        rows = routings[0].kinds == kind
        y = routings[0].outputs[rows]
        expected.append((y - y.mean(dim=1, keepdim=True)).square().mean())
    torch.testing.assert_close(vimoe.mutual_loss(routings), sum(expected) / 2)


def test_gradients_from_experts_that_were_not_chosen_stay_in_the_pool() -> None:
    for kind in ("dense", "default_vectors"):
        layer = layer_of((2, 2), router_gradient=kind).train()
        x = tokens(1, PREFIX).requires_grad_()  # prefix tokens alone
        layer(x).square().sum().backward()
        rows = layer.router.weight.grad
        assert rows[:2].any() and not rows[2:].any() and rows.isfinite().all()


def test_all_experts_at_once_are_all_of_the_pool() -> None:
    layer = layer_of((2, 2))
    with vimoe.all_experts(layer), vimoe.record(layer) as routings:
        layer(tokens(3, LENGTH))
    gates = routings[0].expert_gates
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(18))
    patches = routings[0].kinds == 1
    assert not gates[patches, :2].any() and not gates[~patches, 2:].any()


@pytest.mark.parametrize("how", ["shared", "merge"])
def test_the_function_of_the_parent_is_kept_and_comes_back(how: str) -> None:
    parent = vit()
    model = upcycle(copy.deepcopy(parent), config(groups=[1, 3], routing="token"))
    torch.testing.assert_close(model(images(parent)), parent(images(parent)), rtol=1e-4, atol=1e-4)
    vimoe.densify(model, how=how)
    assert all(torch.equal(w, parent.state_dict()[name]) for name, w in model.state_dict().items())


def test_undecided_routers_weigh_the_experts_of_a_pool_by_its_size() -> None:
    """A pool of n gets n/N of the rows, each of its experts 1/n of these with the gate 1/n."""
    assert layer_of((1, 3)).router.neutral_gate_mass().tolist() == pytest.approx([1 / 4, *[1 / 12] * 3])


def test_a_folder_has_the_pools(tmp_path: Path) -> None:
    model = model_of(groups=(1, 3))
    again = vimoe.load(vimoe.save(model, tmp_path / "m"))
    x = images(model)
    with torch.no_grad(), vimoe.record(again) as routings:
        assert torch.equal(again(x), model(x))
    assert [layer.config.groups for layer in layers(again)] == [(1, 3)] * 2
    assert set(routings[0].experts[routings[0].kinds == 0].flatten().tolist()) == {0}


def test_a_bias_evens_the_load_of_each_pool() -> None:
    """By the mean of all experts both of the first pool would be raised, and all of the second lowered."""
    layer = layer_of((2, 4), bias_update_rate=0.25)
    chosen = [0] * 3 + [1] + [2] * 30 + [3] * 21 + [4] * 25 + [5] * 24
    routing = vimoe.Routing(torch.zeros(104, 6), torch.ones(104, 1), torch.tensor(chosen)[:, None], "token", (1, 104))
    vimoe.update_bias(layer, [routing])
    assert layer.router.choice_bias.tolist() == [-0.25, 0.25, -0.25, 0.25, 0, 0.25]


def test_interventions_move_no_token_out_of_its_pool() -> None:
    """Where each pool has one expert there is nothing to choose, so other decisions change nothing."""
    model = model_of(groups=[1, 1], num_experts=2)  # which warns, since their gates are always 1
    batches = [(images(model, 8), torch.arange(8) % 5)]
    for layer in vimoe.analyze(model, batches, draws=1).layers:
        assert layer.frozen.loss.value == layer.permuted.loss.value == 0
    for layer in vimoe.diagnose(model, batches, draws=1).layers:
        assert layer.oracle.by_image.loss.value == layer.oracle.for_all.loss.value == 0


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_each_pool_has_its_own_most_frequent_decision(capacity: float | None) -> None:
    layer = layer_of((2, 3), capacity_factor=capacity)
    experts = np.array([[[0], [4], [4], [2]], [[1], [4], [-1], [-1]], [[1], [2], [3], [-1]]])
    gates = np.where(experts >= 0, 0.5, 0)
    frozen = most_frequent(layer, experts, gates)
    with torch.no_grad(), vimoe.record(layer) as routings:
        layer(tokens(3, LENGTH))
    decided = frozen(layer, routings[0], torch.arange(3))
    assert decided.experts.view(3, LENGTH).tolist() == [[1] * PREFIX + [4] * (LENGTH - PREFIX)] * 3
    assert (decided.gates == 0.5).all()
    nobody = most_frequent(layer, experts[:, :1], gates[:, :1])(layer, routings[0], torch.arange(3))
    assert nobody.experts.view(3, LENGTH).tolist() == [[1] * PREFIX + [-1] * (LENGTH - PREFIX)] * 3


def test_only_one_expert_gets_those_tokens_that_may_have_it() -> None:
    layer = layer_of((2, 3), top_k=2)
    with torch.no_grad(), vimoe.record(layer) as routings:
        layer(tokens(3, LENGTH))
    (routing,), others = routings, routings[0].kinds == 0
    only = routing.only(3)
    assert (only.experts[~others] == torch.tensor([3, -1])).all()
    torch.testing.assert_close(only.gates.sum(dim=1), routing.gates.sum(dim=1))
    assert only.experts[others].equal(routing.experts[others]) and only.gates[others].equal(routing.gates[others])


@pytest.mark.parametrize(("read", "possible"), [("all", 1 * 1 + 3 * 3), ("auto", 1 * 1 + 3 * 1)])
def test_routes_through_the_layers_stay_in_a_pool(read: str, possible: int) -> None:
    """But for the class token, which the head reads, the last block may compute none."""
    model = vimoe.set_reading(model_of(groups=[1, 3]), read)
    evidence = vimoe.analyze(model, [(images(model, 8), torch.arange(8) % 5)], draws=1, overrule=0)
    assert evidence.routes[2] == possible >= evidence.routes[0]


def test_cost_and_number_of_decisions() -> None:
    plain, pooled = upcycle(vit(), config(routing="token")), model_of(groups=(1, 3))
    assert vimoe.count(pooled) == vimoe.count(plain)
    assert layers(pooled)[0].router.num_decisions == (1, 3)
    assert layer_of((2, 3), top_k=2).router.num_decisions == (1, 3)
    assert layer_of((2, 3), capacity_factor=0.5).router.num_decisions == (1 + 2, 1 + 3)
    assert "groups=(1, 3)" in str(vimoe.plan(vit(), config(groups=[1, 3], routing="token")))


@pytest.mark.parametrize(("groups", "blind"), [((1, 1), True), ((1, 3), False)])
def test_a_router_is_blind_if_every_pool_has_one_expert(groups: tuple[int, ...], blind: bool) -> None:
    layer = layer_of(groups)
    assert layer.router.blind == blind
    layer(tokens(3, LENGTH)).square().sum().backward()
    assert layer.router.weight.grad.any() != blind


def test_it_is_analysed_and_its_experts_are_pruned_down_to_top_k_in_each_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vimoe.analysis.pruning._Greedy.layers", lambda *_: ())  # as if no layer could go
    model = model_of(groups=(2, 3), num_experts=5)
    batches = [(images(model, 10), torch.arange(10) % 5)]
    evidence = vimoe.analyze(model, batches, draws=2)
    assert [len(layer.experts) for layer in evidence.layers] == [5, 5]
    pruned = vimoe.prune(model, evidence, batches, tolerance=9, experts=True)
    assert len(pruned.steps) == 6 and [layer.config.groups for layer in layers(model)] == [(1, 1)] * 2
    assert vimoe.analyze(model, batches, draws=2).layers[0].experts == ()  # none can be left out
    with vimoe.record(model) as routings:
        model(images(model))
    assert routings[0].load.tolist() == [3, 12]


@pytest.mark.parametrize("expert", range(5))
def test_leaving_an_expert_out_is_removing_it(expert: int) -> None:
    layer, x = layer_of((2, 3)), tokens(20, LENGTH)
    left_out = Without(expert)(layer, layer.router(x), torch.arange(20))
    kept = [e for e in range(5) if e != expert]
    layer.keep_experts(kept)
    found = layer.router(x)
    assert layer.config.groups == ((1, 3) if expert < 2 else (2, 2)) and layer.config.num_experts == 4
    assert torch.equal(torch.tensor(kept)[found.experts], left_out.experts)
    torch.testing.assert_close(found.gates, left_out.gates)


def test_health_is_finite_and_of_pools() -> None:
    layer, health = layer_of((1, 3)), Health()
    routing = routing_of(layer, tokens(9, LENGTH)).detach()
    health.add([routing])
    (row,) = health.rows()
    patches = alone(layer, routing, 1).logits.sort(descending=True).values
    assert row["router_margin"] == pytest.approx(float((patches[:, 0] - patches[:, 1]).sum()) / 54)
    squares = sum(float(alone(layer, routing, kind).logits.square().mean(dim=1).sum()) for kind in (0, 1))
    assert row["logit_rms"] == pytest.approx((squares / 54) ** 0.5)


def test_routes_of_others_stay_in_their_pool() -> None:
    routing = routing_of(layer_of((2, 3)), tokens(3, LENGTH))
    session = Session.__new__(Session)
    session._draw = torch.Generator().manual_seed(0)
    found = session._of_others("", routing)
    assert not torch.equal(found.experts, routing.experts)
    assert ((found.experts[:, 0] >= 2) == (routing.kinds == 1)).all()
    assert found.load.tolist() == routing.load.tolist()


def test_exports_and_compiles_with_any_number_of_images() -> None:
    layer = layer_of((2, 3))
    assert_exports_and_compiles(layer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"groups": [2, 3]},
            r"groups=\[2, 3\] with num_experts=4: expected sizes that add up to it; set num_experts=5",
        ),
        ({"groups": [0, 4]}, r"groups=\[0, 4\]: expected a list of the sizes of pools, each at least top_k=1"),
        ({"groups": [1, 3], "top_k": 2}, r"groups=\[1, 3\]: expected .*, each at least top_k=2"),
        ({"groups": [2, 2], "routing": "image"}, r"groups=\[2, 2\] with routing='image': expected routing='token'"),
        ({"groups": [2, 2], "router": "expert_choice"}, r"groups=\(2, 2\) with router='expert_choice': expected None"),
        ({"groups": [2, 2], "router": "soft"}, r"groups=\(2, 2\) with router='soft': expected None"),
        ({"groups": [2, 2], "router": "centroids"}, r"groups=\(2, 2\) with router='centroids': expected None"),
        ({"groups": [2, 2], "init": "cluster"}, r"groups=\[2, 2\] with init='cluster', which parts"),
        ({"groups": [1, 3], "expert_width": 48}, r"groups=\[1, 3\] with experts of 48 of 96 .*; use groups=\[2, 4\]"),
        ({"groups": [1, 1, 2]}, r"groups=\[1, 1, 2\]: expected a pool for prefix tokens and one for patches"),
    ],
)
def test_what_cannot_have_pools_is_refused_in_one_line_before_anything_changes(settings: dict, message: str) -> None:
    model = vit()
    with pytest.raises(vimoe.VimoeError, match=message) as error:
        vimoe.upcycle(model, config(**{"routing": "token", **settings}))
    assert "\n" not in str(error.value) and not layers(model)


def test_a_vit_without_prefix_tokens_is_refused() -> None:
    with pytest.raises(vimoe.VimoeError, match="an FFN that gets both, not 0 and 4; leave the block out"):
        vimoe.upcycle(vit("siglip, attention pool"), config(groups=[2, 2], routing="token"))


def test_many_tokens_of_each_kind_use_all_experts_of_their_pool() -> None:
    routing = routing_of(layer_of((2, 3)), tokens(MANY // LENGTH, LENGTH))
    assert (routing.load > 20).all() and routing.load[:2].sum() == PREFIX * (MANY // LENGTH)
