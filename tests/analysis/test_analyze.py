"""On layers whose routing is known, the evidence is what it must be."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import shared_analysis
from helpers.kinds import UNITS
from helpers.known import CLASSES, Known, loader
from helpers.numbers import assert_alike
from helpers.processes import run
from helpers.pruned import changes
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from torch import Tensor, nn

import vimoe
from vimoe.analysis import analyze as analysis
from vimoe.analysis import block_order, decisions
from vimoe.analysis.changes import Changes
from vimoe.analysis.evidence import Evidence
from vimoe.analysis.interventions import Handed, Subjects
from vimoe.errors import ConfigError, DataError, VimoeError
from vimoe.metrics.classification import ClassificationMetric
from vimoe.metrics.registry import METRICS
from vimoe.models.reading import ignoring_hooks
from vimoe.moe.layer import moe_layers


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("by_class", [True, False], ids=["sorted by class", "shuffled"])
def test_cause_is_told_from_specialisation(routing: str, by_class: bool) -> None:
    """Sorted by class too, where a permutation within batches would exchange like with like."""
    votes, silent = vimoe.analyze(Known(routing=routing), loader(by_class=by_class)).layers
    for layer in (votes, silent):
        assert layer.adjusted_mutual_information.value == pytest.approx(1)
        assert layer.adjusted_mutual_information.p < 0.01
        assert np.array_equal(layer.heatmap, np.eye(CLASSES))
    for effect in (votes.permuted, votes.frozen, votes.dense["shared"]):
        assert effect.loss.low > 1 and effect.right.high < -0.3
    for effect in (silent.permuted, silent.frozen, *silent.dense.values(), *silent.experts):
        assert effect.loss.high == pytest.approx(0, abs=1e-6) and effect.right.value == 0


@pytest.mark.parametrize(("router", "routing"), UNITS)
def test_figures_of_routers_that_leave_slots_empty_are_counted_by_hand(router: str, routing: str) -> None:
    model = perturb_experts(upcycle(vit(global_pool="avg"), config(router=router, routing=routing)))
    with torch.no_grad():
        for layer in layers(model):  # one expert that nobody gets, and one score that differs
            layer.router.weight[1] = 0
    x, labels = images(model, 24), torch.arange(24) % 5
    evidence = vimoe.analyze(model, list(zip(x.split(7), labels.split(7), strict=True)), draws=2)
    with torch.no_grad(), vimoe.record(model) as routings:
        model(x)
    activated, routes = torch.zeros(24), [[""] * 24 * 5 for _ in routings]
    for found, routing_, route in zip(evidence.layers, routings, routes, strict=True):
        counts, mass, chosen_by = torch.zeros(5, 4), torch.zeros(4), torch.zeros(24, 4)
        for row, (experts, gates) in enumerate(zip(routing_.experts.tolist(), routing_.gates.tolist(), strict=True)):
            image = row if routing == "image" else row // 5
            for expert, gate in zip(experts, gates, strict=True):
                if expert >= 0:
                    counts[labels[image], expert] += 1
                    mass[expert] += gate
                    chosen_by[image, expert] += gate
            route[row] = str(sorted(e for e in experts if e >= 0))
        assert np.array_equal(found.counts, counts.numpy())
        assert found.load == pytest.approx((counts.sum(dim=0) / max(counts.sum(), 1)).numpy())
        assert found.gate_mass == pytest.approx((mass / len(routing_.experts)).numpy())
        assert found.top_k == 4 and len(found.experts) == 4
        for expert, examples in enumerate(found.examples):
            best = chosen_by[:, expert].argsort(descending=True)[0]
            assert not examples or chosen_by[examples[0], expert] == chosen_by[best, expert]
            assert bool(examples) == bool(chosen_by[:, expert].any())
        activated += (chosen_by > 0).sum(dim=1)
    assert evidence.pairs[0].value == pytest.approx(float(activated.mean()))
    assert evidence.routes[0] == len(set(zip(*routes, strict=True)) - {("", "")}) and evidence.routes[2] == 16**2
    assert Evidence.from_dict(json.loads(json.dumps(evidence.to_dict()))).to_dict() == evidence.to_dict()


@pytest.mark.parametrize("routing", ["image", "token"])
def test_layers_that_give_nobody_an_expert_are_analysed_and_pruned(routing: str) -> None:
    model = upcycle(vit(), config(router="threshold", routing=routing))
    for layer in layers(model):
        layer.router.weight.data.zero_()  # sigmoid(0) is not above a half
    batches = [(images(model, 10), torch.arange(10) % 5)]
    evidence = vimoe.analyze(model, batches, draws=2)
    for found in evidence.layers:
        assert not found.counts.any() and not found.load.any() and not found.gate_mass.any()
        assert found.adjusted_mutual_information.value == 0
        assert found.permuted.loss.value == 0 and found.experts[2].loss.value == 0
    assert evidence.pairs[0].value == 0 and evidence.routes[:2] == (1, 1.0)
    assert len(vimoe.prune(model, evidence, batches, tolerance=0.01, experts=True).steps) == 2


def test_the_known_layer_has_the_figures_that_follow() -> None:
    evidence = vimoe.analyze(Known(), loader())
    votes = evidence.layers[0]
    labels = torch.cat([y for _, y in loader()])
    shares = torch.bincount(labels) / len(labels)
    entropy = float(-(shares * shares.log()).sum())
    assert votes.load == pytest.approx(shares.numpy())
    assert votes.adjusted_mutual_information.nats == pytest.approx(entropy)
    assert votes.effective_experts.value == pytest.approx(np.exp(entropy))
    assert votes.gate_mass.sum() == pytest.approx(1, abs=1e-3)  # the gates are all but 1
    assert evidence.base.top1 == 1 and evidence.base.images == evidence.images == evidence.overruled_images == 60
    # without votes the loss is that of a guess
    assert votes.dense["shared"].loss.value + evidence.base.loss == pytest.approx(np.log(CLASSES))
    # without its expert a class goes elsewhere; the others do not notice
    wrong = [effect.right.value for effect in votes.experts]
    assert wrong == pytest.approx((-shares).tolist())
    # each class sends its images the same way through both layers
    assert evidence.agreement["value"] == pytest.approx(np.ones((2, 2)))
    assert evidence.routes == (CLASSES, pytest.approx(np.exp(entropy)), CLASSES**2)
    assert evidence.pairs[0].value == evidence.pairs[1] == evidence.pairs[2] == 2
    for expert, places in enumerate(votes.examples):
        assert len(places) == 8 and all(labels[place] == expert for place in places)


def test_the_picture_is_drawn_on_images_that_did_not_make_its_order() -> None:
    evidence = vimoe.analyze(Known(), loader())
    for layer in evidence.layers:
        made = layer.counts - layer.drawn
        assert (made >= layer.drawn).all() and (layer.drawn.sum(axis=1) >= made.sum(axis=1) - 1).all()
        ordered = layer.drawn[evidence.class_order][:, layer.expert_order]
        assert np.array_equal(ordered > 0, np.eye(CLASSES, dtype=bool))


def test_routing_that_ignores_the_class_looks_so() -> None:
    model = Known()
    with torch.no_grad():
        for layer in layers(model):
            layer.router.weight.zero_()
            layer.router.weight[1] = 1
    for layer in vimoe.analyze(model, loader()).layers:
        assert layer.load.tolist() == [0, 1, 0, 0]
        assert layer.adjusted_mutual_information.value == pytest.approx(0, abs=1e-12)
        assert layer.permuted.loss.high == pytest.approx(0, abs=1e-6)


def test_without_a_shared_expert_merging_is_measured() -> None:
    votes, silent = vimoe.analyze(Known(num_shared_experts=0, combine="sum"), loader()).layers
    assert set(votes.dense) == {"merge", "matched"} and votes.dense["merge"].loss.low > 1
    assert silent.dense["merge"].loss.high == pytest.approx(0, abs=1e-6)


def test_two_shared_experts_cannot_be_merged() -> None:
    assert set(vimoe.analyze(Known(num_shared_experts=2), loader()).layers[0].dense) == {"shared"}


def test_where_all_experts_are_chosen_none_can_be_left_out() -> None:
    evidence = vimoe.analyze(Known(top_k=CLASSES), loader())
    assert evidence.layers[0].experts == () and evidence.routes == (1, 1, 1)


def test_experts_that_agree_in_function_but_not_in_weights_merge_when_matched() -> None:
    """Their hidden units are permuted: which expert an image gets does not matter, their plain mean weights do."""
    torch.manual_seed(0)  # of the routers
    model = perturb_experts(upcycle(vit(), config(num_shared_experts=0, top_k=2)))
    with torch.no_grad():
        for layer in layers(model):
            experts = layer.experts
            for e in range(1, 4):
                order = torch.randperm(experts.fc1.weight.shape[1], generator=torch.Generator().manual_seed(e))
                experts.fc1.weight[e], experts.fc1.bias[e] = experts.fc1.weight[0][order], experts.fc1.bias[0][order]
                experts.fc2.weight[e], experts.fc2.bias[e] = experts.fc2.weight[0][:, order], experts.fc2.bias[0]
    x, labels = images(model, batch=12), torch.arange(12) % 5
    for found in vimoe.analyze(model, [(x, labels)]).layers:
        assert found.permuted.loss.value == pytest.approx(0, abs=1e-5)
        assert abs(found.dense["merge"].loss.value) > 1e-3
        assert found.best_dense[1].loss.value == min(effect.loss.value for effect in found.dense.values())
        assert found.dense["matched"].loss.value == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("routing", ["image", "token"])
def test_what_is_kept_is_what_the_model_did(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer kept than there are, each row is of the image whose place it names."""
    model = perturb_experts(upcycle(vit(), config(routing=routing, top_k=2)))
    x, labels = images(model, 40), torch.arange(40) % 5
    units = 1  # the class token, or the image
    monkeypatch.setattr(decisions, "KEPT_IMAGES", 15)
    monkeypatch.setattr(decisions, "_COMPARED", 4)
    inputs: list[Tensor] = []
    batches = list(zip(x.split(7), labels.split(7), strict=True))
    _, seen = decisions.observe(model, Subjects(model, batches, list(moe_layers(model))), moe_layers(model), 0, "")
    handle = layers(model)[1].register_forward_pre_hook(lambda _layer, args: inputs.append(args[0]))
    with torch.no_grad(), vimoe.record(model) as routings, ignoring_hooks():
        model(x)
    handle.remove()
    routing_ = routings[1]
    name = routing_.layer
    assert len(seen.places) == 15 and seen.places[-1] > 20 and seen.experts[name].shape == (15, units, 2)
    assert np.array_equal(seen.labels, labels.numpy()[seen.places])
    experts, gates = (a.view(40, units, 2).numpy()[seen.places] for a in (routing_.experts, routing_.gates))
    assert np.array_equal(seen.experts[name], experts) and seen.gates[name] == pytest.approx(gates, abs=1e-6)
    # each compared input is that of some image, and they are of different ones
    distances = torch.cdist(seen.inputs[name].flatten(1), inputs[0].flatten(1))
    assert distances.min(dim=1).values.max() < 0.1 and len(set(distances.argmin(dim=1).tolist())) == 4
    by_hand = np.zeros((15, 4))
    for i, u, k in np.ndindex(15, units, 2):
        by_hand[i, experts[i, u, k]] += gates[i, u, k]
    assert seen.per_image(name, seen.gates[name]) == pytest.approx(by_hand, abs=1e-6)
    assert seen.per_image(name).sum() == 15 * units * 2
    best = seen.examples(by_hand)
    for row, place, gates in zip(best, seen.places[by_hand.argmax(axis=0)], by_hand.T, strict=True):
        assert [*row[:1]] == ([place] if gates.any() else [])


