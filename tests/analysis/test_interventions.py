"""Overruling a layer does to each image what it says, as a naive loop does it, and nothing outlives it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.kinds import UNITS
from helpers.slow import one_in
from helpers.tiny import FAMILIES, config, images, layers, perturb_experts, randomise, upcycle, vit
from torch import Tensor, nn

import vimoe
from vimoe.analysis.changes import Changes
from vimoe.analysis.interventions import (
    Frozen,
    Handed,
    Images,
    Intervention,
    Only,
    Subjects,
    Without,
    _outputs,
    measure,
)
from vimoe.analysis.partial_forward import PartialForward
from vimoe.errors import DataError, VimoeError
from vimoe.models.frozen_trunk import Entry
from vimoe.models.reading import ignoring_hooks
from vimoe.models.segmenter import Segmenter
from vimoe.moe.layer import moe_layers


def model_and_images(family: str = "vit", **settings: object) -> tuple[nn.Module, Tensor]:
    model = perturb_experts(upcycle(vit(family), config(**settings)))
    return model, images(model)


def decisions(model: nn.Module, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), vimoe.record(model) as routings:
        model(x)
    (routing,) = [r for r in routings if r.layer == name]
    return tuple(a.view(len(x), -1, a.shape[1]) for a in (routing.experts, routing.gates))


def naive(model: nn.Module, name: str, intervention: Intervention, x: Tensor, index: Tensor) -> Tensor:
    """(B, ...) the whole model under one intervention."""
    layer = model.get_submodule(name)
    if isinstance(intervention, nn.Module):
        hook = layer.register_forward_hook(lambda _layer, args, _output: intervention(args[0]))
    else:
        hook = layer.router.register_forward_hook(lambda _router, _args, routing: intervention(layer, routing, index))
    with torch.no_grad(), ignoring_hooks():  # decisions are of the tokens that are read
        found = model(x)
    hook.remove()
    return found


def find_partial(model: nn.Module, x: Tensor) -> PartialForward:
    with torch.no_grad():
        return PartialForward.find(model, list(moe_layers(model)), Entry(x[:2]))


def overruled(
    model: nn.Module, name: str, interventions: Sequence[Intervention], x: Tensor, index: Tensor | None = None
) -> Tensor:
    """(V, B, ...) the model under each intervention, as `measure` computes it."""
    index = torch.arange(len(x)) if index is None else index
    partial = find_partial(model, x)
    with torch.no_grad():
        outputs, records = partial.forward(Entry(x), [name])
        found = outputs.repeat(len(interventions), *[1] * outputs.ndim)
        for columns, rows, y in _outputs(model.get_submodule(name), records[name], interventions, index, size=4):
            found[columns, rows] = partial.rest(name, records[name], rows, y)
    return found


def every_kind(model: nn.Module, name: str, x: Tensor) -> list[Intervention]:
    """Of each kind some, more than there are images to compute at a time."""
    layer = model.get_submodule(name)
    slots, experts_and_gates = layer.router.slots, decisions(model, x, name)
    fixed = torch.arange(slots)
    fixed = fixed.where(fixed < max(1, slots - 1), -1) if layer.router.ragged else fixed
    return [
        *(Handed(*experts_and_gates, torch.arange(len(x)).roll(by)) for by in range(3)),
        Frozen(fixed, torch.full((slots,), 0.4) * (fixed >= 0)),
        *(Without(expert) for expert in range(layer.config.num_experts)),
        *(layer.dense(how, torch.full((4,), 0.1)) for how in layer.densify_methods),
    ]


def assert_as_naive(model: nn.Module, x: Tensor) -> None:
    for name in moe_layers(model):
        interventions = every_kind(model, name, x)
        found, index = overruled(model, name, interventions, x), torch.arange(len(x))
        assert (found[0] - found[1]).abs().max() > 1e-4  # ten times what is let pass below
        for intervention, ours in zip(interventions, found, strict=True):
            torch.testing.assert_close(ours, naive(model, name, intervention, x, index), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "routing", "top_k"), one_in(5, itertools.product(FAMILIES, ("image", "token"), (1, 2)))
)
def test_it_computes_what_a_naive_loop_does(family: str, routing: str, top_k: int) -> None:
    """One intervention at a time by hooks on the whole model; with blocks before, between and after the layers."""
    places = [1, 3] if top_k == 1 else [0, 2]  # in the last block too, or not
    model = perturb_experts(upcycle(vit(family, depth=4), config(layers=places, routing=routing, top_k=top_k)))
    x = images(model, batch=5)
    assert find_partial(model, x).first == places[0]
    assert_as_naive(model, x)


@pytest.mark.parametrize("experts", ["ffn", "low_rank", "scaled"])
@pytest.mark.parametrize("shared", one_in(2, [1, 0]))
@pytest.mark.parametrize(("router", "routing"), [("softmax", "image"), ("softmax", "token"), *UNITS])
def test_it_computes_what_a_naive_loop_does_for_every_kind_of_router_and_experts(
    router: str, routing: str, shared: int, experts: str
) -> None:
    settings = config(
        layers=[1, 3], router=router, routing=routing, num_shared_experts=shared, experts=experts, top_k=2
    )
    model = perturb_experts(upcycle(vit(depth=4), settings))
    x, labels = images(model, batch=5), torch.arange(5)
    found = []
    for name in moe_layers(model):
        interventions = every_kind(model, name, x)
        changes = measure_on(model, [(x, labels)], {name: interventions})[name].loss
        for v, intervention in enumerate(interventions):
            with torch.no_grad():
                losses = [
                    F.cross_entropy(y, labels, reduction="none")
                    for y in (model(x), naive(model, name, intervention, x, torch.arange(5)))
                ]
            assert changes[:, v] == pytest.approx((losses[1] - losses[0]).numpy(), abs=1e-4)
        found.append(abs(changes).max())
    assert max(found) > 1e-2


@pytest.mark.parametrize(("router", "fewest"), [("softmax", 1), ("threshold", 1), ("expert_choice", 5)])
def test_patches_are_left_out_unless_decisions_depend_on_them(router: str, fewest: int) -> None:
    """Nothing reads the patches that leave the last block; but experts choose among them."""
    model = perturb_experts(upcycle(vit(), config(layers="last:1", router=router, routing="token")))
    ((name, layer),) = moe_layers(model).items()
    tokens: list[int] = []
    layer.router.register_forward_pre_hook(lambda _router, args: tokens.append(args[0].shape[1]))
    measure(Subjects(model, [(images(model, 4), torch.arange(4))], [name]), {name: [Without(0)]})
    assert min(tokens) == fewest


@pytest.mark.parametrize("decoder", ["linear", "linear4"])
@pytest.mark.parametrize("routing", ["image", "token"])
def test_a_segmenter_gets_the_maps_of_blocks_that_are_not_run_again(decoder: str, routing: str) -> None:
    backbone = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=28, embed_dim=24, depth=4, num_heads=2, num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip
    model = randomise(Segmenter(backbone, 3, decoder)).eval()
    perturb_experts(upcycle(model, config(layers="last:2", routing=routing)))
    x = torch.randn(5, 3, 40, 28, generator=torch.Generator().manual_seed(0))
    assert find_partial(model, x).first == 2
    assert_as_naive(model, x)


class Wrapped(nn.Module):
    """A ViT between other things; with `beside`, a second branch that looks at the images as well."""

    def __init__(self, inside: nn.Module, beside: bool) -> None:
        super().__init__()
        self.inside, self.head = inside, nn.Linear(5, 4)
        self.beside = nn.Linear(3, 5) if beside else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(2 * x - 1)
        return self.head(y if self.beside is None else y + self.beside(x.mean(dim=(2, 3))))


@pytest.mark.parametrize("beside", [False, True])
def test_a_model_that_cannot_be_cut_runs_from_its_images(beside: bool) -> None:
    torch.manual_seed(0)
    model = perturb_experts(upcycle(Wrapped(vit(depth=3), beside).eval(), config(layers=[1, 2])))
    x = images(vit(), batch=5)
    assert find_partial(model, x).first == (None if beside else 1)
    assert_as_naive(model, x)


def test_a_part_that_runs_on_both_sides_of_the_layer_is_not_remembered() -> None:
    model = vit(depth=2)
    model.blocks[0].norm2 = model.blocks[1].norm2 = model.blocks[1].norm1
    perturb_experts(upcycle(model, config(layers=[1])))
    assert find_partial(model, images(model)).first == 1
    assert_as_naive(model, images(model, 5))


class Deaf(Wrapped):
    """Runs its layers, if at all, and does not look at what they give."""

    runs = True

    def forward(self, x: Tensor) -> Tensor:
        if self.runs:
            self.inside(x)
        return self.head(x.mean(dim=(1, 2, 3)).expand(5, -1).T)


@pytest.mark.parametrize("runs", [True, False])
def test_a_model_that_does_not_use_its_layers_is_refused_and_not_pruned(runs: bool) -> None:
    """All interventions would seem to cost nothing."""
    model = upcycle(Deaf(vit(), beside=False).eval(), config())
    model.runs = runs
    with pytest.raises(VimoeError, match=r"gives the same whatever inside.blocks.0.mlp gives: expected a model that"):
        find_partial(model, images(vit()))


def test_a_compiled_model_is_overruled_too() -> None:
    model = perturb_experts(upcycle(vit(depth=2), config(layers=[1])))
    compiled, x = torch.compile(model, backend="eager"), images(model, 6)
    with torch.no_grad():
        compiled(x)  # what was compiled before there is something to overrule
    batches, name = [(x, torch.arange(6) % 5)], "blocks.1.mlp"
    plan = [Without(1)]
    plain, found = measure_on(model, batches, {name: plan}), measure_on(compiled, batches, {f"_orig_mod.{name}": plan})
    assert found[f"_orig_mod.{name}"].loss == pytest.approx(plain[name].loss, abs=1e-5)
    assert abs(plain[name].loss).max() > 1e-3


def test_in_low_precision_the_shortcuts_are_the_same() -> None:
    model = perturb_experts(upcycle(vit(depth=3), config(layers=[1, 2]))).bfloat16()
    assert find_partial(model, images(model).bfloat16()).first == 1


def test_what_comes_before_a_layer_is_not_computed_again() -> None:
    """Counted: blocks, attention and experts that run; the values are compared above."""
    model = perturb_experts(upcycle(vit(depth=3), config(layers=[1, 2])))
    x, labels = images(model, 8), torch.arange(8) % 5
    subjects = Subjects(model, [(x, labels)], ["blocks.1.mlp", "blocks.2.mlp"])
    plan = {name: [Without(e) for e in range(4)] for name in ("blocks.1.mlp", "blocks.2.mlp")}
    measure(subjects, plan)
    rows: dict[str, list[int]] = {}
    for name in ("blocks.0.attn.proj", "blocks.1.attn.proj", "blocks.2.attn.proj", "blocks.2.mlp.shared.fc1"):
        counted = rows.setdefault(name, [])
        hook = lambda _part, args, counted=counted: counted.append(args[0].shape[:2].numel())  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    measure(subjects, plan)
    tokens = 8 * 5
    assert rows["blocks.0.attn.proj"] == []  # kept from the first reading
    assert rows["blocks.1.attn.proj"] == [tokens]  # the untouched model alone
    assert sum(rows["blocks.2.attn.proj"]) == 8 + 4 * 8  # and what overruling the layer before it changes
    assert sum(rows["blocks.2.mlp.shared.fc1"]) == 8 + 4 * 8 + 8  # of one token each: nothing reads the patches


def test_each_expert_computes_each_image_once() -> None:
    model, _ = model_and_images(top_k=2)
    x = images(model, batch=8)
    name, layer = list(moe_layers(model).items())[0]
    experts, gates = decisions(model, x, name)
    handed = [Handed(experts, gates, torch.arange(8).roll(by)) for by in (0, 1, 2, 1, 2, 1)]
    counted: list[int] = []
    layer.experts.register_forward_pre_hook(lambda _experts, args: counted.append(len(args[1])))
    overruled(model, name, handed, x)
    asked = {(i, int(e)) for i in range(8) for by in (1, 2) for e in experts[i - by].flatten()}
    assert counted[:3] == [4, 4, 16]  # two images to find the shortcuts, and the untouched model
    assert sum(counted[3:]) == len(asked) < 8 * 2 * 5


def test_no_expert_computes_for_an_empty_slot() -> None:
    model, _ = model_and_images(router="threshold", routing="token")
    x = images(model, batch=4)
    name, layer = list(moe_layers(model).items())[0]
    experts, gates = decisions(model, x, name)
    counted: list[int] = []
    layer.experts.register_forward_pre_hook(lambda _experts, args: counted.append(len(args[1])))
    overruled(model, name, [Handed(experts, gates, torch.arange(4).roll(1))], x)
    assert counted[-1] == (experts >= 0).sum() < experts.numel()


def test_a_decision_that_changes_nothing_costs_nothing_and_changes_it_by_exactly_0() -> None:
    model, _ = model_and_images()
    x, labels = images(model, 9), torch.arange(9) % 5
    name = list(moe_layers(model))[0]
    itself = [Handed(*decisions(model, x, name), torch.arange(9))]
    changes = measure_on(model, list(zip(x.split(4), labels.split(4), strict=True)), {name: itself})[name]
    assert not changes.loss.any() and not changes.right.any()


def measure_on(
    model: nn.Module, loader: object, plan: dict[str, list[Intervention]], chosen: Images | None = None
) -> dict[str, Changes]:
    subjects = Subjects(model, loader, list(plan))
    subjects.images = chosen
    return measure(subjects, plan)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_replaces_a_layer_computes_what_it_would_in_its_place(family: str) -> None:
    """Several at once: each part of the output is that of a model with this one FFN there."""
    model, x = model_and_images(family)
    for name, layer in moe_layers(model).items():
        ways = [layer.dense(how, torch.full((4,), 0.1)) for how in layer.densify_methods]
        assert len(ways) == 3
        parts = overruled(model, name, ways, x)
        for how, part in zip(layer.densify_methods, parts, strict=True):
            alone = vimoe.densify(copy.deepcopy(model), [name], how, {name: torch.full((4,), 0.1)})
            torch.testing.assert_close(part, alone(x).detach(), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(parts[0], parts[1])


@pytest.mark.parametrize("routing", ["image", "token"])
def test_a_donor_hands_over_its_whole_decision(routing: str) -> None:
    model, x = model_and_images(routing=routing, top_k=2)
    name = list(moe_layers(model))[1]
    experts, gates = decisions(model, x, name)
    donors = torch.tensor([2, 0, 1])
    same, moved = Handed(experts, gates, torch.arange(3)), Handed(experts, gates, donors)
    kept, changed = overruled(model, name, [same, moved], x)
    torch.testing.assert_close(kept, model(x).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(kept, changed)
    with torch.no_grad(), vimoe.record(model) as routings:
        model(x)
    routing = next(r for r in routings if r.layer == name)
    given = moved(model.get_submodule(name), routing, torch.arange(3))
    torch.testing.assert_close(given.experts.view(3, -1, 2), experts[donors])
    torch.testing.assert_close(given.gates.view(3, -1, 2), gates[donors])
    assert not torch.equal(experts, experts[donors])


@pytest.mark.parametrize("routing", ["image", "token"])
def test_a_donor_is_found_by_the_place_of_its_taker(routing: str) -> None:
    """In a later batch the images have other numbers."""
    model, x = model_and_images(routing=routing)
    name = list(moe_layers(model))[0]
    experts, gates = decisions(model, x, name)
    late = overruled(model, name, [Handed(experts, gates, torch.tensor([0, 0, 1, 2]))], x[:1], torch.tensor([3]))
    torch.testing.assert_close(late, overruled(model, name, [Handed(experts, gates, torch.tensor([2]))], x[:1]))


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("router", ["softmax", "threshold"])  # experts of the third compare with one another
def test_without_an_expert_its_units_go_to_the_next_choice(router: str, routing: str, top_k: int) -> None:
    model, x = model_and_images(routing=routing, top_k=top_k, router=router)
    name, layer = list(moe_layers(model).items())[1]
    for expert in range(4):
        smaller = copy.deepcopy(model)
        layers(smaller)[1].keep_experts([e for e in range(4) if e != expert])
        (found,) = overruled(model, name, [Without(expert)], x)
        torch.testing.assert_close(found, smaller(x).detach(), rtol=1e-4, atol=1e-5)
    assert layer.config.num_experts == 4 and layers(smaller)[1].experts.fc1.weight.shape[0] == 3


def test_frozen_is_one_decision_for_all() -> None:
    model, x = model_and_images(routing="token", top_k=2)
    name = list(moe_layers(model))[0]
    fixed = Frozen(torch.tensor([3, 1]), torch.tensor([0.25, 0.5]))
    with torch.no_grad(), vimoe.record(model) as routings:
        model(x)
    decided = fixed(model.get_submodule(name), routings[0], torch.arange(3))
    assert (decided.experts == torch.tensor([3, 1])).all() and (decided.gates == torch.tensor([0.25, 0.5])).all()
    assert decided.experts.shape == routings[0].experts.shape
    (found,) = overruled(model, name, [fixed], x)
    torch.testing.assert_close(found, naive(model, name, fixed, x, torch.arange(3)), rtol=1e-4, atol=1e-5)


def test_a_decision_sees_the_routing_of_its_own_images() -> None:
    model, x = model_and_images(routing="token")
    seen = []

    def look(_layer: nn.Module, routing: vimoe.Routing, index: Tensor) -> vimoe.Routing:
        seen.append((routing, index))
        return routing

    with torch.no_grad(), vimoe.record(model) as routings:
        model(x)
    overruled(model, "blocks.0.mlp", [look, look], x, torch.tensor([4, 7, 9]))
    assert len(seen) == 2
    for routing, index in seen:
        assert routing.batch == routings[0].batch and index.tolist() == [4, 7, 9]
        assert torch.equal(routing.experts, routings[0].experts) and len(routing.image) == len(routing.logits)
        torch.testing.assert_close(routing.logits, routings[0].logits)


def hooks_of(model: nn.Module) -> list[object]:
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_nothing_outlives_it() -> None:
    """Neither a measurement nor one that ended half-way."""
    model, x = model_and_images()
    name, layer = next(iter(moe_layers(model).items()))
    before, hooks = model(x), hooks_of(model)

    def fails(*_: object) -> vimoe.Routing:
        raise ZeroDivisionError

    batches = [(x, torch.arange(3))]
    measure_on(model, batches, {name: [Without(0), layer.dense("shared", torch.zeros(4))]})
    with pytest.raises(ZeroDivisionError):
        measure_on(model, batches, {name: [fails]})
    assert torch.equal(model(x), before)
    assert hooks_of(model) == hooks and not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("rows", [1, 4, 512])
def test_changes_are_those_of_each_image(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batches and however many images run at a time."""
    monkeypatch.setattr("vimoe.analysis.interventions._ROWS", rows)
    monkeypatch.setattr("vimoe.analysis.interventions._HELD", rows)
    model, _ = model_and_images()
    x, labels = images(model, batch=9), torch.arange(9) % 5
    name, layer = list(moe_layers(model).items())[1]
    dense = layer.dense("shared", torch.zeros(4))
    found = measure_on(model, list(zip(x.split(4), labels.split(4), strict=True)), {name: [dense, Without(1)]})[name]
    other = vimoe.densify(copy.deepcopy(model), [name])
    with torch.no_grad():
        logits = [m(x) for m in (model, other)]
    base, changed = (F.cross_entropy(out, labels, reduction="none") for out in logits)
    assert found.loss.shape == found.right.shape == (9, 2)
    assert found.loss[:, 0] == pytest.approx((changed - base).double().numpy(), abs=1e-5)
    right = [(out.argmax(1) == labels).double() for out in logits]
    assert np.array_equal(found.right[:, 0], (right[1] - right[0]).numpy())


