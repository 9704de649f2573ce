"""Each rule holds where its figures say so, every layer has a finding, and every setting that is named exists."""

from __future__ import annotations

import random
import re
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from helpers.pruned import effect
from timm.layers import Mlp

import vimoe
from vimoe.analysis.diagnosis import Gates, LayerDiagnosis, Oracle
from vimoe.analysis.expert_similarity import Distance
from vimoe.analysis.intervals import Interval
from vimoe.analysis.remedies import EFFECT, EXPECTED, RULES, SAME_OUTPUT, SMALL_GATE, findings
from vimoe.config.data import DataConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.train import TrainConfig
from vimoe.moe.router import TokenLayout
from vimoe.training.routing_health import COLLAPSED, CONFIDENT

SECTIONS = {"moe": MoEConfig, "train": TrainConfig, "data": DataConfig}


def layer(**changes: object) -> LayerDiagnosis:
    """A healthy layer of 8 experts, apart from the changes."""
    apart, evenly = Distance(0.5, 1.0, 1.0), (1 / 8,) * 8
    made = LayerDiagnosis(
        name="a", num_experts=8, images=400, from_shared=apart, from_mean=apart, gates=Gates(0.5, 0.4, 0.5, 0.6),
        router_confidence=0.5, learns=True, experts_per_unit=1.0, load=evenly, effective_experts=Interval(8, 8, 8),
        permuted=effect(0.1, 0.05), dense={}, oracle=oracle(0.0),
    )  # fmt: skip
    return replace(made, **changes)


def oracle(value: float, half: float = 0.0) -> Oracle:
    return Oracle(effect(value, half), effect(0.0), effect(-9.0), effect(-9.0), 400)


NONE = {"permuted": effect(0.0)}  # no effect
CASES = {
    "healthy": ({}, {"permuted": effect(0.9 * EFFECT)}, {"permuted": effect(0.1, 0.2)}, {"oracle": oracle(-0.1)}),
    "useless experts": (NONE, {}, {**NONE, "oracle": oracle(-0.1)}, {"permuted": effect(0.0, 2 * EFFECT)}),
    "collapsed": (
        {"effective_experts": Interval(COLLAPSED - 0.01, 1, 2)},
        {"effective_experts": Interval(COLLAPSED, 1, 2)},
        {"effective_experts": Interval(1, 1, 1), "num_experts": 2},
        {"effective_experts": Interval(1, 1, 1), "load": (0.0,) * 8},
    ),
    "copies": (
        {**NONE, "from_mean": Distance(0.5, 1.0, 0.99 * SAME_OUTPUT)},
        {**NONE, "from_mean": Distance(0.5, 1.0, SAME_OUTPUT)},
        {**NONE, "from_mean": Distance(1.0, 0.0, 1.0)},  # alike in weights alone
        {**NONE, "from_mean": Distance(None, None, 1.0)},
        {"from_mean": Distance(1.0, 0.0, 0.0)},  # and yet they matter
        {**NONE, "from_mean": Distance(1.0, 0.0, 0.1), "oracle": oracle(-0.1)},  # other routes among them would
        {**NONE, "from_mean": Distance(1.0, 0.0, 0.0), "num_experts": 1},
    ),
    "small gates": (
        {**NONE, "gates": Gates(0.99 * SMALL_GATE, 0, 0, 0)},
        {**NONE, "gates": Gates(SMALL_GATE, 0, 0, 0)},
        {"gates": Gates(0.1, 0, 0, 0)},
        {**NONE, "gates": Gates(0.1, 0, 0, 0), "from_mean": Distance(1.0, 0.0, 0.0)},
    ),
    "saturated": (
        {**NONE, "router_confidence": CONFIDENT + 0.001},
        {**NONE, "router_confidence": CONFIDENT},
        {"router_confidence": 1.0},  # it is certain of what is right
        {**NONE, "router_confidence": 1.0, "learns": False},
    ),
    "better routes": (
        {"oracle": oracle(-EFFECT)},
        {"oracle": oracle(-0.9 * EFFECT)},
        {"oracle": oracle(-0.1, 0.2)},
        {"oracle": oracle(0.1)},
        {"oracle": None},
    ),
    "idle experts": (
        {"load": (0.0, *(1 / 7,) * 7)},
        {},
        {"load": (0.0, *(1 / 7,) * 7), "images": 8 * EXPECTED - 1},
        {"load": (0.0,) * 7 + (1.0,), "effective_experts": Interval(1, 1, 1)},
    ),
    "too few images": (
        {"permuted": effect(0.0, 1.1 * EFFECT)},
        {"permuted": effect(0.0, 0.9 * EFFECT)},
        {"permuted": effect(0.1, 0.05), "oracle": oracle(0.0, 1.0)},
        {"permuted": effect(0.0, 1.0), "oracle": oracle(-1.0)},
    ),
}