def test_examples_are_of_images_that_went_there() -> None:
    model = Known(num_experts=6)  # of whom two are never chosen
    assert [len(row) for row in vimoe.analyze(model, loader()).layers[0].examples] == [8, 8, 8, 8, 0, 0]


def test_gates_are_weighed_by_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over units: with k = 2 the masses sum to the mean sum of the two gates, and the merge goes by them."""
    model = perturb_experts(upcycle(vit(), config(top_k=2, num_shared_experts=0, routing="token")))
    x, labels = images(model, 12), torch.arange(12) % 5
    handed = {}

    def dense(self: vimoe.MoE, how: str, mass: Tensor) -> nn.Module:
        handed[self] = mass
        return nn.Identity()

    monkeypatch.setattr(vimoe.MoE, "dense", dense)
    found = vimoe.analyze(model, [(x, labels)], draws=1)
    for layer, evidence in zip(layers(model), found.layers, strict=True):
        assert evidence.gate_mass.sum() == pytest.approx(1)
        assert handed[layer].numpy() == pytest.approx(evidence.gate_mass)
        assert evidence.gate_mass.std() > 0.01


def test_orders_come_from_the_half_that_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    handed = []
    real = block_order.orders
    monkeypatch.setattr(block_order, "orders", lambda tables: handed.extend(tables) or real(tables))
    evidence = vimoe.analyze(Known(), loader(), overrule=0)
    for table, layer in zip(handed, evidence.layers, strict=True):
        assert np.array_equal(table + layer.drawn, layer.counts) and not np.array_equal(table, layer.drawn)


def test_every_draw_is_another_permutation_of_the_measured_images(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {}

    def look(subjects: Subjects, plan: dict, _task: str) -> dict[str, Changes]:
        plans.update(plan, chosen=subjects.images)
        columns = {name: np.arange(len(each)) * np.ones((20, 1)) for name, each in plan.items()}
        return {name: changes(values, -values) for name, values in columns.items()}

    monkeypatch.setattr(analysis, "measure", look)
    found = vimoe.analyze(Known(), loader(by_class=True), draws=4, overrule=20)
    places = plans["chosen"].places
    assert len(places) == 20 and (np.diff(places) > 0).all() and places[-1] > 40  # of all, not the first
    handed = [each for each in plans["blocks.1.mlp"] if isinstance(each, Handed)]
    donors = [each.donors.tolist() for each in handed]
    assert all(sorted(d) == sorted(places) for d in donors) and len({tuple(d) for d in donors}) == 4
    layer = found.layers[0]
    assert layer.permuted.loss.value == 1.5 and layer.permuted.right.value == -1.5  # the mean of columns 0 to 3
    assert layer.frozen.loss.value == 4 and layer.draws == found.draws == 4
    assert [effect.loss.value for effect in layer.experts] == [5, 6, 7, 8]
    assert [effect.loss.value for effect in layer.dense.values()] == [9, 10, 11]
    assert list(layer.dense) == ["shared", "merge", "matched"]


@pytest.mark.parametrize(
    ("noise", "expected"), [(0.0, range(4, 9)), (1.0, range(16, 21))], ids=["of images alone", "of pairs alone"]
)
def test_more_draws_are_made_where_they_narrow_the_interval(
    noise: float, expected: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a whole block follows; after the last one a draw costs next to nothing, and all are made."""
    rng, plans = np.random.default_rng(0), []

    def scripted(_subjects: Subjects, plan: dict, _task: str) -> dict[str, Changes]:
        plans.append({name: sum(isinstance(each, Handed) for each in group) for name, group in plan.items()})
        made = {}
        for name, group in plan.items():
            of_images = np.random.default_rng(1).normal(size=(60, 1)) * (1 - noise)
            loss = of_images + noise * rng.normal(size=(60, len(group)))
            made[name] = changes(loss, np.sign(loss))
        return made

    monkeypatch.setattr(analysis, "measure", scripted)
    evidence = vimoe.analyze(Known(), loader())
    first, last = evidence.layers
    assert plans[0] == {"blocks.0.mlp": 4, "blocks.1.mlp": 20} and evidence.draws == 20
    assert plans[1:] == ([{"blocks.0.mlp": first.draws - 4}] if first.draws > 4 else [])
    assert first.draws in expected and last.draws == 20


