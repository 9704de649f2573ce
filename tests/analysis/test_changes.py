"""What is left of a change of the loss when each model has its own temperature; nothing of a mere scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import known_scenes
from helpers.known import Known
from torch import Tensor

import vimoe
from vimoe.analysis.changes import Changes
from vimoe.analysis.evidence import Effect, Evidence
from vimoe.analysis.intervals import mean_intervals, pair_interval
from vimoe.analysis.temperatures import losses_on_grid
from vimoe.metrics.calibration import fit_temperature

CHANCE = torch.Generator().manual_seed(0)
LOGITS = 2 * torch.randn(400, 5, generator=CHANCE)
LABELS = torch.multinomial(LOGITS.softmax(dim=1), 1, generator=CHANCE)[:, 0]
NOISY = LOGITS + torch.randn(400, 5, generator=CHANCE)


def losses(logits: Tensor, temperature: float = 1.0) -> np.ndarray:
    return F.cross_entropy(logits.double() / temperature, LABELS, reduction="none").numpy()


def best(logits: Tensor) -> np.ndarray:
    return losses(logits, fit_temperature(logits, LABELS))


def changes(before: Tensor, *after: Tensor) -> Changes:
    loss = np.stack([losses(each) - losses(before) for each in after], axis=1)
    curves = torch.stack([losses_on_grid(each, LABELS) for each in after], dim=1).numpy()
    base = np.stack([losses(before), (before.argmax(1) == LABELS).double().numpy()], axis=1)
    return Changes(loss, np.sign(-loss), curves, losses_on_grid(before, LABELS).numpy(), base)


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_of_a_mere_scale_nothing_is_left_and_of_anything_else_what_the_best_temperatures_leave(scale: float) -> None:
    only, more, nothing = Effect.each(changes(LOGITS, scale * LOGITS, scale * NOISY, LOGITS), seed=0)
    assert only.loss.low > 0.1 and only.calibrated
    assert [only.calibrated.value, only.calibrated.low, only.calibrated.high] == pytest.approx([0, 0, 0], abs=1e-4)
    ratio = only.calibrated.temperature_after / only.calibrated.temperature_before
    assert ratio == pytest.approx(scale, rel=1e-2)
    assert more.calibrated and more.calibrated.low > 0.01
    assert more.calibrated.value == pytest.approx((best(NOISY) - best(LOGITS)).mean(), abs=1e-4)
    assert abs(more.calibrated.value - more.loss.value) > 0.05
    unchanged = nothing.calibrated
    assert unchanged and unchanged.value == unchanged.low == unchanged.high == nothing.loss.value == 0


@pytest.mark.parametrize("sequences", [None, np.arange(400) // 20])
def test_intervals_are_those_of_the_same_resamples_as_of_the_loss(sequences: np.ndarray | None) -> None:
    (found,) = Effect.each(changes(LOGITS, NOISY), 7, sequences)
    (expected,) = mean_intervals((best(NOISY) - best(LOGITS))[:, None], 7, sequences)
    assert found.calibrated and found.calibrated.high - found.calibrated.low > 0.05
    assert [found.calibrated.low, found.calibrated.high] == pytest.approx([expected.low, expected.high], abs=1e-3)


def test_draws_have_one_temperature_and_intervals_over_both_images() -> None:
    louder = torch.cat([LOGITS[:200], 3 * LOGITS[200:]])
    quieter = torch.cat([3 * LOGITS[:200], LOGITS[200:]])
    partners = np.random.default_rng(0).permuted(np.tile(np.arange(400), (2, 1)), axis=1).T
    found = Effect.of_draws(changes(LOGITS, louder, quieter), partners, seed=0)
    T = fit_temperature(torch.cat([louder, quieter]), LABELS.repeat(2))
    values = np.stack([losses(each, T) - best(LOGITS) for each in (louder, quieter)], axis=1)
    expected = pair_interval(values, partners, seed=0)
    assert found.calibrated and found.calibrated.temperature_after == pytest.approx(T, rel=1e-2)
    assert found.calibrated.value == pytest.approx(values.mean(), abs=1e-4) and values.mean() > 0.02
    assert [found.calibrated.low, found.calibrated.high] == pytest.approx([expected.low, expected.high], abs=1e-3)


def test_changes_are_cut_joined_added_and_composed() -> None:
    made = changes(LOGITS, NOISY, 3 * LOGITS, 2 * NOISY)
    again = made.columns(slice(1)).beside(made.columns(slice(1, None)))
    for name in ("loss", "right", "curves", "untouched"):
        assert np.array_equal(getattr(again, name), getattr(made, name))
    two = changes(LOGITS, NOISY).then(changes(NOISY, 3 * LOGITS))
    assert two.loss == pytest.approx(changes(LOGITS, 3 * LOGITS).loss)
    assert np.array_equal(two.fit().change, changes(LOGITS, 3 * LOGITS).fit().change)
    images, columns = np.array([3, 7]), np.array([[2], [0]])
    mixed = made.chosen(images, columns)
    assert np.array_equal(mixed.loss[:, 0], [made.loss[3, 2], made.loss[7, 0]])
    assert np.array_equal(mixed.right[:, 0], [made.right[3, 2], made.right[7, 0]])
    assert np.array_equal(mixed.curves[:, 0], [made.curves[3, 2], made.curves[7, 0]])
    assert np.array_equal(mixed.untouched, made.untouched[images])


class Louder(Known):
    """Logits that stand in the image, three times as large where an expert of the first layer adds log 3."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for block, gain in zip(self.blocks, (math.log(3), 0.0), strict=True):
                block.mlp.router.weight *= 1e4  # so that gates are 1
                block.mlp.experts.fc2.bias.zero_()[:, -1] = gain

    def forward(self, x: Tensor) -> Tensor:
        logits = x[:, 0, : self.num_classes]
        for block in self.blocks:
            x = block(x)
        return logits * x[..., -1:].mean(dim=1).exp()