def test_chosen_images_alone_are_measured() -> None:
    model, _ = model_and_images()
    x, labels = images(model, batch=9), torch.arange(9) % 5
    batches = list(zip(x.split(2), labels.split(2), strict=True))
    name, layer = list(moe_layers(model).items())[0]
    plan = {name: [layer.dense("shared", torch.zeros(4))]}
    places = np.array([1, 4, 5, 8])
    chosen = Images(places, labels.numpy()[places])
    every = Subjects(model, batches, list(plan))
    some, all_ = measure_on(model, batches, plan, chosen), measure(every, plan)
    assert some[name].loss == pytest.approx(all_[name].loss[places], abs=1e-6)
    assert np.array_equal(every.images.places, range(9)) and np.array_equal(every.images.labels, labels)
    with pytest.raises(DataError, match="another order each time"):
        measure_on(model, batches, plan, Images(places, labels.numpy()[places][::-1]))
    with pytest.raises(DataError, match="fewer images"):
        measure_on(model, batches[:3], plan, chosen)
    with pytest.raises(DataError, match="the loader is empty"):
        measure_on(model, [], plan)


@pytest.mark.parametrize("limit", [0, 4000, 2**30], ids=["nothing kept", "too much soon", "all kept"])
def test_the_loader_is_read_again_where_there_is_too_much_to_keep(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image takes 5 tokens of 24 channels, 480 bytes; and other images the second time are noticed."""
    monkeypatch.setattr("vimoe.analysis.interventions.KEPT_BYTES", limit)
    model, _ = model_and_images()
    x, labels = images(model, batch=9), torch.arange(9) % 5
    batches = list(zip(x.split(2), labels.split(2), strict=True))
    readings = []
    loader = type("Loader", (), {"__iter__": lambda self: readings.append(1) or iter(batches)})()
    plan = {"blocks.1.mlp": [Without(1)]}
    subjects = Subjects(model, loader, ["blocks.1.mlp"])
    first, again = measure(subjects, plan), measure(subjects, plan)
    assert len(readings) == (1 if limit > 9 * (480 + 8) else 2)
    assert first["blocks.1.mlp"].loss == pytest.approx(again["blocks.1.mlp"].loss, abs=1e-6)
    if len(readings) == 2:
        batches.reverse()
        with pytest.raises(DataError, match="another order each time"):
            measure(subjects, plan)


def test_masks_count_as_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a segmentation they are larger than what the blocks give."""
    model, x = model_and_images()
    for limit, kept in ((3 * (480 + 8 * 32 * 32), True), (3 * 8 * 32 * 32, False)):
        monkeypatch.setattr("vimoe.analysis.interventions.KEPT_BYTES", limit)
        subjects = Subjects(model, [], ["blocks.1.mlp"])
        with torch.no_grad(), subjects.keeping(Entry(x), torch.zeros(3, 32, 32, dtype=torch.long)):
            model(x)
        assert (subjects._kept is not None) == kept


def test_no_more_images_are_kept_than_will_be_measured() -> None:
    model, x = model_and_images()
    for most, kept in ((3, True), (2, False), (None, True)):
        subjects = Subjects(model, [], ["blocks.1.mlp"], most)
        with torch.no_grad(), subjects.keeping(Entry(x), torch.arange(3)):
            model(x)
        assert (subjects._kept is not None) == kept


def test_donors_are_found_by_the_number_of_the_image_in_every_batch() -> None:
    """A restart of the numbers with each batch would give all batches the donors of the first."""
    model, _ = model_and_images()
    x, labels = images(model, batch=6), torch.arange(6) % 5
    name = list(moe_layers(model))[1]
    experts, gates = decisions(model, x, name)
    itself = {name: [Handed(experts, gates, torch.arange(6))]}
    chosen = Images(np.array([1, 3, 4, 5]), labels.numpy()[[1, 3, 4, 5]])
    others = {name: [Handed(experts, gates, torch.tensor([1, 3, 4, 5]))]}
    batches = list(zip(x.split(2), labels.split(2), strict=True))
    for changes in (measure_on(model, batches, itself), measure_on(model, batches, others, chosen)):
        assert changes[name].loss == pytest.approx(0, abs=1e-6)
    shifted = {name: [Handed(experts, gates, torch.arange(6).roll(1))]}
    assert abs(measure_on(model, batches, shifted)[name].loss).max() > 1e-3


@pytest.mark.parametrize("form", ["outputs", "normalized"])
@pytest.mark.parametrize(("router", "routing"), [("softmax", "image"), ("softmax", "token"), ("threshold", "token")])
def test_it_computes_what_a_naive_loop_does_with_orthogonal_outputs(router: str, routing: str, form: str) -> None:
    """One expert alone is orthogonal to none, and of frozen experts the one with the largest gate comes first."""
    model = perturb_experts(upcycle(vit(depth=4), config(
        layers=[1, 3], router=router, routing=routing, top_k=3, experts="lora", orthogonal=form)))  # fmt: skip
    x, index = images(model, batch=5), torch.arange(5)
    assert_as_naive(model, x)
    for name, layer in moe_layers(model).items():
        slots = layer.router.slots
        gates = torch.linspace(0.1, 0.4, slots)
        others = [Only(2), Frozen(torch.arange(slots), gates), Frozen(torch.arange(slots).flip(0), gates.flip(0))]
        found = overruled(model, name, others, x)
        for intervention, ours in zip(others, found, strict=True):
            torch.testing.assert_close(ours, naive(model, name, intervention, x, index), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], found[2], rtol=1e-4, atol=1e-5)