def test_draws_in_two_lots_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it after a look at the first or not, the first so many permutations of the seed are taken."""
    model = perturb_experts(upcycle(vit("siglip, attention pool", depth=3), config()))
    batches = [(images(model, 12), torch.arange(12) % 5)]
    monkeypatch.setattr(analysis, "enough_draws", lambda *_: 7)  # else it depends on the weights
    by_four = vimoe.analyze(model, batches, draws=7)
    monkeypatch.setattr(analysis, "FIRST_DRAWS", 7)
    at_once = vimoe.analyze(model, batches, draws=7)
    for two, one in zip(by_four.layers, at_once.layers, strict=True):
        assert one.draws == two.draws == 7
        assert two.permuted.loss.value == pytest.approx(one.permuted.loss.value, abs=1e-6)
        assert two.frozen.loss.value == pytest.approx(one.frozen.loss.value, abs=1e-6)


def test_frozen_is_the_most_frequent_decision() -> None:
    """Most images are of class 2: frozen to its expert they stay right, and all others become wrong."""
    x = torch.eye(CLASSES, 2 * CLASSES)[torch.tensor([0, 2, 2, 1, 2, 3])][:, None].expand(-1, 3, -1)
    found = vimoe.analyze(Known(), [(x, torch.tensor([0, 2, 2, 1, 2, 3]))]).layers[0]
    assert found.frozen.right.value == -0.5


def test_recorded_routings_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    real = decisions.Decisions.add

    def add(self: object, places: range, labels: np.ndarray, routings: list, signatures: np.ndarray) -> None:
        held.append(len(routings))
        real(self, places, labels, routings, signatures)

    monkeypatch.setattr(decisions.Decisions, "add", add)
    vimoe.analyze(Known(), loader(), overrule=0)
    assert held == [2] * 6


class SomeClasses(ClassificationMetric):
    """Images of classes from `first` on have none."""

    first = 3

    def classes_of(self, labels: Tensor) -> Tensor:
        return labels.where(labels < self.first, -1)


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("videos", [False, True])
def test_images_without_a_class_play_no_part_in_specialisation(
    routing: str, videos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "some", SomeClasses)
    labels = torch.cat([y for _, y in loader()])
    sequences = (torch.arange(60) // 6).tolist() if videos else None
    evidence = vimoe.analyze(Known(routing=routing), loader(), 2, metric="some", sequences=sequences)
    assert evidence.images == evidence.overruled_images == 60  # loss and right are of all
    for layer in evidence.layers:
        assert layer.counts.any(axis=1).tolist() == [True, True, True, False]
        assert layer.counts.sum() == int((labels < 3).sum()) * (3 if routing == "token" else 1)
        assert layer.adjusted_mutual_information.value == pytest.approx(1)
        assert layer.effective_experts.value <= 3 + 1e-9
    monkeypatch.setattr(SomeClasses, "first", 0)
    ami = vimoe.analyze(Known(), loader(), overrule=0, metric="some").layers[0].adjusted_mutual_information
    assert (ami.value, ami.low, ami.high, ami.p) == (0, 0, 0, 1)


class OddClasses(ClassificationMetric):
    """Classes by a function of the labels that a test gives."""

    of = staticmethod(lambda labels: labels)

    def classes_of(self, labels: Tensor) -> Tensor:
        return self.of(labels)


@pytest.mark.parametrize(
    ("by_patch", "of", "message"),
    [
        (False, lambda labels: labels + 1, "the class 4: expected 0 to 3, or -1 for none"),
        (False, lambda labels: labels - 2, "the class -2: expected 0 to 3, or -1 for none"),
        (False, lambda labels: labels[1:], r"classes of shape \(9,\): expected \(10,\), \(images,\)"),
        (True, lambda labels: labels, r"classes of shape \(10,\): expected \(10, 3\), \(images, patches\)"),
        (True, lambda labels: labels[:, None].expand(-1, 2), r"classes of shape \(10, 2\): expected \(10, 3\)"),
        (True, lambda labels: labels[:, None].expand(-1, 1), r"classes of shape \(10, 1\): expected \(10, 3\)"),
        (True, lambda labels: labels[:, None].expand(-1, 3) + 100, "the class 10[0-3]: expected 0 to 3"),
    ],
)
@pytest.mark.parametrize("routing", ["image", "token"])
def test_classes_of_another_shape_or_range_are_refused(
    routing: str, by_patch: bool, of: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "odd", OddClasses)
    monkeypatch.setattr(OddClasses, "by_patch", by_patch)
    monkeypatch.setattr(OddClasses, "of", staticmethod(of))
    with pytest.raises(DataError, match=message) as error:
        vimoe.analyze(Known(routing=routing), loader(), 1, overrule=0, metric="odd")
    assert "\n" not in str(error.value)


def test_evidence_travels_as_json() -> None:
    for overrule in (0, 30):
        evidence = vimoe.analyze(Known(), loader(), overrule=overrule)
        text = json.dumps(evidence.to_dict(), allow_nan=False)
        again = Evidence.from_dict(json.loads(text))
        assert json.dumps(again.to_dict()) == text and str(again) == str(evidence)
        assert again.base == evidence.base and again.layers[1].permuted == evidence.layers[1].permuted


def test_it_draws_as_the_seed_says() -> None:
    model = perturb_experts(upcycle(vit(), config()))
    batches = [(images(model, 12), torch.arange(12) % 5)]
    one, same, other = (vimoe.analyze(model, batches, draws=2, seed=s) for s in (0, 0, 1))
    assert json.dumps(one.to_dict()) == json.dumps(same.to_dict())
    assert one.layers[0].permuted != other.layers[0].permuted
    assert one.layers[0].dense["shared"].loss.value == other.layers[0].dense["shared"].loss.value


def test_interventions_can_be_left_out_or_done_on_some() -> None:
    without = vimoe.analyze(Known(), loader(), overrule=0)
    assert without.overruled_images == 0 and without.layers[0].permuted is None and without.layers[0].dense == {}
    some = vimoe.analyze(Known(), loader(), overrule=20)
    assert some.overruled_images == 20 and some.images == 60 and some.layers[0].permuted.loss.low > 0.5
    assert vimoe.analyze(Known(), loader(), overrule=None).overruled_images == 60


def test_of_more_images_than_are_kept_a_uniform_sample_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "KEPT_IMAGES", 50)
    kept = np.zeros(200)
    for seed in range(200):
        seen = decisions.Decisions({}, seed)
        for start in range(0, 200, 40):
            routing = SimpleNamespace(layer="a", experts=torch.zeros(40, 1), gates=torch.zeros(40, 1), batch=(40, 3))
            seen.add(range(start, start + 40), np.arange(start, start + 40), [routing], np.arange(start, start + 40))
        seen.close()
        assert len(set(seen.places)) == 50 and (np.diff(seen.places) > 0).all()
        assert np.array_equal(seen.labels, seen.places)
        kept[seen.places] += 1 / 200
    assert abs(kept[:50].mean() - 0.25) < 0.03 and abs(kept[150:].mean() - 0.25) < 0.03 and kept.max() < 0.45
    evidence = vimoe.analyze(Known(), loader(images=200, by_class=True))
    assert evidence.base.images == 200 and evidence.images == evidence.overruled_images == 50
    assert evidence.layers[0].counts.sum() == 50 and (evidence.layers[0].counts.diagonal() > 0).all()
    assert evidence.layers[0].dense["shared"].loss.low > 1


def test_tokens_that_are_kept_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "KEPT_UNITS", 60)
    assert vimoe.analyze(Known(routing="token"), loader()).images == 20
    assert vimoe.analyze(Known(), loader()).images == 60


MEMORY = """
import resource, torch
from helpers.known import Known, loader
from vimoe.analysis import analyze as analysis
from vimoe.analysis import decisions
decisions.KEPT_IMAGES = 500
batch = loader(batch=500, images=500, tokens=20)[0]
analysis.analyze(Known(), [batch], overrule=100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
analysis.analyze(Known(), [batch] * {batches}, overrule=100)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow  # 12 s
def test_memory_does_not_grow_with_the_images() -> None:
    """Of 100,000 images 500 are kept: as much as of the first 500, to a few MB."""
    grown = subprocess.run(
        [sys.executable, "-c", MEMORY.format(batches=200)], capture_output=True, text=True, check=True, cwd="tests"
    )
    assert int(grown.stdout) < 20_000


def test_a_loader_that_shuffles_is_refused_where_it_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vimoe.analysis.interventions.KEPT_BYTES", 0)
    batches = loader()

    def shuffled() -> list:
        batches.reverse()
        return batches

    changing = type("Changing", (), {"__iter__": lambda self: iter(shuffled())})()
    with pytest.raises(DataError, match="another order each time"):
        vimoe.analyze(Known(), changing)


def test_what_can_be_read_once_is_analysed_as_long_as_it_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    once, again = vimoe.analyze(Known(), iter(loader())), vimoe.analyze(Known(), loader())
    assert json.dumps(once.to_dict()) == json.dumps(again.to_dict())
    monkeypatch.setattr("vimoe.analysis.interventions.KEPT_BYTES", 0)
    with pytest.raises(DataError, match="fewer images when it was read again"):
        vimoe.analyze(Known(), iter(loader()))


@pytest.mark.parametrize("overrule", [20, None])
def test_it_does_not_matter_whether_what_comes_before_is_kept(
    overrule: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = perturb_experts(upcycle(vit(depth=3), config(layers="last:2", top_k=2)))
    batches = list(zip(images(model, 30).split(7), (torch.arange(30) % 5).split(7), strict=True))
    kept = vimoe.analyze(model, batches, overrule=overrule)
    monkeypatch.setattr("vimoe.analysis.interventions.KEPT_BYTES", 0)
    read = vimoe.analyze(model, batches, overrule=overrule)
    for one, other in zip(kept.layers, read.layers, strict=True):
        for effects in zip((one.permuted, *one.experts), (other.permuted, *other.experts), strict=True):
            assert effects[0].loss.value == pytest.approx(effects[1].loss.value, abs=1e-5)


def test_what_cannot_be_analysed_is_refused() -> None:
    broken = Known()
    with torch.no_grad():
        broken.blocks[0].mlp.shared.fc2.bias[-1] = float("nan")
    with pytest.raises(VimoeError, match="loss on validation is nan"):
        vimoe.analyze(broken, loader())
    with pytest.raises(VimoeError, match="no MoE layer"):
        vimoe.analyze(vit(), loader())
    with pytest.raises(DataError, match="the loader is empty"):
        vimoe.analyze(Known(), [])
    for odd in (-100, CLASSES):
        with pytest.raises(DataError, match=f"gives the label {odd}: expected 0 to 3, the model has 4 classes"):
            vimoe.analyze(Known(), [(x, y.index_fill(0, torch.tensor([1]), odd)) for x, y in loader()])
    with pytest.raises(ConfigError, match="seed=-1: expected a whole number from 0"):
        vimoe.analyze(Known(), loader(), seed=-1)
    with pytest.raises(ConfigError, match="draws=0: expected at least 1"):
        vimoe.analyze(Known(), loader(), draws=0)
    for few in (-1, 1):
        with pytest.raises(ConfigError, match=f"overrule={few}: expected 0 for none, at least 2"):
            vimoe.analyze(Known(), loader(), overrule=few)


def test_experts_are_compared_with_the_dense_model_that_is_given() -> None:
    dense = vit()
    model = perturb_experts(upcycle(copy.deepcopy(dense), config(layers="last:1")))
    data = [(images(dense, 4), torch.tensor([0, 1] * 2))]
    found, known = (vimoe.analyze(model, data, overrule=0, parent=each).layers[0] for each in (dense, None))
    assert found.comparison["parent"]["what"] == "given" and known.comparison["parent"]["what"] == "shared"
    assert found.comparison["parent"] == {**known.comparison["parent"], "what": "given"}  # S has not been trained
    with torch.no_grad():
        for p in model.blocks[1].mlp.shared.parameters():
            p.zero_()
    again = vimoe.analyze(model, data, overrule=0, parent=dense).layers[0].comparison["parent"]
    assert again == found.comparison["parent"]


@pytest.mark.parametrize("wrong", [{"embed_dim": 48}, {"depth": 1}])
def test_a_parent_without_the_layers_ffns_is_refused(wrong: dict[str, int]) -> None:
    model = upcycle(vit(), config(layers="last:1"))
    data = [(images(model, 4), torch.tensor([0, 1] * 2))]
    with pytest.raises(ConfigError, match="no FFN of 24 channels at blocks.1.mlp: expected the dense model"):
        vimoe.analyze(model, data, overrule=0, parent=vit(**wrong))
    with pytest.raises(ConfigError, match="no FFN of 24 channels at blocks.1.mlp: expected the dense model"):
        vimoe.analyze(model, data, overrule=0, parent=copy.deepcopy(model))


@pytest.fixture(scope="module")
def of_one() -> dict[str, dict]:
    return shared_analysis.everything()


@pytest.mark.slow  # 17 s; stories/test_several_processes.py sees always what the verb writes
@pytest.mark.parametrize("count", [2, 3])
def test_processes_that_share_the_images_find_what_one_finds(count: int, of_one: dict[str, dict]) -> None:
    """All figures, of samples too: the same images are drawn, whoever has them, and all get all."""
    for found in run(shared_analysis.everything, count, timeout=300):
        assert_alike(of_one, found)


def test_a_loader_that_is_not_shared_or_too_short_is_told() -> None:
    for rank, said in enumerate(run(shared_analysis.mistakes, 2, timeout=120)):
        whole, few, sizes = said
        assert whole.startswith("a loader of 2 processes without places: expected its batch_sampler to be what"), rank
        assert few.startswith("fewer images than processes, 2: expected validation images")
        assert sizes == "the loader gives images of (3, 32, 32) and (3, 64, 64): expected one size"
