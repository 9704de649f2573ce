"""Calibration error against torchmetrics and by hand; the temperature of logits that are made with one."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import shared_analysis
from helpers.processes import run
from helpers.tiny import vit
from torch import Tensor

from vimoe.errors import DataError, VimoeError
from vimoe.metrics.calibration import BINS, TEMPERATURES, KeptLogits, calibration_gaps, fit_temperature
from vimoe.metrics.classification import ClassificationMetric, ImageCounts


def drawn(images: int, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of 5 classes, and labels drawn from the probabilities that the logits times 1 / scale give."""
    chance = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, 5, generator=chance)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=chance)[:, 0]
    return scale * logits, labels


def ece(logits: Tensor, labels: Tensor, batch: int = 1000) -> float:
    counts = ImageCounts()
    for each in zip(logits.split(batch), labels.split(batch), strict=True):
        counts.add(*each)
    found = counts.score().ece
    assert found is not None
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_torchmetrics_agrees_whatever_the_batches_are(seed: int, scale: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchmetrics' own imports
        metrics = pytest.importorskip("torchmetrics.classification", reason="torchmetrics is not installed")
    logits, labels = drawn(300, scale, seed)
    reference = metrics.MulticlassCalibrationError(num_classes=5, n_bins=BINS, norm="l1")
    expected = float(reference(logits, labels))
    assert expected > 0.01
    for batch in (7, 300):
        assert ece(logits, labels, batch) == pytest.approx(expected, abs=1e-6)


def test_a_bin_has_its_upper_end_and_the_first_one_0() -> None:
    """Two images in the fifth bin, (4/15, 5/15], of which one is right; one each in the first, sixth and last."""
    confidence = torch.tensor([5 / 15, 4.5 / 15, 0.0, 5.5 / 15, 1.0], dtype=torch.float64)
    gaps = calibration_gaps(confidence, torch.tensor([True, False, False, True, True]))
    expected = torch.zeros(BINS, dtype=torch.float64)
    expected[4], expected[5] = 1 - 9.5 / 15, 1 - 5.5 / 15
    torch.testing.assert_close(gaps, expected, rtol=0, atol=1e-12)


def test_images_that_are_too_sure_and_too_unsure_in_one_bin_cancel_out_and_in_two_do_not() -> None:
    even = torch.tensor([[math.log(0.75 / 0.25), 0.0]]).expand(4, 2)
    assert ece(even, torch.tensor([0, 0, 0, 1])) == pytest.approx(0, abs=1e-6)
    assert ece(even, torch.tensor([0, 0, 0, 0])) == pytest.approx(0.25)
    uneven = torch.cat([even[:2], 9 * even[:2]])  # 0.75 and wrong each second time, 1.0 and right
    assert ece(uneven, torch.tensor([0, 1, 0, 0])) == pytest.approx(0.125, abs=1e-4)


def test_labels_that_follow_the_probabilities_are_calibrated_at_temperature_1() -> None:
    logits, labels = drawn(40_000)
    assert ece(logits, labels) < 0.01 < 0.1 < ece(3 * logits, labels)
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.02)


def test_the_temperature_undoes_a_scale_and_nothing_else() -> None:
    logits, labels = drawn(5000)
    plain, scaled = fit_temperature(logits, labels), fit_temperature(3 * logits, labels)
    assert plain == pytest.approx(1, abs=0.1) and scaled == pytest.approx(3 * plain, rel=1e-4)
    for before, T in ((logits, plain), (3 * logits, scaled)):
        loss, slope = (F.cross_entropy(before.double() / t, labels) for t in (T, 1.01 * T))
        assert loss < slope and loss < F.cross_entropy(before.double() / (0.99 * T), labels)


def test_processes_fit_the_temperature_of_all_images_together() -> None:
    logits, labels = drawn(500, scale=2)
    fitted = fit_temperature(logits, labels)
    for parts in ([slice(0, 180), slice(180, 500)], [slice(0, 500), slice(0, 0)]):  # one has no image
        assert run(shared_analysis.temperature, 2, logits, labels, parts) == pytest.approx([fitted] * 2, rel=1e-6)
    assert abs(fit_temperature(logits[:180], labels[:180]) - fitted) > 1e-3


def test_images_that_are_all_right_give_no_temperature_and_all_wrong_the_highest() -> None:
    logits = torch.eye(4)
    assert fit_temperature(logits, torch.arange(4)) is None
    assert fit_temperature(logits, torch.tensor([0, 1, 2, 2])) is not None
    assert fit_temperature(logits, torch.arange(4).roll(1)) == pytest.approx(TEMPERATURES[1], rel=1e-3)


def test_kept_logits_score_as_the_metric_does_and_at_another_temperature() -> None:
    metric, (logits, labels) = ClassificationMetric(vit()), drawn(100)
    kept, plain = KeptLogits(metric), metric.counts()
    for each in (slice(0, 64), slice(64, 100)):
        kept.add(logits[each], labels[each])
        plain.add(logits[each], labels[each])
    score = plain.score()
    assert kept.score() == score and kept.temperature() == fit_temperature(logits, labels)
    assert kept.at(1.0) == {"temperature": 1, "loss_at_temperature": score.loss, "ece_at_temperature": score.ece}
    assert kept.at(2.5) == {
        "temperature": 2.5,
        "loss_at_temperature": pytest.approx(float(F.cross_entropy(logits / 2.5, labels))),
        "ece_at_temperature": pytest.approx(ece(logits / 2.5, labels)),
    }


def test_what_no_temperature_fits_is_told_in_one_line() -> None:
    logits, labels = drawn(4)
    empty = KeptLogits(ClassificationMetric(vit()))
    cases = {
        "0 images to fit a temperature on: expected at least one": empty.temperature,
        "gives the label 5: expected 0 to 4": lambda: fit_temperature(logits, torch.tensor([0, 1, 5, 2])),
        "gives the label -1: expected 0 to 4": lambda: fit_temperature(logits, torch.tensor([0, -1, 4, 2])),
        r"labels of torch.int64 and shape \(4, 1\) for 4 images": lambda: fit_temperature(logits, labels[:, None]),
    }
    for message, fit in cases.items():
        with pytest.raises(DataError, match=message) as error:
            fit()
        assert "\n" not in str(error.value)
    with pytest.raises(VimoeError, match="the loss on validation is nan: expected a model whose outputs are finite"):
        fit_temperature(logits * math.nan, labels)


def test_outputs_that_are_not_finite_give_an_error_that_is_not_finite() -> None:
    logits, labels = drawn(4)
    assert math.isnan(ece(torch.cat([logits[:2], logits[2:] * math.nan]), labels))
