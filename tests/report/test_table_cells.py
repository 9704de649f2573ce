"""Numbers as cells of tables."""

from __future__ import annotations

from helpers.run_folders import receipt

from vimoe.report.table_cells import measures, receipt_row


def test_the_calibration_error_of_a_classifier_is_shown_where_it_is_known() -> None:
    old = {"top1": 0.5, "top5": 0.75, "loss": 1.5, "images": 100}
    known = {"top-1, %": "50.00\u00a0±\u00a09.80", "top-5, %": "75.00"}
    assert measures(old) == measures({**old, "ece": None}) == known
    assert measures({**old, "ece": 0.03125}) == {**known, "calibration error, %": "3.12"}


def test_receipts_of_seeds_have_mean_and_deviation() -> None:
    row = receipt_row("arm", [receipt(0.5), receipt(0.6)])
    assert row[:3] == ("arm", "55.00 ± 7.07", "1.5000")