@cache
def moe(**settings: object) -> vimoe.MoE:
    return vimoe.MoE(Mlp(8, 16), MoEConfig(**settings), TokenLayout(num_prefix_tokens=1, class_token=True))


def found(*layers: LayerDiagnosis, **settings: object) -> dict[str, tuple[str, ...]]:
    made = {each.name: moe(**settings) for each in layers}
    return {finding.name: finding.remedies for finding in findings(layers, made)}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_holds_on_one_side_of_its_bounds_only(name: str) -> None:
    holds, *others = CASES[name]
    assert name in found(layer(**holds))
    for case in others:
        assert name not in found(layer(**case)), case


def test_all_rules_have_cases() -> None:
    assert set(CASES) == {rule.name for rule in RULES}


def test_intervals_of_the_oracle_are_looked_at_too() -> None:
    assert "too few images" in found(layer(**NONE, oracle=oracle(0.0, 1.1 * EFFECT)))
    assert "useless experts" in found(layer(**NONE, oracle=oracle(0.0, 0.9 * EFFECT)))
    assert "useless experts" in found(layer(**NONE, oracle=None))


def test_every_layer_has_a_finding_and_a_healthy_one_no_fault() -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(800):
        made = layer(
            permuted=effect(rng.choice([-0.1, 0.0, 0.005, 0.1]), rng.choice([0.0, 0.004, 0.2])),
            oracle=rng.choice([None, oracle(rng.choice([-0.1, 0.0, 0.1]), rng.choice([0.0, 0.2]))]),
            from_mean=rng.choice([Distance(1.0, 0.0, 0.0), Distance(0.5, 1.0, 1.0)]),
            gates=Gates(rng.choice([0.1, 0.5]), 0, 0, 0),
            router_confidence=rng.choice([0.5, 1.0]),
            load=rng.choice([(0.0, *(1 / 7,) * 7), (1 / 8,) * 8]),
            effective_experts=Interval(rng.choice([1.0, 8.0]), 1, 8),
        )
        names = found(made)
        assert names and ("healthy" not in names or len(names) == 1)
        assert not {"useless experts", "copies"} <= set(names) and not {"small gates", "copies"} <= set(names)
        seen |= set(names)
    assert seen == {rule.name for rule in RULES}


def test_a_finding_names_its_layers_and_the_first_is_the_most_urgent() -> None:
    layers = [layer(), layer(name="b", **NONE), layer(name="c", effective_experts=Interval(1, 1, 1))]
    listed = findings(layers, {each.name: moe() for each in layers})
    assert [(finding.name, list(finding.layers)) for finding in listed] == [
        ("collapsed", ["c"]), ("useless experts", ["b"]), ("healthy", ["a"]),
    ]  # fmt: skip


