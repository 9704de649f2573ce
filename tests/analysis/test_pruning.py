"""Pruning removes what the evidence does not support, and the receipt says what that cost and saved."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import helpers.kinds  # noqa: F401  the experts "scaled"
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.known import CLASSES, Known, loader
from helpers.pruned import changes, effect, evidence
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from torch import nn

import vimoe
from vimoe.analysis.changes import Changes
from vimoe.analysis.evidence import Effect
from vimoe.analysis.interventions import Subjects
from vimoe.analysis.pruning import images_per_second, receipts
from vimoe.errors import VimoeError


@pytest.mark.parametrize("with_loader", [True, False])
@pytest.mark.parametrize("routing", ["image", "token"])
def test_what_matters_is_kept_and_what_does_not_goes(routing: str, with_loader: bool) -> None:
    """Measured, not made up: the second layer of the known model specialises but does nothing."""
    model = Known(routing=routing)
    done = vimoe.prune(model, vimoe.analyze(model, loader()), loader() if with_loader else None)
    assert [step.layer for step in done.steps] == ["blocks.1.mlp"] and done.steps[0].change.loss.high < 1e-6
    assert [step.layer for step in done.kept] == ["blocks.0.mlp"] and done.kept[0].change.loss.low > 1
    assert isinstance(model.blocks[0].mlp, vimoe.MoE) and not isinstance(model.blocks[1].mlp, vimoe.MoE)
    x = torch.cat([x for x, _ in loader()])
    torch.testing.assert_close(model(x), Known(routing=routing)(x))
    assert "kept" in str(done) and "made dense" in str(done)


def scripted(monkeypatch: pytest.MonkeyPatch, losses: Callable[[str, int, int], list[float]]) -> None:
    """Replaces the measurement: losses(layer, column, reading) of ten images; they are right where the loss falls."""
    readings = []

    def measured(_subjects: Subjects, plan: dict, _task: str) -> dict[str, Changes]:
        readings.append(plan)
        made = {}
        for name, ways in plan.items():
            loss = np.array([losses(name, column, len(readings)) for column in range(len(ways))], dtype=float).T
            made[name] = changes(loss, -np.sign(loss))
        return made

    monkeypatch.setattr("vimoe.analysis.pruning.measure", measured)


NOISY = [-1.0, 1.0] * 5  # nothing on average, and an interval of more than half a nat


def steady(value: float) -> list[float]:
    return [value] * 10


def test_it_would_be_seen_if_the_measurement_were_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With changes that are all zero the layer that matters goes too: the test above can fail."""
    model = Known()
    found = vimoe.analyze(model, loader())
    scripted(monkeypatch, lambda *_: steady(0.0))
    assert len(vimoe.prune(model, found, loader()).steps) == 2


