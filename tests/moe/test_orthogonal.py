"""Orthogonal changes of a token's experts: the formula token by token, angles, the start, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import helpers.kinds  # noqa: F401  registers kinds of routers and experts
import pytest
import torch
from helpers.changed import ffn as apply
from helpers.changed import under
from helpers.layers import make, tokens
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vimoe
from vimoe.config.moe import EXPERTS
from vimoe.errors import ConfigError, SurgeryError, VimoeError
from vimoe.models.inference import set_backend
from vimoe.moe.orthogonal import EPSILON, orthogonal_slots
from vimoe.moe.shared_base import SharedBase
from vimoe.moe.stacked_ffns import StackedFFNs

KINDS = ["lora", "delta", "adapter"]
every_kind = pytest.mark.parametrize("experts", KINDS)
either_form = pytest.mark.parametrize("form", ["outputs", "normalized"])


def layer(form: str = "outputs", **settings: object) -> vimoe.MoE:
    """In float64, with experts that all differ."""
    return make(**{"experts": "lora", "k": 3, "orthogonal": form, **settings}).double()


def of_token(found: vimoe.MoE, x: Tensor, chosen: dict[int, Tensor], own: dict[str, Tensor]) -> Tensor:
    """Output for a token (D,) by classical Gram-Schmidt, given the gates of its experts; S has its parameters `own`."""
    shared, y = apply(own, x, found), 0.0
    before: list[Tensor] = []
    for e in sorted(chosen, key=lambda e: -chosen[e].item()):
        change = found.experts.apply_weights(found.experts.weights(e), x) - shared
        change = change - sum(((change @ w) / (w @ w + EPSILON) * w for w in before), torch.zeros_like(x))
        before.append(change)
        if found.config.orthogonal == "normalized":
            change = change / (change @ change + EPSILON).sqrt()
        y = y + chosen[e] * (change if found.config.combine == "mix" else shared + change)
    return shared + y


def reference(found: vimoe.MoE, x: Tensor, routing: vimoe.Routing) -> Tensor:
    own, rows = under(dict(found.named_parameters()), "shared."), []
    for t, token in enumerate(x.flatten(0, 1)):
        row = t // routing.tokens_per_unit
        chosen = zip(routing.experts[row].tolist(), routing.gates[row], strict=True)  # the first choice first
        rows.append(of_token(found, token, {e: gate for e, gate in chosen if e >= 0}, own))
    return torch.stack(rows).view_as(x)


@either_form
@every_kind
@pytest.mark.parametrize("layout", ["image by class token", "token"])
@pytest.mark.parametrize("more", [{}, {"combine": "sum"}, {"router": "threshold"}, {"gate": "choice"}], ids=str)
def test_outputs_and_gradients_are_those_of_the_formula(experts: str, layout: str, form: str, more: dict) -> None:
    found, x = layer(form, experts=experts, layout=layout, **more), tokens().double().requires_grad_()
    with vimoe.record(found) as routings:
        y = found(x)
    (routing,) = routings
    assert "router" not in more or not routing.chosen.all() and routing.chosen.sum(dim=1).max() > 1
    exact = reference(found, x, routing)
    torch.testing.assert_close(y, exact, rtol=1e-8, atol=1e-10)
    parameters = [p for name, p in found.named_parameters() if p.requires_grad]
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    ours, theirs = (
        torch.autograd.grad((out * direction).sum(), [x, *parameters], retain_graph=True) for out in (y, exact)
    )
    assert all(g.abs().max() > 1e-5 for g in theirs), "the comparison would be of zeros"
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def cosines(found: vimoe.MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines (R, U, P) of the changes of each two experts of a token, and their lengths (R, U, K)."""
    with torch.no_grad(), vimoe.record(found, outputs=True) as routings:
        found(x)
    (routing,) = routings
    shared = found.shared(x).view(len(routing.gates), 1, routing.tokens_per_unit, -1)
    changes = (routing.outputs - shared).transpose(1, 2)
    lengths = changes.norm(dim=-1)
    unit = changes / lengths[..., None]
    i, j = torch.triu_indices(unit.shape[2], unit.shape[2], offset=1)
    return (unit @ unit.mT)[..., i, j], lengths


