"""Kinds of experts: the layer against the naive loop, and what the rest of the package makes of a kind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from helpers.commands import QUICK, TINY, call, refused
from helpers.kinds import DECIDE, UNITS, Scaled, low_rank_weights
from helpers.layers import EXPERTS, FFNS, LAYOUTS, assert_agrees, make, tokens
from helpers.numbers import numbers
from helpers.pages import Reader
from helpers.pictures import roles
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from timm.layers import Mlp

import vimoe
from vimoe.analysis.expert_similarity import compare_experts
from vimoe.config.moe import EXPERTS as KINDS_OF_EXPERTS
from vimoe.config.train import TrainConfig
from vimoe.moe import ffn
from vimoe.moe.experts import Role
from vimoe.moe.packed import PackedExperts, can_pack
from vimoe.training.parameter_groups import parameter_groups

KINDS = ["ffn", "lora", "delta", "adapter", "low_rank", "scaled"]


@pytest.mark.parametrize(
    ("router", "layout"),
    [
        (router, layout)
        for layout, (unit, *_) in LAYOUTS.items()
        for router in ("softmax", *DECIDE)
        if router == "softmax" or (router, unit) in UNITS
    ],
)
@pytest.mark.parametrize("dense", ["mlp", "glu, gate last, norm", "swiglu, no biases"])
def test_experts_with_a_shared_base_agree_with_the_loop(dense: str, layout: str, router: str) -> None:
    layer, x = make(dense, layout, experts="low_rank", router=router).double(), tokens().double()
    assert_agrees(layer, x, router == "softmax", decide=DECIDE.get(router), of_expert=low_rank_weights)


@pytest.mark.parametrize("dense", FFNS)
@torch.no_grad()
def test_stacked_ffns_compute_what_their_weights_say(dense: str) -> None:
    """The grouped products against the loop over `weights` that every kind has from its base."""
    experts, x = make(dense).experts.double(), tokens().double().flatten(0, 1)[:, None]
    source, load = torch.tensor([3, 4, 0, 3, 9, 1, 0]), torch.tensor([2, 0, 4, 1])
    torch.testing.assert_close(experts(x, source, load), super(type(experts), experts).forward(x, source, load))
    torch.testing.assert_close(experts(x[:7], None, load), super(type(experts), experts).forward(x[:7], None, load))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["vit", "dinov2, packed SwiGLU", "eva02, SwiGLU with inner norm"])
@torch.no_grad()
def test_every_kind_starts_as_the_dense_ffn(family: str, kind: str) -> None:
    if kind == "adapter" and "inner norm" in family:
        pytest.skip("adapters refuse a norm")
    parent = vit(family)
    model = upcycle(copy.deepcopy(parent), config(experts=kind))
    torch.testing.assert_close(model(images(parent)), parent(images(parent)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adapter"])
@torch.no_grad()
def test_dropouts_stand_where_the_ffn_has_them(kind: str) -> None:
    """Before the norm and on the output; with the same masks every kind gives what the dense FFN gives."""
    dense = Mlp(8, 12, norm_layer=torch.nn.LayerNorm, drop=(0.5, 0.25)).train()
    layer = vimoe.MoE(dense, config(experts=kind), make().router.layout)
    x = tokens().flatten(0, 1)[:, None]
    torch.manual_seed(0)
    expected = dense(x)
    torch.manual_seed(0)
    torch.testing.assert_close(layer.experts(x, None, torch.tensor([0, 0, len(x), 0])), expected)


class Leaky(torch.nn.RReLU):
    """An activation that is random in training, and has a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_activation_follows_the_layer_to_eval_mode_and_other_types(kind: str) -> None:
    layer = vimoe.MoE(Mlp(8, 12, act_layer=Leaky), config(experts=kind, num_shared_experts=0), make().router.layout)
    assert layer.experts.kind.act is layer.experts.act
    copied, x = copy.deepcopy(layer).double().eval(), tokens().double()
    assert torch.equal(copied(x), copied(x)) and copied.experts.kind.act is copied.experts.act