def test_the_lowest_bound_goes_by_the_way_of_the_lowest_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer has the lower estimate and an interval that is wide; ways are judged by their estimates."""
    columns = {"blocks.0.mlp": [NOISY, steady(0.3), steady(0.4)], "blocks.1.mlp": [steady(0.4), steady(0.2), NOISY]}
    columns["blocks.1.mlp"][2] = [x + 0.3 for x in NOISY]
    scripted(monkeypatch, lambda name, column, _: columns[name][column])
    model = upcycle(vit(), config())
    done = vimoe.prune(model, evidence(effect(0.0), effect(0.0)), [], tolerance=0.25)
    assert [(step.layer, step.how) for step in done.steps] == [("blocks.1.mlp", "merge")]
    assert [(step.layer, step.how) for step in done.kept] == [("blocks.0.mlp", "shared")]
    assert done.kept[0].change.loss.value == 0 and done.kept[0].change.loss.high > 0.25
    model = upcycle(vit(), config())
    assert [step.layer[7] for step in vimoe.prune(model, evidence(effect(0.0), effect(0.0)), [], 2.0).steps] == [
        "1",
        "0",
    ]


def test_what_is_kept_is_told_in_order_with_its_last_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, lambda name, column, reading: steady(int(name[7]) + reading + column / 10))
    done = vimoe.prune(upcycle(vit(), config()), evidence(effect(0.0), effect(0.0)), [], tolerance=1.5)
    assert [(step.layer, step.change.loss.value) for step in done.steps] == [("blocks.0.mlp", 1)]
    assert [(step.layer, step.change.loss.value) for step in done.kept] == [("blocks.1.mlp", 3)]


def test_experts_go_by_bound_from_the_last_layer_and_totals_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(name: str, column: int, reading: int) -> list[float]:
        if reading == 1:
            return steady(9.0)  # no layer goes
        return NOISY if column == 0 else steady(0.1 * column)

    scripted(monkeypatch, losses)
    model = upcycle(vit(), config(top_k=2))
    made = evidence(effect(9.0), effect(9.0), top_k=2)
    done = vimoe.prune(model, made, [], tolerance=0.3, experts=True)
    # of experts 0 to 3 the second goes, then the third (second of those left): top_k = 2 stay
    assert [(step.layer[7], step.expert) for step in done.steps] == [("1", 1), ("1", 2), ("0", 1), ("0", 2)]
    assert [step.total.loss.value for step in done.steps] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert [step.total.right.value for step in done.steps] == [-1, -2, -3, -4]
    assert [len(layer.experts.fc1.weight) for layer in layers(model)] == [2, 2]
    assert [step.layer for step in done.kept] == ["blocks.0.mlp", "blocks.1.mlp"]


def test_what_breaks_the_model_stays() -> None:
    model = perturb_experts(upcycle(vit(), config(num_shared_experts=0, top_k=2)))
    batches = [(images(model, 10), torch.arange(10) % 5)]
    found = vimoe.analyze(model, batches, draws=1)
    broken = replace(found.layers[0], gate_mass=np.array([0.5, np.nan, 0.25, 0.25]))
    done = vimoe.prune(model, replace(found, layers=(broken, found.layers[1])), batches, tolerance=100.0)
    assert [step.layer for step in done.steps] == ["blocks.1.mlp"] and done.kept[0].change.loss.low > 1000


def test_what_takes_a_place_computes_as_in_evaluation() -> None:
    """A model in training mode: dropout would blur what is measured, and stay."""
    model = perturb_experts(upcycle(vit(proj_drop_rate=0.5), config())).train()
    x, labels = images(model, 20), torch.arange(20) % 5
    before = copy.deepcopy(model)
    done = vimoe.prune(model, vimoe.analyze(before.eval(), [(x, labels)], draws=1), [(x, labels)], tolerance=100.0)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        change = F.cross_entropy(model(x), labels) - F.cross_entropy(before(x), labels)
    assert done.steps[-1].total.loss.value == pytest.approx(float(change), abs=1e-5)


@pytest.mark.parametrize("with_loader", [True, False])
def test_each_layer_is_merged_by_its_own_gates(with_loader: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = perturb_experts(upcycle(vit(), config(num_shared_experts=0, top_k=2)))
    mass = [np.array([0.7, 0.3, 0.0, 0.0]), np.array([0.0, 0.0, 0.9, 0.1])]
    found = evidence(effect(0.0), effect(0.0), hows=("merge", "matched"), top_k=2)
    found = replace(found, layers=tuple(replace(e, gate_mass=m) for e, m in zip(found.layers, mass, strict=True)))
    weights = [layer.experts.fc1.weight.detach() for layer in layers(model)]
    scripted(monkeypatch, lambda _name, column, _reading: steady(float(column) / 1000))
    with nullcontext() if with_loader else pytest.warns(UserWarning, match="2 layers are made dense"):
        vimoe.prune(model, found, [] if with_loader else None)
    for i, (weight, m) in enumerate(zip(weights, mass, strict=True)):
        torch.testing.assert_close(
            model.blocks[i].mlp.fc1.weight.detach(),
            (torch.tensor(m, dtype=torch.float32)[:, None, None] * weight).sum(0),
        )


def test_a_loader_that_shuffles_is_refused_where_it_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The changes of one image would be added to those of another."""
    monkeypatch.setattr("vimoe.analysis.interventions.KEPT_BYTES", 0)
    model = Known()
    found = vimoe.analyze(model, loader())
    readings = [loader(), loader()[::-1]]
    changing = type("Changing", (), {"__iter__": lambda self: iter(readings.pop(0))})()
    with pytest.raises(VimoeError, match="another order each time"):
        vimoe.prune(model, found, changing)