@either_form
@every_kind
@torch.no_grad()
def test_each_two_changes_of_a_token_are_orthogonal(experts: str, form: str) -> None:
    """In float32 to the rounding of S(x) + w, from which they are read here."""
    for dtype, limit in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        found, x = layer(form, experts=experts).to(dtype), tokens().to(dtype)
        angles, lengths = cosines(found, x)
        assert angles.abs().max() < limit
        if form == "normalized":
            torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-4, rtol=0)
        assert cosines(layer("none", experts=experts).to(dtype), x)[0].abs().max() > 0.1


@torch.no_grad()
def test_the_first_expert_is_unchanged_and_others_are_not() -> None:
    found = []
    for form in ("outputs", "none"):
        made = layer(form)
        with vimoe.record(made, outputs=True) as routings:
            made(tokens().double())
        found.append(routings[0].outputs)
    torch.testing.assert_close(found[0][:, 0], found[1][:, 0], rtol=1e-12, atol=1e-12)
    assert (found[0][:, 1] - found[1][:, 1]).abs().amax(dim=(1, 2)).min() > 1e-6


@torch.no_grad()
def test_the_first_is_the_one_with_the_largest_gate_and_not_the_first_choice() -> None:
    """A bias on the choice may put another expert first."""
    found, x = layer(bias_update_rate=0.1), tokens().double()
    found.router.choice_bias += torch.tensor([1.0, 2.0, 0.0, 3.0])
    with vimoe.record(found, outputs=True) as routings:
        y = found(x)
    (routing,) = routings
    assert (routing.gates[:, 0] < routing.gates.max(dim=1).values).any()
    torch.testing.assert_close(y, reference(found, x, routing))
    shuffled = replace(routing, **{name: getattr(routing, name)[:, [2, 0, 1]] for name in ("gates", "experts")})
    for name in ("gates", "experts"):
        assert torch.equal(getattr(shuffled.by_gate, name), getattr(routing.by_gate, name))
    found.router.decide = lambda logits, batch: replace(shuffled, logits=logits)
    torch.testing.assert_close(found(x), y)


@either_form
def test_the_gradient_is_that_of_finite_differences(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    y, base = (
        torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in ((2, 3, 2, 5), (2, 2, 5))
    )
    experts = torch.tensor([[0, 1, 2], [1, 3, -1]])
    routing = vimoe.Routing(torch.zeros(2, 4), torch.ones(2, 3), experts, "image", (2, 2))
    settings = vimoe.MoEConfig(experts="lora", top_k=2, orthogonal=form)
    torch.autograd.gradcheck(lambda y, base: orthogonal_slots(y, base, routing, settings)[:, :2], (y, base))


@every_kind
@torch.no_grad()
def test_a_new_layer_computes_what_its_parent_did_and_densifies_to_it(experts: str) -> None:
    model = vit()
    x, before = images(model), model(images(model))
    plan = vimoe.plan(model, config(top_k=2, experts=experts, orthogonal="outputs"))
    assert plan.start is None and "orthogonal=outputs" in str(plan)
    plain = vimoe.plan(model, config(top_k=2, experts=experts)).moe
    assert plan.moe == plain  # no parameter more, and products of rows alone
    upcycle(model, config(top_k=2, experts=experts, orthogonal="outputs"))
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=0)
    for layer_ in layers(model):
        assert ("merge" in layer_.densify_methods) == (experts != "adapter")
    torch.testing.assert_close(vimoe.densify(model)(x), before, atol=1e-6, rtol=0)


def test_parameters_are_those_of_the_changes() -> None:
    found = vimoe.MoE(Mlp(8, 12), config(experts="lora", rank=2, top_k=2, orthogonal="outputs"), make().router.layout)
    of_dense = sum(p.numel() for p in Mlp(8, 12).parameters())
    assert sum(p.numel() for p in found.parameters()) == of_dense + 4 * 2 * 2 * (8 + 12) + 4 * 8


@either_form
@every_kind
def test_gradients_are_finite_where_all_changes_are_zero(experts: str, form: str) -> None:
    model = upcycle(vit(), config(top_k=2, routing="token", experts=experts, orthogonal=form)).train()
    for _ in range(3):
        model(images(model)).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        moved = [p.grad.abs().max() for layer_ in layers(model) for p in layer_.experts.parameters()]
        assert max(moved) > 0
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(1e-3 * p.grad.sign() if p.grad is not None else 0)
        model.zero_grad()


def test_a_start_with_unit_length_is_measured_and_is_no_mean() -> None:
    plan = vimoe.plan(vit(), config(top_k=2, experts="lora", orthogonal="normalized"))
    assert plan.start is not None
    model = upcycle(vit(), config(top_k=2, experts="lora", orthogonal="normalized"))
    assert all(layer_.densify_methods == ("shared",) for layer_ in layers(model))
    with pytest.raises(SurgeryError, match="merge"):
        vimoe.densify(model, how="merge")