def test_what_is_set_already_is_not_advised() -> None:
    copies = layer(**NONE, from_mean=Distance(1.0, 0.0, 0.0))
    assert found(copies)["copies"] == (
        "a higher train.expert_lr_scale",
        "a higher train.lr",
        "moe.init=drop",
        "moe.init=cluster",
    )
    assert "moe.init=drop" not in found(copies, init="drop")["copies"]
    both = findings([copies, replace(copies, name="b")], {"a": moe(init="drop"), "b": moe()})
    assert "moe.init=drop" in both[0].remedies  # one of them has it not


def test_more_images_are_advised_only_where_there_are_some() -> None:
    unclear = layer(permuted=effect(0.0, 1.1 * EFFECT))
    some, none = (findings([unclear], {"a": moe()}, more_images=more)[0] for more in (True, False))
    assert some.name == none.name == "too few images"
    assert some.remedies == (*none.remedies, "a higher --overrule") and len(none.remedies) == 1


COLLAPSE = {"effective_experts": Interval(1, 1, 1)}
NOT_FOR = {  # remedies that are refused, or change nothing, with these settings
    "copies": [
        (dict(experts="lora"), {}, "moe.init=drop"),
        (dict(router="cosine"), {}, "moe.init=cluster"),
    ],
    "small gates": [
        ({}, {}, "a higher moe.gate_weight"),
        (dict(router="smear"), {}, "moe.gate=choice"),
    ],
    "better routes": [
        (dict(routing="token"), {}, "moe.router=superclass"),
        (dict(router="smear"), {}, "moe.router_gradient=dense"),
        (dict(router="hash", routing="token"), {"learns": False}, "a higher train.router_lr_scale"),
    ],
    "collapsed": [
        (dict(router="hash", routing="token"), {"learns": False}, "a higher train.balance_loss"),
        (dict(router="random"), {"learns": False}, "a lower train.router_lr_scale"),
        (dict(router="expert_choice", routing="token"), {}, "a higher train.balance_loss"),
        (dict(router="expert_choice", routing="token"), {}, "moe.bias_update_rate=0.001"),
    ],
}  # fmt: skip
AT_FAULT = {
    "copies": {"permuted": effect(0.0), "from_mean": Distance(1.0, 0.0, 0.0)},
    "small gates": {"permuted": effect(0.0), "gates": Gates(0.1, 0, 0, 0)},
    "better routes": {"oracle": oracle(-1.0)},
    "collapsed": COLLAPSE,
}


@pytest.mark.parametrize("name", NOT_FOR)
def test_what_would_be_refused_or_change_nothing_is_not_advised(name: str) -> None:
    offered = next(rule.remedies for rule in RULES if rule.name == name)
    for settings, figures, remedy in NOT_FOR[name]:
        assert remedy in offered
        given = found(layer(**AT_FAULT[name], **figures), **settings)[name]
        assert given and remedy not in given, settings
    assert "a higher moe.gate_weight" in found(layer(**AT_FAULT["small gates"]), gate="choice")["small gates"]


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_every_setting_that_is_named_exists_and_takes_the_value(rule: object) -> None:
    named = re.findall(r"\b(moe|train|data)\.(\w+)(?:=(\S+))?", " ".join(rule.remedies))
    assert named or rule.name == "healthy"
    for section, name, value in named:
        assert name in [field.name for field in fields(SECTIONS[section])], f"{section}.{name}"
        if value:
            SECTIONS[section](**{name: yaml.safe_load(value)})
    assert rule.because and rule.says


def test_the_page_on_diagnosis_lists_the_rules_in_their_order() -> None:
    page = (Path(__file__).parents[2] / "docs/guides/diagnosis.md").read_text("utf-8")
    places = [page.index(f"\n| {rule.name} | ") for rule in RULES]
    assert places == sorted(places)
    for rule in RULES:
        row = page[page.index(f"\n| {rule.name} | ") + 1 :].partition("\n")[0]
        named = re.findall(r"\b(?:moe|train)\.\w+", " ".join(rule.remedies))
        assert all(name in row or name == "moe.num_experts" for name in named), rule.name
