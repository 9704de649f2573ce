"""Numbers as cells of tables."""

from __future__ import annotations

from helpers.run_folders import receipt

from vimoe.report.table_cells import receipt_row


def test_receipts_of_seeds_have_mean_and_deviation() -> None:
    row = receipt_row("arm", [receipt(0.5), receipt(0.6)])
    assert row[:3] == ("arm", "55.00 ± 7.07", "1.5000")