def trained(form: str = "outputs", **settings: object) -> nn.Module:
    return perturb_experts(upcycle(vit(), config(top_k=2, experts="lora", orthogonal=form, **settings)))


@either_form
@torch.no_grad()
def test_saved_copied_optimised_and_by_each_backend_it_is_the_same(form: str, tmp_path: Path) -> None:
    model = trained(form, routing="token")
    x, y = images(model), model(images(model))
    assert (trained("none", routing="token")(x) - y).abs().max() > 1e-3
    loaded = vimoe.load(vimoe.save(model, tmp_path / "model"))
    assert layers(loaded)[0].config.orthogonal == form
    torch.testing.assert_close(loaded(x), y)
    for backend in ("loop", "bmm", "grouped_mm"):
        torch.testing.assert_close(set_backend(copy.deepcopy(model), backend)(x), y, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(x[1:2]), y[1:2], atol=1e-5, rtol=1e-4)
    assert model(x[:0]).shape == (0, 5)
    torch.testing.assert_close(vimoe.optimize(copy.deepcopy(model))(x), y, atol=1e-4, rtol=1e-4)


@either_form
def test_compiled_checkpointed_and_with_experts_removed(form: str) -> None:
    found, x = layer(form, k=2).float(), tokens()
    compiled = torch.compile(found, backend="aot_eager", fullgraph=True)
    runs = (found, compiled, lambda x: checkpoint(found, x, use_reentrant=False))
    gradients = [torch.autograd.grad(run(x).square().sum(), [*found.parameters()]) for run in runs]
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])
    found.keep_experts([3, 1])
    assert found(x).isfinite().all()


@torch.no_grad()
def test_under_autocast_it_computes_in_float32_what_is_rounded_once() -> None:
    found, x = layer().float(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        y = found(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), found(x), rtol=0.1, atol=0.2)
    new = vimoe.MoE(Mlp(8, 12), found.config, found.router.layout)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(new(x), new.shared(x), rtol=0.01, atol=0.01)


@torch.no_grad()
def test_none_is_the_layer_without_it_bit_for_bit() -> None:
    found, x = layer("none").float(), tokens()
    routing = found.router(x)
    calls = []
    found.experts.register_forward_hook(lambda module, args, y: calls.append(y))
    y = found(x)
    from vimoe.moe.dispatch import dispatch

    shared = found.shared(x).view(len(routing.gates), 1, -1)
    assert torch.equal(y, dispatch(routing).combine(calls[0], shared, True).view_as(y))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 1}, "orthogonal='outputs' with top_k=1: expected at least 2, since a single output has none"),
        ({"num_shared_experts": 0}, "with num_shared_experts=0: expected 1, the one that all experts change"),
        ({"num_shared_experts": 2}, "with num_shared_experts=2: expected 1"),
        ({"router_gradient": "dense"}, "with router_gradient='dense': expected 'chosen'"),
        ({"experts": "ffn"}, "orthogonal='outputs' with experts='ffn': expected it with experts='lora' or 'delta' or"),
    ],
)
def test_what_has_no_changes_to_make_orthogonal_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vimoe.MoEConfig(**{"experts": "lora", "top_k": 2, "orthogonal": "outputs", **settings})


@pytest.mark.parametrize(("router", "routing"), [("soft", "token"), ("smear", "image")])
def test_routers_that_mix_are_refused(router: str, routing: str) -> None:
    settings = config(experts="lora", top_k=2, orthogonal="outputs", router=router, routing=routing)
    with pytest.raises(VimoeError, match=f"orthogonal='outputs' with router='{router}': expected 'none'"):
        vimoe.upcycle(vit(), settings)


def test_another_kind_of_experts_may_have_it_if_it_changes_the_shared_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERTS, "mine", type("Mine", (EXPERTS.find("lora"), SharedBase), {}))
    monkeypatch.setitem(EXPERTS, "own", type("Own", (StackedFFNs,), {}))
    settings = {"top_k": 2, "orthogonal": "outputs"}
    assert upcycle(vit(), config(experts="mine", **settings))(images(vit())).isfinite().all()
    with pytest.raises(ConfigError, match="experts='own': expected experts that change the shared expert"):
        vimoe.upcycle(vit(), config(experts="own", **settings))