def shouted() -> list[tuple[Tensor, Tensor]]:
    x = torch.zeros(400, 3, 8)
    x[:, :, :4] = LOGITS[:, None, :4]
    labels = torch.multinomial(LOGITS[:, :4].softmax(dim=1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    return list(zip(x.split(90), labels.split(90), strict=True))


def test_a_layer_that_only_scales_logits_changes_the_loss_and_not_the_calibrated_one() -> None:
    evidence = vimoe.analyze(Louder(), shouted())
    gain, silent = evidence.layers
    shared = gain.dense["shared"]
    assert shared.loss.high < -0.2 and shared.right.value == 0 and shared.calibrated  # the model was too sure
    assert shared.calibrated.value == pytest.approx(0, abs=1e-4)
    assert shared.calibrated.temperature_before == pytest.approx(3, rel=0.15)
    assert shared.calibrated.temperature_after == pytest.approx(shared.calibrated.temperature_before / 3, abs=2e-3)
    assert gain.permuted and gain.permuted.calibrated and gain.permuted.calibrated.value == pytest.approx(0, abs=1e-4)
    assert silent.permuted and silent.permuted.calibrated and silent.permuted.calibrated.value == 0
    again = Evidence.from_dict(evidence.to_dict()).layers[0]
    assert again.dense == gain.dense and again.permuted == gain.permuted and again.experts == gain.experts
    table = str(evidence).splitlines()
    row = next(i for i, line in enumerate(table) if line.startswith("blocks.0.mlp"))
    calibrated = (gain.permuted.calibrated, gain.best_dense[1].calibrated)
    assert table[row + 1].split() == f"calibrated {calibrated[0]} {calibrated[1]}".split()
    assert f"(the untouched one has {shared.calibrated.temperature_before:.2f})" in str(evidence)
    assert evidence._repr_html_().count("<tr>") == 5


def test_removals_add_up_from_the_first_model_to_the_last() -> None:
    """The first removal rescales logits, the second does nothing; totals compare the ends."""
    model = Louder()
    done = vimoe.prune(model, vimoe.analyze(model, shouted(), draws=1), shouted(), merge_all=False, tolerance=1.0)
    assert [step.layer for step in done.steps] == ["blocks.0.mlp", "blocks.1.mlp"]
    first, second = (step.change.calibrated for step in done.steps)
    total = done.steps[-1].total
    assert first and second and total and total.calibrated and total.loss.high < -0.2
    assert second.temperature_before == first.temperature_after == total.calibrated.temperature_after
    assert total.calibrated.temperature_before == first.temperature_before > 2
    assert total.calibrated.value == pytest.approx(0, abs=1e-4)
    assert f", calibrated {total.calibrated}" in str(done) and done.to_dict()["steps"][0]["change"]["calibrated"]


def test_segmentation_has_no_calibrated_change() -> None:
    (layer,) = vimoe.analyze(known_scenes.known(), known_scenes.batches(), draws=2).layers
    effects = [layer.permuted, layer.frozen, *layer.dense.values(), *layer.experts]
    assert len(effects) > 4 and all(effect and effect.loss.value and effect.calibrated is None for effect in effects)