class Twins(Known):
    """Both layers cast the same vote, so that either can go, and not both."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = copy.deepcopy(self.blocks[0])


def test_each_removal_is_measured_in_the_model_without_those_before() -> None:
    """Each of the twins alone is superfluous; judged by the evidence both would go, and the model with them."""
    model = Twins()
    found = vimoe.analyze(model, loader())
    assert all(layer.dense["shared"].loss.high < 0.1 for layer in found.layers)
    greedy, at_once = copy.deepcopy(model), copy.deepcopy(model)
    done = vimoe.prune(greedy, found, loader(), tolerance=0.1)
    assert len(done.steps) == len(done.kept) == 1 and done.kept[0].change.loss.low > 1
    with pytest.warns(UserWarning, match="what they cost together is not known"):
        assert len(vimoe.prune(at_once, found, tolerance=0.1).steps) == 2
    x, labels = (torch.cat(each) for each in zip(*loader(), strict=True))
    assert (greedy(x).argmax(dim=1) == labels).all() and not (at_once(x).argmax(dim=1) == labels).all()


def test_totals_are_of_the_model_that_was_given() -> None:
    model = perturb_experts(upcycle(vit(), config()))
    x, labels = images(model, 20), torch.arange(20) % 5
    batches = list(zip(x.split(8), labels.split(8), strict=True))
    found = vimoe.analyze(model, batches, draws=1)
    with torch.no_grad():
        before = F.cross_entropy(model(x), labels)
        done = vimoe.prune(model, found, batches, tolerance=100.0, experts=True)
        after = F.cross_entropy(model(x), labels)
    assert not layers(model) and len(done.steps) == 2 and not done.kept
    assert done.steps[-1].total.loss.value == pytest.approx(float(after - before), abs=1e-5)
    assert sum(step.change.loss.value for step in done.steps) == pytest.approx(float(after - before), abs=1e-5)
    assert done.steps[0].total == done.steps[0].change


def test_the_way_with_the_lowest_loss_is_taken() -> None:
    """Experts that share a vote which the shared expert lacks: their mean keeps it."""
    model = Known(combine="sum")
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.experts.fc2.bias.zero_()
        model.blocks[1].mlp.experts.fc2.bias[:, CLASSES] = 5.0
    batches = [(x, torch.zeros_like(y)) for x, y in loader()]
    done = vimoe.prune(model, vimoe.analyze(model, batches), batches)
    assert {step.layer: step.how for step in done.steps}["blocks.1.mlp"] in ("merge", "matched")
    assert not layers(model)
    assert (model(batches[0][0]).argmax(dim=1) == 0).all() and done.steps[-1].total.loss.high < 0.01


def test_the_upper_bound_decides_not_the_estimate() -> None:
    def gone(*changes: Effect, tolerance: float = 0.01) -> list[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _gone(*changes, tolerance=tolerance)

    def _gone(*changes: Effect, tolerance: float) -> list[str]:
        return [
            step.layer[7] for step in vimoe.prune(upcycle(vit(), config()), evidence(*changes), None, tolerance).steps
        ]

    assert gone(effect(0.005, 0.005), effect(0.0, 0.02)) == ["0"]
    assert gone(effect(-0.2), effect(0.011)) == ["0"]
    assert gone(effect(-0.2), effect(0.011), tolerance=0.011) == ["0", "1"]
    assert gone(effect(-0.2), effect(0.011), tolerance=-1.0) == []


def test_experts_are_dropped_one_after_another() -> None:
    """Two experts are never chosen and two are copies of one another: three can go but not the last of the twins."""
    model = Known(num_experts=6)
    with torch.no_grad():
        model.blocks[0].mlp.router.weight[CLASSES:] = -1.0
        model.blocks[0].mlp.router.weight[4, 0] = 19.9  # second choice of class 0, with the same vote
        model.blocks[0].mlp.experts.fc2.bias[4] = model.blocks[0].mlp.experts.fc2.bias[0]
    found = vimoe.analyze(model, loader())
    x = torch.cat([x for x, _ in loader()])
    before = model(x)
    done = vimoe.prune(model, found, loader(), tolerance=0.05, experts=True)
    experts = [step.expert for step in done.steps if step.expert is not None]
    assert len(experts) == 2 and 5 in experts and set(experts) & {0, 4}
    kept = model.blocks[0].mlp
    assert kept.config.num_experts == kept.router.config.num_experts == 4 == len(kept.experts.fc1.weight)
    assert (model(x).argmax(dim=1) == before.argmax(dim=1)).all()
    assert vimoe.prune(Known(num_experts=6), found, loader(), tolerance=0.05).steps[-1].expert is None


def test_a_model_with_fewer_experts_in_one_layer_is_saved_and_loaded(tmp_path) -> None:
    model = perturb_experts(upcycle(vit(), config(top_k=2)))
    layers(model)[0].keep_experts([3, 1])
    vimoe.save(model, tmp_path / "model")
    again = vimoe.load(tmp_path / "model")
    assert [layer.config.num_experts for layer in layers(again)] == [2, 4]
    torch.testing.assert_close(again(images(model)), model(images(model)))
    assert vimoe.count(again).params < vimoe.count(upcycle(vit(), config(top_k=2))).params


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf")])
def test_a_tolerance_is_a_number(tolerance: float) -> None:
    with pytest.raises(VimoeError, match="expected a number of nats"):
        vimoe.prune(vit(), evidence(effect(5.0)), None, tolerance)


def test_evidence_of_another_model_is_refused_and_nothing_changed() -> None:
    model = upcycle(vit(), config(layers=[0]))
    zero = effect(0.0)
    others = [
        evidence(zero, zero),
        evidence(zero, num_experts=8),
        evidence(zero, routing="token"),
        evidence(zero, top_k=2),
    ]
    for other in others:
        with pytest.raises(
            VimoeError, match=r"blocks..\.mlp has \(experts, top_k, routing\) .* run analyze on this model"
        ):
            vimoe.prune(model, other)
        assert len(layers(model)) == 1


def test_what_was_not_measured_cannot_decide() -> None:
    model = upcycle(vit(), config(layers=[0]))
    with pytest.raises(VimoeError, match="no interventions"):
        vimoe.prune(model, evidence(effect(0.0), dense={}))
    with pytest.raises(VimoeError, match="experts=True without a loader"):
        vimoe.prune(model, evidence(effect(0.0)), experts=True)


def test_the_receipt_has_score_cost_and_measured_speed() -> None:
    dense = vit()
    moe = upcycle(copy.deepcopy(dense), config())
    batch = [(images(dense), torch.tensor([0, 1, 2]))]
    before, after = receipts([moe, dense], batch)
    assert before.score.to_dict() == pytest.approx(after.score.to_dict(), rel=1e-4)  # upcycled, not yet trained
    assert before.cost == vimoe.count(moe) and after.cost == vimoe.count(dense)
    assert before.cost.params > before.cost.activated_params > after.cost.params
    assert before.images_per_second > 0 and after.images_per_second > 0


def test_throughput_counts_images(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr("vimoe.analysis.pruning.time.perf_counter", lambda: next(clock))
    assert images_per_second([nn.Linear(4, 2)], torch.zeros(7, 4), rounds=3) == [14.0]


def test_throughput_of_slow_models_is_timed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each forward, of which two models have four rounds; and no more than 32 images on a CPU."""
    clock = iter(np.arange(0, 1000, 1.0))
    monkeypatch.setattr("vimoe.analysis.pruning.time.perf_counter", lambda: next(clock))
    seen: list[int] = []
    models = [nn.Linear(4, 2), nn.Linear(4, 2)]
    for model in models:
        model.register_forward_pre_hook(lambda _model, args: seen.append(len(args[0])))
    assert images_per_second(models, torch.zeros(128, 4)) == [32.0, 32.0]
    assert seen == [32] * 10
    seen.clear()
    monkeypatch.setattr("vimoe.analysis.pruning._TIMED_SECONDS", 0.0)
    images_per_second(models, torch.zeros(5, 4))
    assert seen == [5] * 8


