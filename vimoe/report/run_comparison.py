"""Several runs on one page, side by side, from the files in their folders. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vimoe.analysis import figures
from vimoe.analysis.statistics import over
from vimoe.metrics.registry import shown
from vimoe.report.curves import curves
from vimoe.report.html_page import Page
from vimoe.report.routing_section import interval, told, told_dependence
from vimoe.report.run_report import (
    METRICS,
    damage_named,
    measures,
    read_config,
    read_json,
    receipt_header,
    receipt_rows,
    removed,
)
from vimoe.run_folder import ROUTING, SUMMARY


@dataclass(frozen=True)
class _Row:
    """What the page shows of a run."""

    settings: dict[str, str]
    what: str
    result: str
    header: tuple[str, ...]  # of the receipts
    receipts: list[tuple[str, ...]]
    evidence: dict[str, Any]
    scores: list[tuple[str, ...]]


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Writes a page, the file `out`, of several runs. Raises FolderError where a file of one of them is damaged."""
    names = _names(runs)
    rows = {name: _read(name, run) for name, run in names.items()}
    page = Page(f"vimoe: {len(names)} runs side by side")
    _results(page, rows)
    _settings(page, {name: row.settings for name, row in rows.items()})
    _curves(page, {name: run / METRICS for name, run in names.items() if (run / METRICS).exists()})
    _routing(page, names, {name: row for name, row in rows.items() if row.evidence})
    return page.write(out)


def _read(name: str, run: Path) -> _Row:
    settings, what = read_config(run)
    with damage_named(run / SUMMARY):
        summary = read_json(run / SUMMARY)
        result = "–"
        if "steps" in summary:
            gone = "; ".join(removed(step) for step in summary["steps"])
            what += f"; then pruned of {gone or 'nothing'}"
        if "val" in summary:
            val, epoch = summary["val"], summary["best_epoch"]
            (name_of_it, value), *_ = measures(val).items()
            result = f"{name_of_it.removesuffix(', %')} {value} ({val['images']} images, epoch {epoch})"
        header = receipt_header(shown(summary["before"])) if "before" in summary else ()
        receipts = [(*row, f"{summary['before']['images']} {summary['split']}") for row in receipt_rows(summary, name)]
    with damage_named(run / ROUTING):
        evidence = read_json(run / ROUTING)
        scores = _scores(name, evidence)
    return _Row(settings, what, result, header, receipts, evidence, scores)


def _results(page: Page, rows: dict[str, _Row]) -> None:
    page.heading("Results")
    page.text(
        "A row a run. The score is that of the best epoch on the run's own validation images; a top-1 give or take "
        "what as many other images would change (95%). It does not say what another seed would give."
    )
    header = ("run", "what it is", "validation, %")
    page.table(header, [(name, row.what, row.result) for name, row in rows.items()], words=True)
    if receipts := [receipt for row in rows.values() for receipt in row.receipts]:
        page.text("Receipts of the runs that were pruned. Images/s can be compared within a run only.")
        headers = [row.header for row in rows.values() if row.header]
        judged = " or ".join(dict.fromkeys(header[1] for header in headers))
        page.table(("", judged, *headers[0][2:], "images"), receipts)


def _settings(page: Page, settings: dict[str, dict[str, str]]) -> None:
    page.heading("What differs")
    keys = list(dict.fromkeys(key for each in settings.values() for key in each))
    differing = [key for key in keys if len({each.get(key) for each in settings.values()}) > 1]
    page.text("The settings in which the runs differ; all others are the same." if differing else "No setting differs.")
    if any(key.startswith("data.") for key in differing):
        page.text("The settings of the data differ: scores may be of different images, so compare them with care.")
    if differing:
        rows = [(key, *(each.get(key, "–") for each in settings.values())) for key in differing]
        page.table(("setting", *settings), rows, words=True)


def _curves(page: Page, metrics: dict[str, Path]) -> None:
    if not metrics:
        return
    page.heading("Training")
    page.text("Loss and accuracy on each run's own validation images after each epoch; a line is one training.")
    for path in metrics.values():
        with damage_named(path):
            curves(path)
    caption = "Validation loss and score by epoch, a line a run. No intervals: one training each."
    page.figure(curves(metrics), "curves", caption)


def _routing(page: Page, names: dict[str, Path], rows: dict[str, _Row]) -> None:
    if not rows:
        return
    page.heading("Routing")
    page.text(
        "Of the runs that were analysed, a row for each run and layer, on validation images. AMI: does the expert "
        "follow the class (0 is chance, 1 is fully). Effective experts: how many are in use. The last two columns are "
        "changes of the loss in nats: when decisions are permuted between images, and when the layer is made dense by "
        "the way that costs least. In brackets 95% bootstrap intervals over images, where nothing else is said here."
    )
    known = {name: row.evidence.get("sequences") for name, row in rows.items()}
    if videos := [f"{name}: intervals {over(count)}." for name, count in known.items() if count is not None]:
        page.items(videos)
    header = ("run, layer", "images", "AMI", "p", "effective experts", "permuted", "made dense")
    page.table(header, [score for row in rows.values() for score in row.scores])
    for name, row in rows.items():
        if row.evidence["layers"]:
            page.subheading(name)
            caption = (
                f"P(expert | class) of {name}: a row a class, a column an expert. Drawn from the half of "
                f"{row.evidence['images']} validation images that did not make the order of rows and columns; each run "
                f"has its own. Shares are counts and have no interval here."
            )
            with damage_named(names[name] / ROUTING):
                page.figure(figures.heatmaps(row.evidence), "heatmaps", caption)


def _scores(name: str, evidence: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for layer in evidence.get("layers", []):
        found, permuted = layer["adjusted_mutual_information"], layer["permuted"]
        dense = [effect["loss"] for effect in layer["dense"].values()]
        rows.append((
            f"{name}\n{layer['name']}", str(evidence["images"]), told_dependence(found), f"{found['p']:.3f}",
            f"{interval(layer['effective_experts'], '.2f')} of {layer['num_experts']}",
            told(permuted["loss"]) if permuted else "–",
            told(min(dense, key=lambda change: change["value"])) if dense else "–",
        ))  # fmt: skip
    return rows


def _names(runs: Sequence[Path]) -> dict[str, Path]:
    """Runs by the names of their folders, or by their paths where two have the same name."""
    short = [run.resolve().name for run in runs]
    return {name if short.count(name) == 1 else str(run): run for name, run in zip(short, runs, strict=True)}
