"""From MoE back to dense once the experts have learned something: what the means compute, and from what."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from helpers.tiny import config, images, layers, perturb_experts, randomise, upcycle, vit
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

import vimoe
from vimoe.moe import ffn
from vimoe.moe.router import TokenLayout

DIM, HIDDEN, EXPERTS = 8, 12, 4
GATES = torch.tensor([0.1, 0.4, 0.2, 0.3])
FFNS = {
    "mlp": lambda: Mlp(DIM, HIDDEN),
    "glu": lambda: GluMlp(DIM, 2 * HIDDEN, norm_layer=nn.LayerNorm),
    "swiglu": lambda: SwiGLU(DIM, HIDDEN, bias=False),
}
COMBINE = [("mix", False), ("sum", False), ("sum", True)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def constant_gates(layer: vimoe.MoE) -> Tensor:
    """Gives every token the gates above; returns tokens, which hold the first channel at 1."""
    with torch.no_grad():
        layer.router.weight.zero_()[:, 0] = GATES.log()
    x = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 1
    return x


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize(("combine", "normalised"), COMBINE)
@pytest.mark.parametrize("k", [2, EXPERTS])
@pytest.mark.parametrize("dense", FFNS)
def test_merge_computes_what_the_layer_did_where_that_can_be_exact(
    dense: str, k: int, combine: str, normalised: bool, shared: int
) -> None:
    """Gates are constant and experts differ in their last matrix alone, so the layer is one FFN in truth."""
    settings = config(top_k=k, routing="token", num_shared_experts=shared, combine=combine, normalize_gates=normalised)
    layer = vimoe.MoE(randomise(FFNS[dense]()), settings, TokenLayout(0, False))
    randomise(layer.experts.fc2)
    x = constant_gates(layer)
    with vimoe.record(layer) as routings:
        y = layer(x)
    mass = torch.zeros(len(x.flatten(0, 1)), EXPERTS).scatter(1, routings[0].experts, routings[0].gates).mean(dim=0)
    torch.testing.assert_close(layer.merged(mass)(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize(("combine", "normalised"), COMBINE)
@torch.no_grad()
def test_merge_without_gate_mass_weighs_as_a_router_without_preference(
    combine: str, normalised: bool, shared: int
) -> None:
    """All experts agree, so that it does not matter which of the tied ones the router took."""
    model = upcycle(vit(), config(top_k=2, num_shared_experts=shared, combine=combine, normalize_gates=normalised))
    for layer in layers(model):
        layer.router.weight.zero_()
    y = model(images(model))
    torch.testing.assert_close(vimoe.densify(model, how="merge")(images(model)), y, rtol=1e-4, atol=1e-5)


def test_gate_mass_is_taken_by_layer_name() -> None:
    model = perturb_experts(upcycle(vit(), config()))
    expected = [layer.experts.weights(expert) for layer, expert in zip(layers(model), (2, 0), strict=True)]
    one_hot = torch.eye(EXPERTS)
    vimoe.densify(model, how="merge", gate_mass={"blocks.0.mlp": one_hot[2], "blocks.1.mlp": one_hot[0]})
    for block, weights in zip(model.blocks, expected, strict=True):
        torch.testing.assert_close(ffn.read(block.mlp), {name: w.clone() for name, w in weights.items()})


def shuffle(layer: vimoe.MoE) -> None:
    """Gives each expert another order of its hidden units, which changes nothing that it computes."""
    hidden = layer.experts.kind.hidden
    with torch.no_grad():
        for e in range(EXPERTS):
            order = torch.randperm(hidden, generator=torch.Generator().manual_seed(e))
            for name, w in layer.experts.weights(e).items():
                if name == "fc2.weight":
                    w.copy_(w[:, order])
                elif name != "fc2.bias":
                    w.copy_(torch.cat([half[order] for half in w.split(hidden)]))


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("dense", FFNS)
def test_matched_merging_of_permuted_copies_is_exact_where_their_mean_is_not(dense: str, shared: int) -> None:
    parent = randomise(FFNS[dense]())
    layer = vimoe.MoE(copy.deepcopy(parent), config(num_shared_experts=shared), TokenLayout(0, False)).double()
    shuffle(layer)
    x = torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(1)).double()
    y = parent.double()(x)
    torch.testing.assert_close(layer(x), y, rtol=1e-9, atol=1e-9)  # they are copies
    torch.testing.assert_close(layer.merged(GATES, matched=True)(x), y, rtol=1e-9, atol=1e-9)
    assert (layer.merged(GATES)(x) - y).abs().max() > 0.1


def test_all_experts_are_matched_to_the_shared_one_bit_for_bit() -> None:
    layer = vimoe.MoE(randomise(Mlp(DIM, HIDDEN)), config(num_shared_experts=1), TokenLayout(0, False))
    shuffle(layer)
    merged = ffn.read(layer.merged(GATES, matched=True))
    assert all(torch.equal(w, merged[name]) for name, w in ffn.read(layer.shared).items())


def test_without_a_shared_expert_all_are_matched_to_the_one_that_weighs_most() -> None:
    layer = vimoe.MoE(randomise(Mlp(DIM, HIDDEN)), config(num_shared_experts=0, top_k=2), TokenLayout(0, False))
    shuffle(layer)
    merged = ffn.read(layer.merged(GATES, matched=True))
    torch.testing.assert_close(merged, dict(layer.experts.weights(int(GATES.argmax()))))


def test_densify_matched_undoes_the_order_of_the_units_and_merge_does_not() -> None:
    parent = vit()
    y = parent(images(parent))
    for how, exact in (("matched", True), ("merge", False)):
        model = upcycle(copy.deepcopy(parent), config())
        for layer in layers(model):
            shuffle(layer)
        assert torch.allclose(vimoe.densify(model, how=how)(images(model)), y, atol=1e-5) == exact


@pytest.mark.parametrize(("combine", "shared"), [("mix", 1), ("mix", 0), ("sum", 0)])
@pytest.mark.parametrize("family", ["vit", "no biases", "inner norm", "dinov2, packed SwiGLU", "dinov3, SwiGLU"])
def test_matched_right_after_upcycle_gives_back_the_parent_bit_for_bit(family: str, combine: str, shared: int) -> None:
    parent = vit(family)
    settings = config(num_shared_experts=shared, combine=combine, normalize_gates=combine == "sum", top_k=2)
    model = vimoe.densify(upcycle(copy.deepcopy(parent), settings), how="matched")
    state = model.state_dict()
    assert list(state) == list(parent.state_dict())
    assert all(torch.equal(state[name], value) for name, value in parent.state_dict().items())


@pytest.mark.parametrize("how", ["merge", "matched"])
def test_merging_two_shared_experts_is_refused_and_changes_nothing(how: str) -> None:
    model = upcycle(vit(), config(num_shared_experts=2))
    with pytest.raises(vimoe.VimoeError, match=rf"blocks\.0\.mlp.*has 2 shared.*how='{how}'; use how='shared'"):
        vimoe.densify(model, how=how)
    assert len(layers(model)) == 2


def test_shared_keeps_what_the_shared_expert_has_learned() -> None:
    model = perturb_experts(upcycle(vit(), config()))
    for layer in layers(model):
        randomise(layer.shared, seed=1)
    expected = [ffn.read(layer.shared) for layer in layers(model)]
    vimoe.densify(model, how="shared")
    for block, weights in zip(model.blocks, expected, strict=True):
        assert all(torch.equal(w, weights[name]) for name, w in ffn.read(block.mlp).items())


@pytest.mark.parametrize("how", ["shared", "merge", "matched"])
@pytest.mark.parametrize("training", [True, False])
def test_densify_keeps_the_mode_that_the_model_is_in(how: str, training: bool) -> None:
    model = upcycle(vit().train(not training), config()).train(training)
    assert all(module.training == training for module in vimoe.densify(model, how=how).modules())


@pytest.mark.parametrize("shared", [0, 2])
def test_no_weight_of_the_parents_ffn_is_kept_beside_the_experts(shared: int) -> None:
    model = vit()
    weights = [weakref.ref(p) for block in model.blocks for p in block.mlp.parameters()]
    upcycle(model, config(num_shared_experts=shared, top_k=2))
    gc.collect()
    assert weights
    assert not any(weight() is not None for weight in weights)


def test_a_dense_model_after_densify_trains_and_upcycles_again() -> None:
    model = vimoe.densify(perturb_experts(upcycle(vit(), config())), how="merge").train()
    y = model(images(model))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(upcycle(model, config())(images(model)), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("masses", "message"),
    [
        ({"blocks.1": GATES}, r"gate_mass of 'blocks\.1', which is no MoE layer: .*blocks\.1\.mlp"),
        ({"blocks.0.mlp": GATES}, r"gate_mass of 'blocks\.0\.mlp'"),
        ({"blocks.1.mlp": GATES[:3]}, r"gate_mass of blocks\.1\.mlp .* has shape \(3,\): expected \(4,\)"),
    ],
)
def test_gate_mass_that_fits_no_layer_is_refused(masses: dict[str, Tensor], message: str) -> None:
    model = upcycle(vit(depth=2), config(layers="last:1", num_experts=EXPERTS))
    with pytest.raises(vimoe.VimoeError, match=message):
        vimoe.densify(model, how="merge", gate_mass=masses)
    assert isinstance(model.blocks[1].mlp, vimoe.MoE)


def test_gate_mass_may_hold_layers_that_stay() -> None:
    model = upcycle(vit(depth=2), config(layers="all", num_experts=EXPERTS))
    vimoe.densify(model, layers=[1], how="merge", gate_mass={f"blocks.{block}.mlp": GATES for block in range(2)})
    assert layers(model) == [model.blocks[0].mlp]


@pytest.mark.parametrize(("how", "shared"), [("shared", 1), ("shared", 2), ("merge", 0), ("merge", 1)])
def test_what_was_frozen_stays_frozen(how: str, shared: int) -> None:
    model = upcycle(vit(depth=2), config(layers="last:1", top_k=2, num_shared_experts=shared)).requires_grad_(False)
    assert not any(p.requires_grad for p in vimoe.densify(model, how=how).parameters())


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize(("combine", "normalised"), COMBINE)
@pytest.mark.parametrize("dense", ["mlp", "swiglu"])
def test_join_computes_what_the_layer_did_where_gates_are_constant(
    dense: str, combine: str, normalised: bool, shared: int
) -> None:
    """All parts of all experts differ, and the shared expert too; no mean of weights could be this FFN."""
    settings = config(
        top_k=2, routing="token", num_shared_experts=shared, combine=combine, normalize_gates=normalised,
        expert_width=HIDDEN // 2,
    )  # fmt: skip
    layer = vimoe.MoE(randomise(FFNS[dense]()), settings, TokenLayout(0, False))
    randomise(layer)
    assert layer.densify_methods == (("shared", "join") if shared else ("join",))
    x = constant_gates(layer)
    with vimoe.record(layer) as routings:
        y = layer(x)
    mass = torch.zeros(len(x.flatten(0, 1)), EXPERTS).scatter(1, routings[0].experts, routings[0].gates).mean(dim=0)
    joined = layer.joined(mass)
    assert ffn.describe(joined).hidden == HIDDEN * (shared + EXPERTS // 2)
    torch.testing.assert_close(joined(x), y, rtol=1e-4, atol=1e-4)


def test_join_of_experts_that_are_left_is_filled_up_with_silent_units() -> None:
    layer = vimoe.MoE(randomise(FFNS["mlp"]()), config(expert_width=4, num_experts=6), TokenLayout(0, False))
    randomise(layer)
    layer.keep_experts([4, 2])
    joined = layer.joined(torch.tensor([0.3, 0.1]))
    assert joined.fc1.out_features == 24 and not joined.fc1.weight[20:].any() and not joined.fc2.weight[:, 20:].any()
    x = torch.randn(3, 5, DIM)
    rows, source = x.flatten(0, 1)[:, None], torch.arange(15)
    first, second = (layer.experts(rows, source, torch.tensor(load))[:, 0] for load in ([15, 0], [0, 15]))
    expected = 0.6 * layer.shared(x).flatten(0, 1) + 0.3 * first + 0.1 * second
    torch.testing.assert_close(joined(x).flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "how", "message"),
    [
        (
            {},
            "join",
            "experts that are as wide as its FFN was: expected narrower ones for how='join'; use how='shared'",
        ),
        ({"expert_width": 48}, "whole", "no pieces of one FFN: expected those of init='split'.*or how='join'"),
        ({"expert_width": 48}, "merge", "experts that are narrower than its FFN was: expected experts of its width"),
        ({"expert_width": 48}, "matched", "narrower than its FFN.*how='matched'; use how='shared' or how='join'"),
    ],
)
def test_a_method_that_does_not_fit_the_width_is_refused(settings: dict, how: str, message: str) -> None:
    model = upcycle(vit(), config(**settings))
    with pytest.raises(vimoe.VimoeError, match=message):
        vimoe.densify(model, how=how)
    assert len(layers(model)) == 2