@pytest.mark.parametrize("kind", KINDS)
def test_decay_follows_from_roles(kind: str) -> None:
    model = upcycle(vit(), config(experts=kind, num_shared_experts=0, top_k=2))
    groups = parameter_groups(model, TrainConfig(weight_decay=0.05, expert_weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    experts = layers(model)[0].experts
    assert set(experts.roles) == {name for name, _ in experts.named_parameters()}
    for name, role in experts.roles.items():
        assert decay[id(experts.get_parameter(name))] == (0.3 if role.matrix else 0), name
    assert {role.matrix for role in experts.roles.values()} == {True, False}


def test_activated_parameters_are_the_shared_ones_and_a_part_of_the_others() -> None:
    model = upcycle(vit(), config(experts="low_rank", top_k=2))
    experts = layers(model)[0].experts
    own = sum(p.numel() for name, p in experts.named_parameters() if not name.startswith("base."))
    base = sum(p.numel() for name, p in experts.named_parameters() if name.startswith("base."))
    assert base > 0 and experts.activated_params(2) == base + own / 2
    cost, dense = vimoe.count(model), vimoe.count(vit())
    router = layers(model)[0].router.weight.numel()
    assert cost.params == dense.params + 2 * (base + own + router)
    assert cost.activated_params == dense.params + 2 * (base + own // 2 + router)


@pytest.mark.parametrize("routing", ["image", "token"])
def test_the_mean_number_of_experts_is_what_is_counted(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = upcycle(vit(), config(router="threshold", routing=routing))
    everything = vimoe.count(model)
    monkeypatch.setattr("helpers.kinds.Threshold.experts_per_token", 1.5)
    cost = vimoe.count(model)
    layer = layers(model)[0]
    expert = sum(p[0].numel() for p in layer.experts.parameters())
    assert everything.activated_params == everything.params
    assert cost.activated_params == cost.params - 2 * round(2.5 * expert)
    assert everything.macs - cost.macs == 2 * 2.5 * 5 * layer.experts.macs


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_experts_that_are_kept_compute_what_they_did(kind: str) -> None:
    layer, x = perturb_experts(make(experts=kind)), tokens()
    before = layer.experts(x.flatten(0, 1)[:, None], torch.tensor([5, 2]), torch.tensor([1, 0, 0, 1]))
    layer.keep_experts([3, 0])
    assert layer.experts.num_experts == layer.config.num_experts == layer.router.config.num_experts == 2
    after = layer.experts(x.flatten(0, 1)[:, None], torch.tensor([2, 5]), torch.tensor([1, 1]))
    torch.testing.assert_close(after.flip(0), before)
    assert layer.router.weight.shape[0] == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["softmax", *DECIDE])
def test_a_folder_keeps_router_and_experts(router: str, kind: str, tmp_path: Path) -> None:
    model = perturb_experts(upcycle(vit(), config(router=router, experts=kind, routing="token")))
    vimoe.save(model, tmp_path / "m")
    again = vimoe.load(tmp_path / "m")
    assert (layers(again)[0].config.router, layers(again)[0].config.experts) == (router, kind)
    assert torch.equal(again(images(model)), model(images(model)))


@pytest.mark.parametrize(("setting", "value"), [("router", "threshold"), ("experts", "low_rank")])
def test_a_folder_of_a_kind_that_nobody_registered_is_refused_in_one_line(
    setting: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vimoe.save(upcycle(vit(), config(**{setting: value})), tmp_path / "m")
    monkeypatch.delitem(getattr(vimoe.config.moe, f"{setting.upper().rstrip('S')}S"), value)
    with pytest.raises(
        vimoe.VimoeError, match=rf"moe.{setting}='{value}': expected .*import what registers it"
    ) as error:
        vimoe.load(tmp_path / "m")
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_merging_takes_the_mean_of_what_the_experts_are() -> None:
    model = perturb_experts(upcycle(vit(), config(experts="low_rank")))
    layer = layers(model)[0]
    mass = torch.tensor([0.1, 0.4, 0.0, 0.2])
    merged = ffn.read(layer.merged(mass))
    shared = ffn.read(layer.shared)
    experts = [low_rank_weights(dict(layer.experts.named_parameters()), e) for e in range(EXPERTS)]
    for name, w in merged.items():
        mean = 0.3 * shared[name] + sum(m * expert[name] for m, expert in zip(mass.tolist(), experts, strict=True))
        torch.testing.assert_close(w, mean)


@torch.no_grad()
def test_merging_without_evidence_weighs_as_the_router_does_at_equal_scores() -> None:
    for router, mass in (("softmax", 1 / 4), ("expert_choice", 1 / 4), ("threshold", 0.0)):
        model = perturb_experts(upcycle(vit(), config(router=router, routing="token", top_k=1)))
        layer = layers(model)[0]
        expected = ffn.read(layer.merged(torch.full((EXPERTS,), mass / EXPERTS)))
        torch.testing.assert_close(ffn.read(vimoe.densify(model, how="merge").blocks[0].mlp), expected)
    alone = upcycle(vit(), config(router="threshold", num_shared_experts=0, top_k=2))
    with pytest.raises(vimoe.VimoeError, match="chooses no expert at equal scores.*expected gate_mass"):
        vimoe.densify(alone, how="merge")
    masses = {f"blocks.{block}.mlp": torch.full((EXPERTS,), 0.5) for block in (0, 1)}
    assert not layers(vimoe.densify(alone, how="merge", gate_mass=masses))


@pytest.mark.parametrize("how", ["merge", "matched"])
def test_experts_that_are_no_ffns_are_not_merged(how: str) -> None:
    model = upcycle(vit(), config(experts="scaled"))
    assert layers(model)[0].densify_methods == ("shared",)
    with pytest.raises(
        vimoe.VimoeError, match=rf"experts of the kind 'scaled', which are no FFNs.*how='{how}'; use how='sh"
    ):
        vimoe.densify(model, how=how)
    assert layers(vimoe.densify(model)) == []


@pytest.mark.parametrize(
    ("how", "missing"),
    [
        ("shared", "no shared expert: expected one"),
        ("merge", "experts of the kind 'scaled', which are no FFNs: expected FFNs"),
        ("matched", "experts of the kind 'scaled', which are no FFNs: expected FFNs"),
    ],
)
def test_a_layer_that_no_method_makes_dense_is_said_to_be_one(how: str, missing: str) -> None:
    model = upcycle(vit(), config(experts="scaled", num_shared_experts=0, top_k=2))
    message = rf"blocks\.0\.mlp \(block 0\) has {missing} for how='{how}'; it cannot be made dense, so leave it out of"
    with pytest.raises(vimoe.VimoeError, match=message):
        vimoe.densify(model, how=how)
    assert len(layers(model)) == 2


def test_without_a_shared_expert_densify_names_the_methods_that_are_left() -> None:
    model = upcycle(vit(), config(num_shared_experts=0, top_k=2))
    with pytest.raises(vimoe.VimoeError, match="for how='shared'; use how='merge' or how='matched'"):
        vimoe.densify(model)


class Forgetful(Scaled):
    """Experts that give no role to a parameter."""

    @property
    def roles(self) -> dict[str, Role]:
        return {name: role for name, role in super().roles.items() if name != "scale"}


class Inventive(Scaled):
    """Experts that give a role to a parameter that is not there."""

    @property
    def roles(self) -> dict[str, Role]:
        return {**super().roles, "shift": Role(matrix=False)}


@pytest.mark.parametrize(("kind", "odd"), [(Forgetful, "scale"), (Inventive, "shift")])
def test_roles_that_do_not_name_the_parameters_are_refused_and_nothing_is_changed(
    kind: type, odd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS_OF_EXPERTS, "odd", kind)
    model = vit()
    with pytest.raises(vimoe.VimoeError, match=rf"moe.experts='odd': .* differ in {odd}: expected a Role") as error:
        vimoe.upcycle(model, config(experts="odd"))
    assert "\n" not in str(error.value) and not layers(model)


@pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="this build of torch packs nothing")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["softmax", *DECIDE])
@torch.no_grad()
def test_optimised_it_computes_the_same_and_packs_ffns(router: str, kind: str) -> None:
    model = perturb_experts(upcycle(vit(), config(experts=kind, router=router, routing="token")))
    expected = model(images(model))
    fast = vimoe.optimize(model)
    assert isinstance(fast.blocks[0].mlp.experts, PackedExperts) == (kind != "scaled")
    torch.testing.assert_close(fast(images(model)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", ["softmax", "threshold"])
def test_experts_that_are_no_ffns_are_compared_by_their_outputs(router: str) -> None:
    layer, x = make(experts="scaled", router=router).eval(), tokens()
    with torch.no_grad():
        layer.experts.scale.copy_(torch.tensor([1.0, 2.0, -1.0, 3.0])[:, None].expand_as(layer.experts.scale))
    found = compare_experts(layer, x)
    assert found.weight_similarity is found.deviation_directions is found.neuron_similarity is None
    assert found.active_neurons is found.router_expert_correlation is None
    assert found.output_similarity == pytest.approx(0, abs=1e-6)  # one of four points the other way
    with vimoe.record(layer) as routings:
        layer(x)
    best = routings[0].experts[:, 0]
    best = best[best >= 0]
    assert 0 < (best == 3).sum() < len(best)
    assert found.top1_has_largest_norm == pytest.approx(float((best == 3).float().mean()))


def test_experts_with_a_shared_base_are_compared_as_the_ffns_that_they_are() -> None:
    layer, x = make(experts="low_rank").eval(), tokens()
    twin = make().eval()
    with torch.no_grad():
        twin.load_state_dict({n: w for n, w in layer.state_dict().items() if ".experts." not in n}, strict=False)
        twin.router.weight.copy_(layer.router.weight)
        for e in range(EXPERTS):
            for name, w in layer.experts.weights(e).items():
                twin.experts.get_parameter(name)[e].copy_(w)
    ours, theirs = (compare_experts(each, x, twin.shared).to_dict() for each in (layer, twin))
    assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-4, abs=1e-5)
    assert None not in ours.values()


def test_layers_that_nothing_makes_dense_are_analysed_and_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a shared expert and with experts that are no FFNs there is no method."""
    run, moe = tmp_path / "run", ["--moe.experts=scaled", "--moe.num_shared_experts=0", "--moe.top_k=2"]
    data = ["--data.path", roles(tmp_path / "photos"), "--train.epochs=1"]
    call(capsys, "train", *TINY, *QUICK, *moe, *data, "--moe.layers=last:1", "--moe.num_experts=4", "--out", run)
    (layer,) = call(capsys, "analyze", run, "--draws=2")["layers"]
    assert layer["dense"] == {} and len(layer["experts"]) == 4 and layer["permuted"]
    pruned = call(capsys, "prune", run, "--tolerance=9", "--experts=true", "--out", tmp_path / "pruned")
    assert [step["expert"] is not None for step in pruned["steps"]] == [True, True] and pruned["kept"] == []
    assert pruned["without_method"] == ["blocks.1.mlp"]
    page = Reader(tmp_path / "pruned" / "report.html").text
    assert "they stay: blocks.1.mlp." in page and "the pruned model is dense" not in page
    assert layers(vimoe.load(tmp_path / "pruned" / "model"))[0].config.num_experts == 2


@pytest.mark.parametrize("verb", ["plan", "count"])
def test_plan_and_count_know_the_kinds(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"router": "threshold", "experts": "low_rank", "num_experts": 4, "layers": "all"}
    found = call(
        capsys, verb, *TINY, "--model.num_classes=5", *(f"--moe.{name}={value}" for name, value in kinds.items())
    )
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, num_classes=5, patch_size=8, embed_dim=24, depth=2, num_heads=2
    )
    cost = vimoe.count(vimoe.upcycle(model, vimoe.MoEConfig(**kinds)))
    assert found["moe"]["params"] == cost.params and found["moe"]["activated_params"] == cost.activated_params
    assert found["moe"]["macs"] == cost.macs
    if verb == "plan":
        assert "4 experts (low_rank), threshold router" in str(vimoe.plan(vit(), config(**kinds)))
    message = refused(capsys, verb, *TINY, "--model.num_classes=5", "--moe.router=treshold")
    assert "moe.router='treshold': expected one of softmax, " in message and "did you mean 'threshold'" in message
