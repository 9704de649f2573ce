"""Routing by patch: numbers with known answers, a model whose experts are known, pruning, and the verbs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import call
from helpers.known_scenes import batches, known
from helpers.scene_runs import MOE, SCENES
from helpers.scenery import NAMES, YAML, scenes
from helpers.slow import one_in

import vimoe
from vimoe.analysis.dependence import Dependence, dependence, dependence_of_units
from vimoe.analysis.evidence import Evidence
from vimoe.analysis.expert_usage import tables_of_units
from vimoe.cli import main
from vimoe.config.masks import IGNORE
from vimoe.errors import ConfigError, DataError
from vimoe.moe.layer import moe_layers

IMAGES, UNITS, CLASSES, EXPERTS = 40, 30, 3, 4


def random(high: int, seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape or (IMAGES, UNITS))


def test_tables_count_each_image_by_hand() -> None:
    labels = np.array([[0, 1, -1], [2, 2, 0]])
    experts = np.array([[[0], [1], [1]], [[0], [0], [1]]])
    tables = tables_of_units(labels, experts, 3, 2)
    assert tables.tolist() == [[[1, 0], [0, 1], [0, 0]], [[0, 1], [0, 0], [2, 0]]]
    both = tables_of_units(labels, np.concatenate([experts, 1 - experts], axis=2), 3, 2)
    assert both.tolist() == [[[1, 1], [1, 1], [0, 0]], [[1, 1], [0, 0], [2, 2]]]


def test_experts_that_are_the_class_have_an_ami_of_one() -> None:
    labels = random(CLASSES, 0)
    found = dependence_of_units(labels, labels[..., None], CLASSES, CLASSES)
    assert found.value == pytest.approx(1, abs=0.01) and found.p < 0.01 and found.low > 0.9


def test_experts_that_know_nothing_are_chance() -> None:
    found = [
        dependence_of_units(random(CLASSES, seed), random(EXPERTS, 1000 + seed)[..., None], CLASSES, EXPERTS)
        for seed in range(20)
    ]
    assert abs(np.mean([each.value for each in found])) < 0.005
    assert sum(each.p <= 0.05 for each in found) <= 4 and sum(each.low > 0 for each in found) <= 4


def test_experts_that_follow_the_place_alone_are_chance_though_classes_follow_it_too() -> None:
    place = np.broadcast_to(np.arange(UNITS) // 10, (IMAGES, UNITS))
    labels = np.where(np.random.default_rng(0).random((IMAGES, UNITS)) < 0.7, place, random(CLASSES, 1))
    found = dependence_of_units(labels, place[..., None].astype(int), CLASSES, CLASSES)
    assert found.nats > 0.2 and abs(found.value) < 0.01 and found.p > 0.05


def test_experts_that_follow_the_image_but_not_its_classes_are_chance() -> None:
    image = np.broadcast_to(random(EXPERTS, 3, IMAGES, 1), (IMAGES, UNITS))
    labels = np.where(np.random.default_rng(1).random((IMAGES, UNITS)) < 0.8, random(CLASSES, 4, IMAGES, 1), 0)
    found = dependence_of_units(labels, image[..., None], CLASSES, EXPERTS)
    assert found.p > 0.05 and found.low < 0


def test_units_without_a_class_play_no_part() -> None:
    labels, experts = random(CLASSES, 5), random(EXPERTS, 6)[..., None]
    half = labels.copy()
    half[:, UNITS // 2 :] = -1
    assert dependence_of_units(half, experts, CLASSES, EXPERTS) == dependence_of_units(
        labels[:, : UNITS // 2], experts[:, : UNITS // 2], CLASSES, EXPERTS
    )


def test_one_unit_an_image_is_the_ami_of_images() -> None:
    labels = random(CLASSES, 7, 300)
    experts = np.where(np.random.default_rng(8).random(300) < 0.6, labels, random(CLASSES, 9, 300))
    by_image = dependence(labels, (experts[:, None] == np.arange(CLASSES)).astype(int))
    by_unit = dependence_of_units(labels[:, None], experts[:, None, None], CLASSES, CLASSES)
    assert by_unit.nats == pytest.approx(by_image.nats) and by_unit.value == pytest.approx(by_image.value, abs=0.01)
    assert (by_unit.low, by_unit.high) == pytest.approx((by_image.low, by_image.high), abs=0.03)


def test_the_interval_covers_what_as_many_images_give() -> None:
    """Images with classes of their own, experts that follow the class in part; in 100 data sets."""

    def draw(seed: int) -> Dependence:
        rng = np.random.default_rng(seed)
        favourite = rng.integers(0, CLASSES, (60, 1))
        labels = np.where(rng.random((60, 16)) < 0.5, favourite, rng.integers(0, CLASSES, (60, 16)))
        follows = rng.random((60, 16)) < rng.uniform(0.1, 0.7, (60, 1))
        experts = np.where(follows, labels, rng.integers(0, CLASSES, (60, 16)))
        return dependence_of_units(labels, experts[..., None], CLASSES, CLASSES, seed)

    found = [draw(seed) for seed in range(100)]
    expected = np.mean([each.value for each in found])
    assert 0.88 <= np.mean([each.low <= expected <= each.high for each in found]) <= 1


def test_a_known_segmenter_is_understood() -> None:
    evidence = vimoe.analyze(known(), batches(), draws=5)
    (layer,) = evidence.layers
    assert evidence.base.miou > 0.9 and evidence.images == 12
    assert (layer.counts == np.diag(layer.counts.diagonal())).all() and layer.counts.sum() == 12 * 15
    assert layer.adjusted_mutual_information.value > 0.95 and layer.adjusted_mutual_information.p < 0.01
    assert layer.permuted.loss.low > 1 and layer.permuted.right.high < -0.3
    assert layer.dense["shared"].loss.low > 0.1
    assert all(effect.loss.low > 0 and effect.right.value < -0.2 for effect in layer.experts)
    assert layer.examples == ()
    again = Evidence.from_dict(json.loads(json.dumps(evidence.to_dict())))
    assert again.base == evidence.base and str(again) == str(evidence) and "mean IoU" in str(again)


@pytest.mark.parametrize("videos", [False, True])
def test_images_that_are_all_void_change_no_effect_and_no_pruning(videos: bool) -> None:
    """Nothing changes there: as changes of 0 they would halve each effect, and more would be pruned."""
    nothing = [(x, torch.full_like(y, IGNORE)) for x, y in batches()]
    mixed = [batch for pair in zip(batches(), nothing, strict=True) for batch in pair]
    of = [f"video {i // 2}" for i in range(12)] if videos else None
    void = ["void"] * 12
    of_mixed = of and [name for i in range(0, 12, 5) for name in (*of[i : i + 5], *void[i : i + 5])]
    for routing in ("token", "image"):
        alone = vimoe.analyze(known(routing), batches(), 3, sequences=of)
        both = vimoe.analyze(known(routing), mixed, 3, sequences=of_mixed)
        assert both.overruled_images == alone.overruled_images == 12 and both.images == 24
        assert both.overruled_sequences == alone.overruled_sequences == (6 if videos else None)
        assert both.layers[0].permuted.loss == alone.layers[0].permuted.loss
        assert both.layers[0].dense == alone.layers[0].dense
        given = ((batches(), of), (mixed, of_mixed))
        first, second = (vimoe.prune(known(routing), alone, loader, sequences=names) for loader, names in given)
        assert first == second and first.sequences == (6 if videos else None)
    with pytest.raises(DataError, match="the loader has no labelled image"):
        vimoe.prune(known("image"), alone, nothing)
    with pytest.raises(ConfigError, match="12 sequences of 24 images"):
        vimoe.prune(known("image"), alone, mixed, sequences=void)


def test_patches_of_a_layer_that_routes_images_have_the_image_s_expert() -> None:
    evidence = vimoe.analyze(known("image"), batches(), draws=3)
    (layer,) = evidence.layers
    assert layer.counts.sum() == 12 * 15 and layer.routing == "image"
    assert abs(layer.adjusted_mutual_information.value) < 0.3


def test_images_that_are_no_whole_patches_are_counted_on_their_grid() -> None:
    cut = [(x[..., :14, :13], y[..., :14, :13]) for x, y in batches()]
    (layer,) = vimoe.analyze(known(), cut, overrule=0).layers
    assert layer.counts.sum() == 12 * 15
    assert layer.adjusted_mutual_information.value > 0.9


def test_interventions_do_not_depend_on_how_many_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = vimoe.analyze(known(), batches(), draws=4)
    monkeypatch.setattr(vimoe.analysis.interventions, "_SCORES", 3 * 3 * 16 * 16)  # three images at a time
    parts = vimoe.analyze(known(), batches(), draws=4)
    for key in ("permuted", "frozen"):
        assert getattr(whole.layers[0], key).loss.value == pytest.approx(getattr(parts.layers[0], key).loss.value)
    assert [e.right.value for e in whole.layers[0].experts] == pytest.approx(
        [e.right.value for e in parts.layers[0].experts]
    )


def test_pruning_keeps_the_layer_that_decides_and_drops_one_that_does_not() -> None:
    model = known()
    evidence = vimoe.analyze(model, batches(), draws=3)
    assert [step.layer for step in vimoe.prune(model, evidence, batches()).kept] == ["backbone.blocks.0.mlp"]
    idle = known()
    with torch.no_grad():
        for layer in moe_layers(idle).values():
            layer.experts.fc2.bias.zero_()
    evidence = vimoe.analyze(idle, batches(), draws=3)
    assert not vimoe.prune(idle, evidence, batches()).kept and not moe_layers(idle)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "the loader is empty"),
        ([(torch.zeros(1, 3, 16, 16), torch.zeros(1, 16, 16).long())], "1 validation image: expected at least 2"),
        ([(torch.zeros(1, 3, 16, 16), torch.full((1, 16, 16), 3))], "the label 3: expected 0 to 2"),
        ([*batches(5), (torch.zeros(1, 3, 20, 16), torch.zeros(1, 20, 16).long())], "expected one size"),
    ],
)
def test_batches_that_cannot_be_used_are_refused(loader: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        vimoe.analyze(known(), loader, overrule=0)


@pytest.mark.parametrize("sizes", one_in(2, ["several", "one size"]))
def test_a_run_is_analysed_pruned_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str], sizes: str) -> None:
    videos = "sequence: '(a..)'\n" if sizes == "several" else ""
    data = scenes(tmp_path / "scenes", train=9, val=6, yaml=YAML + videos)
    if sizes == "several":
        larger = scenes(tmp_path / "larger", height=40, width=56)
        for kind in ("images", "annotations"):
            (larger / kind / "val/a100.png").replace(data / kind / "val/a100.png")
    run = tmp_path / "run"
    assert main(["train", "--data.path", str(data), *SCENES, *MOE, "--out", str(run)]) == 0
    values = call(capsys, "analyze", run, "--draws", 3)
    (layer,) = values["layers"]
    assert values["classes"] == list(NAMES) and values["images"] == 6
    assert set(layer["permuted"]) == {"loss", "right", "calibrated"} and layer["permuted"]["calibrated"] is None
    page = (run / "report.html").read_text()
    assert "pixel accuracy" in page and "Pixel accuracy, points" in page
    diagnosis = call(capsys, "diagnose", run)
    assert diagnosis["without_oracle"] and diagnosis["findings"] and diagnosis["sequences"] == values["sequences"]
    too_narrow = "over single frames of 1 sequence, and so too narrow"
    assert (too_narrow in page) == bool(videos) and values["sequences"] == (1 if videos else None)
    pruned = call(capsys, "prune", run, "--out", tmp_path / "pruned", "--tolerance", 100, "--recover", 1)
    assert [step["layer"] for step in pruned["steps"]] == ["backbone.blocks.1.mlp"]
    assert {"miou", "params", "macs", "images_per_second"} <= set(pruned["after"]) and "recovered" in pruned
    page = (tmp_path / "pruned/report.html").read_text()
    assert "mean IoU, %" in page and (too_narrow in page) == bool(videos)
    assert main(["report", str(run), str(tmp_path / "pruned"), "--out", str(tmp_path / "both.html")]) == 0
    assert (too_narrow in (tmp_path / "both.html").read_text()) == bool(videos)
    again = call(capsys, "evaluate", tmp_path / "pruned")
    assert again["miou"] == pytest.approx(pruned["recovered"]["miou"])


def test_images_without_a_class_play_no_part() -> None:
    labels, experts = random(CLASSES, 5), random(EXPERTS, 6)[..., None]
    blank = np.concatenate([labels, np.full((5, UNITS), -1)])
    more = np.concatenate([experts, random(EXPERTS, 7, 5, UNITS)[..., None]])
    assert dependence_of_units(blank, more, CLASSES, EXPERTS) == dependence_of_units(labels, experts, CLASSES, EXPERTS)
    nothing = dependence_of_units(np.full((3, UNITS), -1), experts[:3], CLASSES, EXPERTS)
    assert (nothing.value, nothing.low, nothing.high, nothing.p) == (0, 0, 0, 1)


def test_load_and_effective_experts_are_of_the_same_patches() -> None:
    (layer,) = vimoe.analyze(known(), batches(), overrule=0).layers
    load = layer.load[layer.load > 0]
    assert layer.effective_experts.value == pytest.approx(np.exp(-(load * np.log(load)).sum()))
