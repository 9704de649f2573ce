"""Overruling a layer does to each image what it says, in one forward, and nothing outlives it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, config, images, layers, perturb_experts, upcycle, vit
from torch import Tensor, nn

import vimoe
from vimoe.errors import DataError, VimoeError
from vimoe.interventions import Frozen, Handed, Images, Without, measure, overruled
from vimoe.upcycling import moe_layers


def model_and_images(family: str = "vit", **settings: object) -> tuple[nn.Module, Tensor]:
    model = perturb_experts(upcycle(vit(family), config(**settings)))
    return model, images(model)


def decisions(model: nn.Module, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), vimoe.record(model) as routings:
        model(x)
    (routing,) = [r for r in routings if r.layer == name]
    return tuple(a.view(len(x), -1, a.shape[1]) for a in (routing.experts, routing.gates))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_replaces_a_layer_computes_what_it_would_in_its_place(family: str) -> None:
    """Several at once: each part of the output is that of a model with this one FFN there."""
    model, x = model_and_images(family)
    for name, layer in moe_layers(model).items():
        ways = [layer.dense(how, torch.full((4,), 0.1)) for how in layer.hows]
        assert len(ways) == 3
        with torch.no_grad():
            with overruled(model, name, ways, torch.arange(len(x))):
                parts = model(x).chunk(3)
            for how, part in zip(layer.hows, parts, strict=True):
                alone = vimoe.densify(copy.deepcopy(model), [name], how, {name: torch.full((4,), 0.1)})
                torch.testing.assert_close(part, alone(x), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(parts[0], parts[1])


@pytest.mark.parametrize("routing", ["image", "token"])
def test_a_donor_hands_over_its_whole_decision(routing: str) -> None:
    model, x = model_and_images(routing=routing, top_k=2)
    name = list(moe_layers(model))[1]
    experts, gates = decisions(model, x, name)
    donors = torch.tensor([2, 0, 1])
    same, moved = Handed(experts, gates, torch.arange(3)), Handed(experts, gates, donors)
    with torch.no_grad(), overruled(model, name, [same, moved], torch.arange(3)), vimoe.record(model) as routings:
        kept, changed = model(x).chunk(2)
    torch.testing.assert_close(kept, model(x).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(kept, changed)
    seen = next(r for r in routings if r.layer == name)
    for row in (seen.experts, seen.gates):
        assert row.shape[0] == 2 * experts.shape[0] * experts.shape[1]
    torch.testing.assert_close(seen.experts.view(2, 3, -1, 2)[1], experts[donors])
    torch.testing.assert_close(seen.gates.view(2, 3, -1, 2)[1], gates[donors])
    assert not torch.equal(experts, experts[donors])
    with pytest.raises(AssertionError):  # the check can fail: these are not the decisions of the images themselves
        torch.testing.assert_close(seen.experts.view(2, 3, -1, 2)[1], experts)


@pytest.mark.parametrize("routing", ["image", "token"])
def test_a_donor_is_found_by_the_place_of_its_taker(routing: str) -> None:
    """In a later batch the images have other numbers."""
    model, x = model_and_images(routing=routing)
    name = list(moe_layers(model))[0]
    experts, gates = decisions(model, x, name)
    with (
        torch.no_grad(),
        overruled(model, name, [Handed(experts, gates, torch.tensor([0, 0, 1, 2]))], torch.tensor([3])),
    ):
        late = model(x[:1])
    with torch.no_grad(), overruled(model, name, [Handed(experts, gates, torch.tensor([2]))], torch.tensor([0])):
        torch.testing.assert_close(late, model(x[:1]))


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_without_an_expert_its_units_go_to_the_next_choice(routing: str, top_k: int) -> None:
    model, x = model_and_images(routing=routing, top_k=top_k)
    name, layer = list(moe_layers(model).items())[1]
    for expert in range(4):
        smaller = copy.deepcopy(model)
        layers(smaller)[1].keep_experts([e for e in range(4) if e != expert])
        with torch.no_grad(), overruled(model, name, [Without(expert)], torch.arange(3)):
            torch.testing.assert_close(model(x), smaller(x), rtol=1e-4, atol=1e-5)
    assert layer.config.num_experts == 4 and layers(smaller)[1].experts.fc1.weight.shape[0] == 3


def test_frozen_is_one_decision_for_all() -> None:
    model, x = model_and_images(routing="token", top_k=2)
    name = list(moe_layers(model))[0]
    fixed = Frozen(torch.tensor([3, 1]), torch.tensor([0.25, 0.5]))
    with torch.no_grad(), overruled(model, name, [fixed], torch.arange(3)), vimoe.record(model) as routings:
        model(x)
    assert (routings[0].experts == torch.tensor([3, 1])).all()
    assert (routings[0].gates == torch.tensor([0.25, 0.5])).all()
    assert not (routings[1].experts == torch.tensor([3, 1])).all()


def test_a_decision_sees_the_routing_of_its_own_images() -> None:
    model, x = model_and_images(routing="token")
    seen = []

    def look(_layer: nn.Module, routing: vimoe.Routing, index: Tensor) -> vimoe.Routing:
        seen.append((routing, index))
        return routing

    with torch.no_grad(), vimoe.record(model) as routings:
        model(x)
        with overruled(model, "blocks.0.mlp", [look, look], torch.tensor([4, 7, 9])):
            model(x)
    for routing, index in seen:
        assert routing.batch == routings[0].batch and index.tolist() == [4, 7, 9]
        assert torch.equal(routing.experts, routings[0].experts) and len(routing.image) == len(routing.logits)
        torch.testing.assert_close(routing.logits, routings[0].logits)


def test_nothing_outlives_it() -> None:
    model, x = model_and_images()
    name, layer = next(iter(moe_layers(model).items()))
    before = model(x)
    with pytest.raises(ZeroDivisionError), overruled(model, name, [Without(0)], torch.arange(3)):
        raise ZeroDivisionError
    assert torch.equal(model(x), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert layer.router(torch.randn(2, 5, 24)).logits.isfinite().all()


@pytest.mark.parametrize("rows", [1, 4, 512])
def test_changes_are_those_of_each_image(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batches and however many images run at a time."""
    monkeypatch.setattr("vimoe.interventions._ROWS", rows)
    model, _ = model_and_images()
    x, labels = images(model, batch=9), torch.arange(9) % 5
    name, layer = list(moe_layers(model).items())[1]
    dense = layer.dense("shared", torch.zeros(4))
    found = measure(model, list(zip(x.split(4), labels.split(4), strict=True)), {name: [dense, Without(1)]})[0][name]
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
    some, same = measure(model, batches, plan, Images(places, labels.numpy()[places]))
    every, seen = measure(model, batches, plan)
    assert some[name].loss == pytest.approx(every[name].loss[places], abs=1e-6)
    assert same.places is places and np.array_equal(seen.places, range(9)) and np.array_equal(seen.labels, labels)
    with pytest.raises(DataError, match="another order each time"):
        measure(model, batches, plan, Images(places, labels.numpy()[places][::-1]))
    with pytest.raises(DataError, match="fewer images"):
        measure(model, batches[:3], plan, Images(places, labels.numpy()[places]))
    with pytest.raises(DataError, match="the loader is empty"):
        measure(model, [], plan)


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
    for changes, _ in (measure(model, batches, itself), measure(model, batches, others, chosen)):
        assert changes[name].loss == pytest.approx(0, abs=1e-6)
    shifted = {name: [Handed(experts, gates, torch.arange(6).roll(1))]}
    assert abs(measure(model, batches, shifted)[0][name].loss).max() > 1e-3


def test_few_images_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many interventions there are: memory is bounded."""
    monkeypatch.setattr("vimoe.interventions._ROWS", 12)
    model, _ = model_and_images()
    sizes: list[int] = []
    layers(model)[1].register_forward_pre_hook(lambda _layer, args: sizes.append(len(args[0])))
    batch = [(images(model, 8), torch.zeros(8, dtype=torch.long))]
    measure(model, batch, {"blocks.1.mlp": [Without(e) for e in range(4)]})
    assert sizes == [8, 12, 12, 8]  # the untouched model; then 3, 3 and 2 images, four times each


def test_what_breaks_the_model_does_not_seem_to_cost_nothing() -> None:
    model, x = model_and_images()
    name, layer = next(iter(moe_layers(model).items()))
    broken = layer.dense("shared", torch.zeros(4))
    with torch.no_grad():
        broken = copy.deepcopy(broken)
        broken.fc2.bias[0] = float("nan")
    changes, _ = measure(model, [(x, torch.arange(3))], {name: [broken]})
    assert (changes[name].loss > 100_000).all()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(VimoeError, match="expected a model whose outputs are finite"):
        measure(model, [(x, torch.arange(3))], {name: [broken]})
