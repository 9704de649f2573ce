"""Numbers as cells of tables."""

from __future__ import annotations

import pytest
from helpers.run_folders import receipt
from scipy import stats

from vimoe.report.table_cells import margin, measures, receipt_row


def test_the_calibration_error_of_a_classifier_is_shown_where_it_is_known() -> None:
    old = {"top1": 0.5, "top5": 0.75, "loss": 1.5, "images": 100}
    known = {"top-1, %": "50.00\u00a0±\u00a09.62", "top-5, %": "75.00"}
    assert measures(old) == measures({**old, "ece": None}) == known
    assert measures({**old, "ece": 0.03125}) == {**known, "calibration error, %": "3.12"}


def test_the_interval_of_a_share_is_wilsons_and_never_empty() -> None:
    for right in (0, 1, 50, 100):
        interval = stats.binomtest(right, 100).proportion_ci(0.95, method="wilson")
        half = margin({"top1": right / 100, "top5": 1.0, "loss": 1.5, "images": 100})
        assert half == pytest.approx(50 * (interval.high - interval.low), rel=1e-3) and half > 1


def test_receipts_of_seeds_have_mean_and_deviation() -> None:
    row = receipt_row("arm", [receipt(0.5), receipt(0.6)])
    assert row[:3] == ("arm", "55.00 ± 7.07", "1.5000")