def test_the_trunk_is_computed_once_for_all_rounds() -> None:
    """What comes before the first MoE layer does not change while layers and experts are removed."""
    model = perturb_experts(upcycle(vit(depth=4), config(layers="last:2")))
    batches = [(images(model, 10), torch.arange(10) % 5)]
    found = vimoe.analyze(model, batches, draws=1)
    ran: list[int] = []
    for block in model.blocks[:2]:
        block.attn.qkv.register_forward_pre_hook(lambda _qkv, args: ran.append(len(args[0])))
    done = vimoe.prune(model, found, batches, tolerance=100.0, experts=True)
    assert len(done.steps) == 2
    assert ran == [2] * len(ran[:-2]) + [10, 10]  # to find the way, and one reading


@pytest.mark.parametrize("with_loader", [True, False])
def test_layers_that_no_method_makes_dense_stay_and_are_named(with_loader: bool) -> None:
    model = upcycle(vit(), config(experts="scaled", num_shared_experts=0, top_k=2))
    batches = [(images(model, 10), torch.arange(10) % 5)]
    found = vimoe.analyze(model, batches, draws=1)
    done = vimoe.prune(model, found, batches if with_loader else None, tolerance=9)
    assert not done.steps and not done.kept and len(layers(model)) == 2
    assert done.without_method == ("blocks.0.mlp", "blocks.1.mlp") == tuple(done.to_dict()["without_method"])
    assert str(done).splitlines()[:2] == [f"blocks.{i}.mlp: kept; no method makes it dense" for i in (0, 1)]