def test_few_images_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many interventions there are: memory is bounded."""
    monkeypatch.setattr("vimoe.analysis.interventions._ROWS", 12)
    monkeypatch.setattr("vimoe.analysis.interventions._HELD", 16)
    model, _ = model_and_images()
    batch = [(images(model, 8), torch.zeros(8, dtype=torch.long))]
    sizes: list[int] = []
    model.head.register_forward_pre_hook(lambda _head, args: sizes.append(len(args[0])))
    measure_on(model, batch, {"blocks.1.mlp": [Without(e) for e in range(4)]})
    assert sizes[-6:] == [4, 12, 4, 4, 12, 4]  # four images untouched, and four times each; then the other four


def test_what_breaks_the_model_does_not_seem_to_cost_nothing() -> None:
    model, x = model_and_images()
    name, layer = next(iter(moe_layers(model).items()))
    broken = layer.dense("shared", torch.zeros(4))
    with torch.no_grad():
        broken = copy.deepcopy(broken)
        broken.fc2.bias[0] = float("nan")
    changes = measure_on(model, [(x, torch.arange(3))], {name: [broken]})
    assert (changes[name].loss > 100_000).all()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(VimoeError, match="expected a model whose outputs are finite"):
        measure_on(model, [(x, torch.arange(3))], {name: [broken]})


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_k": 3}, {"router": "threshold"}], ids=str)
def test_only_one_expert_gets_all_of_the_gates(routing: str, settings: dict) -> None:
    model, x = model_and_images(routing=routing, **settings)
    name, layer = next(iter(moe_layers(model).items()))
    with torch.no_grad(), vimoe.record(model) as routings:
        model(x)
    changed = Only(2)(layer, routings[0], torch.arange(len(x)))
    torch.testing.assert_close(changed.gates.sum(dim=1), routings[0].gates.sum(dim=1))
    assert changed.experts[:, 0].unique().tolist() == [2] and changed.experts.shape == routings[0].experts.shape
    assert (changed.experts[:, 1:] == -1).all() and not changed.gates[:, 1:].any()
    labels = torch.arange(len(x)) % 5
    found = measure(Subjects(model, [(x, labels)], [name]), {name: [Only(e) for e in range(4)]})[name]
    logits = [naive(model, name, Only(e), x, torch.arange(len(x))) for e in range(4)]
    with torch.no_grad():
        base = F.cross_entropy(model(x), labels, reduction="none")
    for e in range(4):
        expected = F.cross_entropy(logits[e], labels, reduction="none") - base
        assert found.loss[:, e] == pytest.approx(expected.numpy(), abs=1e-5)
