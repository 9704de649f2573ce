"""The page of a run in a browser: folds that open, figures in them, and tables that can be taken elsewhere."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from helpers.browser import WIDTHS, browser_page, playwright
from helpers.run_folders import analysed

from vimoe.report.run_report import write_run_report

# of a header in the narrowest column
LINES = """name => {
  Object.assign(name.closest("th").style, { display: "block", width: 0 });
  return name.getClientRects().length;
}"""


@pytest.mark.parametrize("device", WIDTHS)
def test_the_page_of_an_analysis_in_a_browser(tmp_path: Path, device: str) -> None:
    report = write_run_report(analysed(tmp_path / "run", layers=2))
    with browser_page(device) as page:
        page.goto(report.as_uri())
        assert page.locator("details.section[open]").count() == 1
        assert page.is_visible("figure img") and not page.is_visible("text=Does the routing matter?")
        page.click("nav >> text=Routing")
        playwright.expect(page.locator("text=Does the routing matter?")).to_be_visible()
        fits = "[...document.querySelectorAll('.js-plotly-plot svg')].every((svg) => svg.clientWidth > 200)"
        page.wait_for_function(fits)

        assert page.locator("th span", has_text="top-1").first.evaluate(LINES) == 1
        table = page.locator(".table:visible").nth(1)
        with page.expect_download() as download:
            table.locator("text=CSV").click()
        rows = list(csv.reader(Path(download.value.path()).read_text("utf-8-sig").splitlines()))
        shown = [
            [" ".join(cell.inner_text().split()) for cell in row.locator("th, td").all()]
            for row in table.locator("tr").all()
        ]
        assert rows == shown and len(rows) == 3  # one for each layer, below the header
        assert download.value.suggested_filename == "vimoe-run-run-2.csv"
        table.locator("text=Copy").click()
        playwright.expect(table.locator("button")).to_have_text("Copied")