SPLIT = {"init": "split", "num_shared_experts": 0, "gate": "choice"}


@pytest.mark.parametrize(("how", "settings"), [("merge", {}), ("whole", SPLIT)])
def test_all_layers_are_merged_whatever_it_costs_and_the_cost_is_measured(how: str, settings: dict) -> None:
    """The changes are those of a model whose layers are merged by hand, one after another."""
    model = perturb_experts(upcycle(vit(), config(top_k=2, **settings)))
    labels = torch.arange(10) % 5
    batches = [(images(model, 10), labels)]
    found = vimoe.analyze(model, batches, draws=1)
    mass = {layer.name: torch.from_numpy(layer.gate_mass) for layer in found.layers}
    by_hand, losses = copy.deepcopy(model), [loss_of(model, *batches[0])]
    for name in mass:
        vimoe.densify(by_hand, [name], how, gate_mass={name: mass[name]})
        losses.append(loss_of(by_hand, *batches[0]))
    done = vimoe.prune(model, found, batches, merge_all=True)
    assert [(step.layer, step.how) for step in done.steps] == [("blocks.0.mlp", how), ("blocks.1.mlp", how)]
    assert done.tolerance is None and not done.kept and not layers(model)
    changes = [step.change.loss.value for step in done.steps]
    assert changes == pytest.approx(np.diff(losses).tolist(), abs=1e-5) and max(map(abs, changes)) > 1e-3
    assert done.steps[-1].total.loss.value == pytest.approx(losses[-1] - losses[0], abs=1e-5)
    torch.testing.assert_close(model(batches[0][0]), by_hand(batches[0][0]))


def loss_of(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(x), labels))


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"experts": True}, "experts=True with merge_all=True: expected False"),
        ({}, {"tolerance": 0.5}, "tolerance=0.5 with merge_all=True: expected 0.01, since all layers"),
        ({}, {"loader": None}, "merge_all=True without a loader: expected one"),
        ({"num_shared_experts": 2}, {}, "merge_all=True: blocks.0.mlp has several shared experts"),
    ],
)
def test_merging_all_layers_is_refused_in_one_line(settings: dict, arguments: dict, message: str) -> None:
    model = upcycle(vit(), config(**settings))
    batches = [(images(model, 10), torch.arange(10) % 5)]
    found = vimoe.analyze(model, batches, draws=1, overrule=0)
    with pytest.raises(VimoeError, match=message):
        vimoe.prune(model, found, **{"loader": batches, "merge_all": True, **arguments})
    assert len(layers(model)) == 2
