"""A page is self-contained and escapes all that it is given."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from urllib.parse import unquote

from helpers.found import evidence
from helpers.pages import Reader
from helpers.run_folders import trained

from vimoe.analysis import figures
from vimoe.report import plotly_figures
from vimoe.report.html_page import Page
from vimoe.report.run_report import write_run_report

NASTY = "</script><script>alert(1)</script>"


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    found = evidence(layers=2)
    found["classes"][0] = found["layers"][1]["name"] = NASTY
    page = Page("a <b> run", tmp_path / "figures")
    for add in (page.heading, page.subheading, page.text, lambda text: page.items([text])):
        add(NASTY)
    page.table([NASTY], [])
    page.table(("layer", "AMI"), [(NASTY, "0.5\n[0.4, 0.6]")], folded=NASTY)
    page.plotly_figure(plotly_figures.heatmaps(found), NASTY)
    page.plotly_figure(plotly_figures.effects(found), 'a "caption"', figures.effects(found), "effects")
    page.figure(figures.heatmaps(found), "heatmaps", 'P("e" | c)')
    page.image(tmp_path / "figures" / "heatmaps.png", '">' + NASTY)
    read = Reader(page.write(tmp_path / "report.html"))
    assert not any(script.strip().startswith("alert") for script in read.scripts)
    assert len(read.scripts) == 1 + 2 + 1  # plotly once, two figures, the page's own
    assert read.loaded and all(link.startswith(("data:", "#section-")) for link in read.loaded)
    assert (
        read.text.count("alert(1)") == 10 and "<title>a &lt;b&gt; run</title>" in (tmp_path / "report.html").read_text()
    )
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"effects.png", "heatmaps.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "figures"}


def test_labels_of_plotly_are_escaped_too() -> None:
    found = evidence(layers=1)
    found["classes"] = [NASTY] * 10
    found["layers"][0]["name"] = NASTY
    for plot in (plotly_figures.heatmaps(found), plotly_figures.effects(found), plotly_figures.expert_effects(found)):
        assert "<script" not in json.dumps(plot.to_plotly_json(), default=lambda array: array.tolist())


def test_a_page_without_interactive_figures_is_small(tmp_path: Path) -> None:
    page = write_run_report(trained(tmp_path / "run"))
    (script,) = Reader(page).scripts
    assert len(script) < 2000 and page.stat().st_size < 10**6


def test_the_first_section_is_open_and_the_others_are_folded(tmp_path: Path) -> None:
    page = Page("run")
    for name in ("first", "second", "third"):
        page.heading(name)
        page.text(f"text of the {name}")
    text = page.write(tmp_path / "report.html").read_text()
    folds = re.findall(r"<details class=section( open)?><summary><h2>(\w+)</h2></summary>(.*?)</details>", text, re.S)
    assert [(name, bool(state)) for state, name, _ in folds] == [("first", True), ("second", False), ("third", False)]
    assert all(
        f"text of the {name}" in body and f'id="section-{i}"' in body for i, (_, name, body) in enumerate(folds, 1)
    )


def test_a_table_holds_itself_as_csv(tmp_path: Path) -> None:
    page = Page("vimoe run <a>/b")
    header, rows = ("layer", "AMI, nats"), [(NASTY, "0.5\n[0.4,\u00a00.6]"), ('a "b"', "\u00b1 1"), ("", "\u2013")]
    page.table(("one",), [("1",)])
    page.table(header, rows)
    _, link = [link for link in Reader(page.write(tmp_path / "report.html")).loaded if link.startswith("data:text/csv")]
    assert f'download="vimoe-run-a-b-2.csv" href="{link}"' in (tmp_path / "report.html").read_text()
    content = unquote(link.removeprefix("data:text/csv;charset=utf-8,"))
    assert content.startswith("\ufeff")
    read = list(csv.reader(io.StringIO(content.removeprefix("\ufeff"), newline="")))
    assert read == [list(header), [NASTY, "0.5 [0.4, 0.6]"], ['a "b"', "\u00b1 1"], ["", "\u2013"]]
