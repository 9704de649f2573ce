"""The router "smear" beside its formula, and what its layers do in every verb."""

from __future__ import annotations

import copy
from pathlib import Path

import helpers.kinds  # noqa: F401  registers kinds of routers and experts
import pytest
import torch
from helpers import mixing
from helpers.layers import FFNS
from helpers.mixing import EXPERTS, ffn, layer, of, tokens
from helpers.tiny import config, layers, vit
from torch import Tensor

import vimoe
from vimoe.analysis.interventions import Without, _Others
from vimoe.errors import ConfigError
from vimoe.moe.layer import moe_layers

SMEAR = {"router": "smear", "routing": "image"}


def reference(layer: vimoe.MoE, x: Tensor) -> Tensor:
    """SMEAR image by image, from its formula."""
    outputs = []
    for image in x:
        weights = (layer.router.weight @ image[0]).exp()
        mix = layer.shared is not None and layer.config.combine == "mix"
        gates = weights / (weights.sum() + (1 if mix else 0))
        experts = [of(layer, "experts", e) for e in range(EXPERTS)]
        merged = {n: sum(g * e[n] for g, e in zip(gates, experts, strict=True)) / gates.sum() for n in experts[0]}
        y = ffn(merged, image)
        if layer.shared is not None:
            shared = ffn(of(layer, "shared"), image)
            y = shared + (gates.sum() * (y - shared) if mix else y)
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize(("combine", "shared"), [("mix", 1), ("mix", 0), ("sum", 1), ("sum", 0)])
def test_outputs_and_gradients_are_those_of_the_formula(combine: str, shared: int) -> None:
    mixing.assert_equal_with_gradients(layer(**SMEAR, combine=combine, num_shared_experts=shared), reference)


def test_where_all_gates_round_to_0_the_shared_expert_is_left() -> None:
    made, x = layer(**SMEAR).float(), tokens().float()
    with torch.no_grad():
        made.router.weight[:] = -1e6 * x[0, 0]
    y = made(x[:1])
    torch.testing.assert_close(y, made.shared(x[:1]))
    (1e6 * y).sum().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", FFNS)
def test_every_kind_of_ffn_is_merged(kind: str) -> None:
    """An image's merged FFN is the one that `densify` would build from its gates."""
    torch.manual_seed(0)
    made = vimoe.MoE(FFNS[kind](), config(**SMEAR), vimoe.moe.router.TokenLayout(1, True))
    mixing.randomise(made.experts).eval()
    x = torch.randn(2, 5, 8)
    made.shared = None
    made.config = made.router.config = config(**SMEAR, num_shared_experts=0)
    with torch.no_grad():
        gates = made.router(x).expert_gates
        expected = torch.stack([made.merged(g)(image) for g, image in zip(gates, x, strict=True)])
        torch.testing.assert_close(made.eval()(x), expected, atol=1e-5, rtol=1e-5)


def test_the_record_leaves_a_share_to_the_shared_expert_of_a_mix() -> None:
    x = tokens()
    for shared, total in ((1, EXPERTS / (EXPERTS + 1)), (0, 1)):
        made = layer(**SMEAR, num_shared_experts=shared)
        torch.nn.init.zeros_(made.router.weight)
        with vimoe.record(made) as routings:
            made(x)
        assert routings[0].gates.sum(dim=1).tolist() == pytest.approx([total] * 2)
        assert made.router.neutral_gate_mass().sum().item() == pytest.approx(total)
        assert routings[0].load.tolist() == [2] * EXPERTS
        assert vimoe.balance_loss(routings).item() == pytest.approx(EXPERTS)


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_a_model_keeps_its_function_and_its_copies_agree(shared: int, tmp_path: Path) -> None:
    if shared:
        mixing.check_step_0_and_copies(config(**SMEAR, num_shared_experts=shared), tmp_path)
    else:
        model = vit()
        x = mixing.images(model)
        before = model(x)
        after = vimoe.upcycle(model, config(**SMEAR, num_shared_experts=0))(x)
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_it_compiles_and_exports() -> None:
    mixing.check_program(config(**SMEAR))


def test_the_cost_is_the_merging_and_one_ffn() -> None:
    dense = vit()
    tokens, dim, n = 5, 24, 4
    expert = 2 * dim * 96 + 96 + dim
    plan = vimoe.plan(dense, config(**SMEAR, layers=[1]))
    assert plan.moe.macs - plan.dense.macs == n * expert + tokens * 2 * dim * 96 + n * dim
    assert plan.moe.params - plan.dense.params == n * expert + n * dim
    assert plan.moe.activated_params == plan.moe.params


def test_a_removed_expert_is_one_that_analysis_rules_out() -> None:
    made, x = layer(**SMEAR).eval(), tokens()
    others = _Others(made, x)
    routing = Without(1)(made, others.routing, torch.arange(2))
    decided = [others.of_images(each) for each in (routing.experts, routing.gates)]
    small = copy.deepcopy(made)
    small.keep_experts([0, 2])
    with torch.no_grad():
        torch.testing.assert_close(
            others(torch.tensor([1, 0, 1]), *(d[[1, 0, 1]] for d in decided)), small(x)[[1, 0, 1]]
        )
        own = [others.of_images(each) for each in (others.routing.experts, others.routing.gates)]
        torch.testing.assert_close(others(torch.arange(2), *own), made(x))


def test_analysis_overrules_its_decisions() -> None:
    model, loader, evidence = mixing.analysed(config(**SMEAR))
    for each in evidence.layers:
        assert each.permuted.loss.value != 0 and each.frozen.loss.value != 0 and len(each.experts) == 4
    mixing.check_pruning(config(**SMEAR))
    pruning = vimoe.prune(model, evidence, loader, tolerance=9, experts=True)
    assert not moe_layers(model) and len(pruning.steps) == 2


def test_experts_can_be_dropped_from_layers_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loader, evidence = mixing.analysed(config(**SMEAR))
    monkeypatch.setattr("vimoe.analysis.pruning._Greedy.layers", lambda *_: ())
    vimoe.prune(model, evidence, loader, tolerance=9, experts=True)
    assert [layer.config.num_experts for layer in layers(model)] == [1, 1]
    assert model(loader[0][0]).isfinite().all()


@pytest.mark.parametrize("experts", ["lora", "delta", "adapter"])
def test_an_optimised_model_still_has_the_ffn_that_experts_change(experts: str) -> None:
    model = mixing.perturb_experts(vimoe.upcycle(vit(), config(**SMEAR, experts=experts)))
    x = mixing.images(model)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(vimoe.optimize(model)(x), y, atol=1e-4, rtol=1e-4)


def test_other_kinds_of_experts_are_merged_by_their_weights() -> None:
    made = layer(**SMEAR, experts="low_rank")
    y = made(tokens())
    assert (y - made.shared(tokens())).abs().max() > 1e-3 and y.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routing": "token"}, "router='smear' with routing='token': expected routing='image'"),
        ({"gate": "sigmoid"}, "gate='sigmoid' with router='smear': expected 'probability'"),
        ({"experts": "scaled"}, "experts='scaled' with router='smear', which takes the mean of experts' weights"),
    ],
)
def test_what_it_does_not_do_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer(**{**SMEAR, **settings})
