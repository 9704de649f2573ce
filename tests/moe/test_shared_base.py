"""Experts that change one FFN: what holds for all of their kinds, with the shared expert as base and with their own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.changed import batch, trained
from helpers.flops import macs
from helpers.layers import make, tokens
from helpers.numbers import numbers
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from timm.layers import Mlp
from torch import nn

import vimoe
from vimoe.analysis.expert_similarity import compare_experts
from vimoe.config.train import TrainConfig
from vimoe.models.inference import set_backend
from vimoe.moe.ffn import read
from vimoe.moe.packed import PackedExperts, can_pack
from vimoe.training.parameter_groups import freeze_all_but, parameter_groups

KINDS = ["lora", "delta", "adapter"]
every_kind = pytest.mark.parametrize("kind", KINDS)
either_base = pytest.mark.parametrize("shared", [0, 1])


def layer_of(model: nn.Module) -> vimoe.MoE:
    (layer,) = layers(model)
    return layer


@every_kind
@torch.no_grad()
def test_with_one_shared_expert_the_base_is_that_expert_and_stays_it(kind: str, tmp_path: Path) -> None:
    """After a copy, a cast, an assigned state, and a folder the experts still follow the shared expert."""
    model = trained(kind)
    vimoe.save(model, tmp_path / "m")
    assigned = copy.deepcopy(model)
    assigned.load_state_dict(model.state_dict(), assign=True)
    for each in (model, copy.deepcopy(model), assigned, vimoe.load(tmp_path / "m"), copy.deepcopy(model).double()):
        layer = layer_of(each)
        assert layer.experts.base is layer.shared
        x = torch.randn(2, 1, 64, dtype=layer.router.weight.dtype)
        ask = lambda layer=layer, x=x: layer.experts(x, None, torch.tensor([1, 0, 0, 1]))  # noqa: E731
        before = ask()
        layer.shared.fc2.bias.add_(1)
        torch.testing.assert_close(ask(), before + 1)
        layer.shared.fc2.bias.sub_(1)
    assert not any(name.startswith("own.") for name, _ in layer_of(model).experts.named_parameters())


@every_kind
@pytest.mark.parametrize("shared", [0, 2])
def test_otherwise_the_experts_own_a_base_that_is_trained(kind: str, shared: int) -> None:
    dense = Mlp(8, 12).requires_grad_(False)
    moe = config(experts=kind, num_shared_experts=shared, top_k=2, layers="last:2")
    layer = vimoe.MoE(dense, moe, make().router.layout)
    assert layer.experts.base is layer.experts.own is not dense
    assert all(p.requires_grad for p in layer.experts.parameters())
    assert {name for name, role in layer.experts.roles.items() if not role.per_expert} == {
        f"own.{name}" for name, _ in dense.named_parameters()
    }


@every_kind
@pytest.mark.parametrize("load", [[2, 2, 2, 2], [5, 0, 2, 1]], ids=["equal", "unequal"])
def test_each_backend_trains_alike(kind: str, load: list[int]) -> None:
    """A backend may give a view of its product, as a batched one does of equal loads."""
    found = []
    for backend in ("loop", "bmm", "grouped_mm"):
        experts = set_backend(copy.deepcopy(layer_of(trained(kind))), backend).experts
        x = torch.randn(8, 3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        experts(x, None, torch.tensor(load)).square().mean().backward()
        found.append([x.grad, *(p.grad for p in experts.parameters())])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, theirs)


@every_kind
@either_base
def test_training_moves_every_part_and_a_frozen_shared_expert_stays(kind: str, shared: int) -> None:
    layer = layer_of(trained(kind, shared))
    for name, p in layer.experts.named_parameters():
        assert p.isfinite().all() and p.any(), name
    frozen = vimoe.MoE(Mlp(8, 12).requires_grad_(False), config(experts=kind), make().router.layout)
    frozen(tokens()).sum().backward()
    assert all(p.grad is None for p in frozen.shared.parameters())
    assert all(p.grad is not None for p in frozen.experts.parameters())


@every_kind
@either_base
def test_bfloat16_computes_in_bfloat16(kind: str, shared: int) -> None:
    layer, x = make(experts=kind, shared=shared, layout="image by class token"), tokens()
    rough = copy.deepcopy(layer).to(torch.bfloat16)
    y = rough(x.bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad.isfinite().all() for p in rough.parameters())
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), layer(x), rtol=0.1, atol=0.2)


# of an FFN of 8 channels and 12 hidden units: parameters of one expert's change, and multiply-adds for a token
OF_FORMULA = {
    "lora": ({"rank": 2}, 2 * 2 * (8 + 12), 2 * 8 * 12 + 2 * 2 * (8 + 12)),
    "delta": ({"delta_density": 0.1}, 2 * 10, 2 * 8 * 12),
    "adapter": ({"rank": 2}, 2 * (8 + 1) + 2 * 8, 2 * 8 * (12 + 2)),
}


@every_kind
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_parameters_and_multiply_adds_are_those_of_the_formula(kind: str, shared: int) -> None:
    size, change, macs = OF_FORMULA[kind]
    experts = make(experts=kind, shared=shared, **size).experts
    base = 0 if shared == 1 else 2 * 8 * 12 + 8 + 12
    assert sum(p.numel() for p in experts.parameters()) == base + 4 * change
    assert experts.activated_params(2) == base + 2 * change and experts.macs == macs


@every_kind
@either_base
@pytest.mark.parametrize("routing", ["image", "token"])
@torch.no_grad()
def test_count_and_plan_say_what_the_model_has_and_does(kind: str, shared: int, routing: str) -> None:
    moe = config(experts=kind, num_shared_experts=shared, routing=routing, top_k=2)
    planned = vimoe.plan(vit(), moe).moe
    model = upcycle(vit(), moe)
    cost, dense = vimoe.count(model), vimoe.count(vit())
    assert planned == cost and cost.params == sum(p.numel() for p in model.parameters())
    experts = layers(model)[0].experts
    changes = sum(p.numel() for n, p in experts.named_parameters() if not n.startswith("own."))
    assert cost.params == dense.params + 2 * (changes + 4 * 24)  # with a shared expert or without, one FFN a layer
    assert cost.activated_params == cost.params - 2 * changes // 2
    assert cost.computed_macs == macs(model, images(model, 1))


@every_kind
@either_base
def test_it_is_compiled_whole_and_exported(kind: str, shared: int) -> None:
    torch._dynamo.reset()
    layer, x = make(experts=kind, shared=shared), tokens()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, layer(x))
    ours, theirs = (torch.autograd.grad(z.square().sum(), list(layer.parameters())) for z in (y, layer(x)))
    torch.testing.assert_close(ours, theirs)
    program = torch.export.export(layer.eval(), (x,), strict=False).module()
    torch.testing.assert_close(program(x.flip(1)), layer(x.flip(1)))  # other decisions than those of the example


@every_kind
def test_the_shared_expert_alone_is_what_is_left(kind: str) -> None:
    parent = vit()
    model = perturb_experts(upcycle(copy.deepcopy(parent), config(experts=kind)))
    assert (model(images(model)) - parent(images(parent))).abs().max() > 1e-3
    restored = vimoe.set_reading(vimoe.densify(model), "all")
    assert torch.equal(restored(images(parent)), parent(images(parent)))


@every_kind
@either_base
def test_each_parameter_is_in_one_group_and_train_only_moe_trains_the_base(kind: str, shared: int) -> None:
    model = upcycle(vit(), config(experts=kind, num_shared_experts=shared, top_k=2))
    freeze_all_but(model, ["blocks.1.mlp"])
    layer = layers(model)[1]
    assert all(p.requires_grad for p in layer.parameters()) and not layers(model)[0].router.weight.requires_grad
    groups = parameter_groups(model, TrainConfig(weight_decay=0.1))
    decay = [(id(p), group["weight_decay"]) for group in groups for p in group["params"]]
    assert sorted(p for p, _ in decay) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    vectors = {name for name, p in layer.experts.named_parameters() if (id(p), 0) in decay}
    assert vectors == {name for name, _ in layer.experts.named_parameters() if name.endswith("bias")}


packs = pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="this build of torch packs nothing")


@packs
@every_kind
@either_base
@torch.no_grad()
def test_optimised_it_computes_the_same(kind: str, shared: int) -> None:
    model, (x, _) = trained(kind, shared), batch()
    expected = model(x)
    fast = vimoe.optimize(model)
    assert isinstance(layer_of(fast).experts, PackedExperts)
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)


@packs
@every_kind
@torch.no_grad()
def test_experts_that_are_not_packed_keep_the_shared_expert_that_they_read(kind: str) -> None:
    model, (x, _) = trained(kind), batch()
    layer_of(model).experts.register_forward_hook(lambda *_: None)
    expected = model(x)
    torch.testing.assert_close(vimoe.optimize(model)(x), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(layer_of(model).shared.fc1, nn.Linear)


@every_kind
@either_base
def test_they_are_compared_as_the_ffns_that_they_are(kind: str, shared: int) -> None:
    """With experts "ffn" of the same weights, which for adapters are wider."""
    layer = layer_of(trained(kind, shared))
    twin = vimoe.MoE(Mlp(64, layer.experts.width), config(top_k=2, routing="token"), layer.router.layout).eval()
    with torch.no_grad():
        twin.router.weight.copy_(layer.router.weight)
        for e in range(4):
            twin.experts.set_weights(e, layer.experts.weights(e))
    x = torch.randn(2, 5, 64)
    ours, theirs = (compare_experts(each, x, twin.shared).to_dict() for each in (layer, twin))
    assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-4, abs=1e-5) and None not in ours.values()
    assert ours["weight_similarity"] < 1 and ours["output_similarity"] < 1


@pytest.mark.parametrize("kind", ["lora", "delta"])
@pytest.mark.parametrize("how", ["merge", "matched"])
@either_base
@torch.no_grad()
def test_the_mean_of_trained_experts_is_that_of_their_full_weights(kind: str, how: str, shared: int) -> None:
    """Units of one base stay in their order, so matching changes nothing."""
    model = trained(kind, shared)
    layer = layer_of(model)
    parts = [layer.experts.weights(e) for e in range(4)]
    mass = torch.tensor([0.3, 0.1, 0.0, 0.6 - 0.2 * shared])
    expected = {
        name: sum(m * part[name] for m, part in zip(mass.tolist(), parts, strict=True))
        + (read(layer.shared)[name] * 0.2 if shared else 0)
        for name in parts[0]
    }
    assert (parts[0]["fc1.weight"] - parts[1]["fc1.weight"]).abs().max() > 1e-3
    vimoe.densify(model, how=how, gate_mass={"blocks.5.mlp": mass})
    for name, w in read(model.blocks[5].mlp).items():
        torch.testing.assert_close(w, expected[name], rtol=1e-4, atol=1e-5)


@every_kind
@either_base
def test_evidence_is_taken_and_experts_and_layers_are_pruned(kind: str, shared: int, tmp_path: Path) -> None:
    model, loader = trained(kind, shared), [batch()]
    found = vimoe.analyze(model, loader, draws=2)
    means = [] if kind == "adapter" else ["merge", "matched"]
    assert list(found.layers[0].dense) == ["shared"] * shared + means
    assert found.layers[0].comparison["weight_similarity"] < 1
    small = copy.deepcopy(model)
    done = vimoe.prune(model, found, loader, tolerance=100)
    assert len(layers(model)) == (not found.layers[0].dense) == len(done.without_method)
    layer_of(small).keep_experts([3, 1])
    y = small(loader[0][0])
    torch.testing.assert_close(vimoe.load(vimoe.save(small, tmp_path / "m"))(loader[0][0]), y)
