"""Page that compares several runs, from the files in their folders. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vimoe.analysis import figures
from vimoe.analysis.intervals import over
from vimoe.errors import FolderError, counted
from vimoe.metrics.registry import shown
from vimoe.report.curves import curves
from vimoe.report.html_page import Page
from vimoe.report.run_files import METRICS, read_config, read_json, read_summary, reading
from vimoe.report.table_cells import (
    ami_cell,
    change_cell,
    interval_cell,
    measures,
    receipt_header,
    receipt_rows,
    removed,
)
from vimoe.run_folder import ROUTING, SUMMARY


@dataclass(frozen=True)
class _Run:
    """Contents of a run's folder that the page shows."""

    settings: dict[str, str]  # by flag
    model: str  # description in words
    result: str  # validation score in words
    header: tuple[str, ...]  # of the receipts
    receipts: list[tuple[str, ...]]
    evidence: dict[str, Any]  # content of routing.json
    routing: list[tuple[str, ...]]  # table rows, one for each MoE layer


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write a page that compares several runs to the file `out`, and return its path.

    Raises:
        FolderError: if `out` exists already, a folder has no config.yaml, or a file in it is damaged.
    """
    if out.exists():
        raise FolderError(f"{out} already exists: expected a new file; name another one")
    folders = _by_name(runs)
    read = {name: _read(name, folder) for name, folder in folders.items()}
    page = Page(f"vimoe: comparison of {len(folders)} runs")
    _results(page, read)
    _curves(page, {name: folder / METRICS for name, folder in folders.items() if (folder / METRICS).exists()})
    _settings(page, {name: run.settings for name, run in read.items()})
    _routing(page, folders, {name: run for name, run in read.items() if run.evidence})
    return page.write(out)


def _read(name: str, folder: Path) -> _Run:
    settings, model = read_config(folder)
    with reading(folder / SUMMARY):
        summary = read_summary(folder)
        result = "–"
        if "steps" in summary:
            gone = "; ".join(removed(step) for step in summary["steps"])
            model += f"; pruning removed {gone or 'nothing'}"
        if "val" in summary:
            val, epoch = summary["val"], summary["best_epoch"]
            (measure, value), *_ = measures(val).items()
            result = f"{measure.removesuffix(', %')} {value} ({counted(val['images'], 'image')}, epoch {epoch})"
        header = receipt_header(shown(summary["before"])) if "before" in summary else ()
        receipts = [(*row, f"{summary['before']['images']} {summary['split']}") for row in receipt_rows(summary, name)]
    with reading(folder / ROUTING):
        evidence = read_json(folder / ROUTING)
        routing = _routing_rows(name, evidence) if evidence else []
    return _Run(settings, model, result, header, receipts, evidence, routing)


def _results(page: Page, runs: dict[str, _Run]) -> None:
    page.heading("Results")
    words = "Each row is one run, with the score of its best epoch on its own validation images."
    if any("top-1" in run.result for run in runs.values()):
        words += " The margin of a top-1 (95%) covers another sample of as many images, not another seed."
    page.text(words)
    header = ("run", "model", "validation, %")
    page.table(header, [(name, run.model, run.result) for name, run in runs.items()], words=True)
    if receipts := [receipt for run in runs.values() for receipt in run.receipts]:
        page.text("Score and cost of the pruned runs, before and after. Compare images/s only within a run.")
        headers = [run.header for run in runs.values() if run.header]
        judged = " or ".join(dict.fromkeys(header[1] for header in headers))
        page.table(("", judged, *headers[0][2:], "images"), receipts)


def _settings(page: Page, settings: dict[str, dict[str, str]]) -> None:
    page.heading("Settings that differ")
    keys = list(dict.fromkeys(key for each in settings.values() for key in each))
    differing = [key for key in keys if len({each.get(key) for each in settings.values()}) > 1]
    page.text("All other settings are the same." if differing else "No setting differs.")
    if any(key.startswith("data.") for key in differing):
        page.text("Settings of the data differ, so the scores may be from different images. Compare them with care.")
    if differing:
        rows = [(key, *(each.get(key, "–") for each in settings.values())) for key in differing]
        page.table(("setting", *settings), rows, words=True)


def _curves(page: Page, metrics: dict[str, Path]) -> None:
    if not metrics:
        return
    for path in metrics.values():
        with reading(path):
            curves(path)
    caption = (
        "Loss and score by epoch on each run's own validation images, one line for each run. Each is one training, so "
        "there are no intervals."
    )
    page.figure(curves(metrics), "curves", caption)


def _routing(page: Page, folders: dict[str, Path], runs: dict[str, _Run]) -> None:
    if not runs:
        return
    page.heading("Routing")
    page.text(
        "One row for each layer of each run that was analysed, on validation images. AMI says how far the expert "
        "depends on the class (0 at chance level, 1 fully). Effective experts is the number of experts in use. The "
        "last two columns are changes of the loss in nats: if images exchange their routing decisions, and if the "
        "layer becomes dense by its cheapest replacement. Brackets hold 95% bootstrap intervals over images, unless a "
        "line below says otherwise."
    )
    sequences = {name: run.evidence.get("sequences") for name, run in runs.items()}
    if videos := [f"{name}: intervals {over(count)}." for name, count in sequences.items() if count is not None]:
        page.items(videos)
    header = ("run, layer", "images", "AMI", "p", "effective experts", "permuted", "dense")
    page.table(header, [row for run in runs.values() for row in run.routing])
    for name, run in runs.items():
        if run.evidence["layers"]:
            page.subheading(name)
            caption = (
                f"P(expert | class) of {name}: each row is a class, each column an expert. Rows and columns were "
                f"ordered on one half of {run.evidence['images']} validation images, separately for each run; the "
                f"heatmap shows the other half. These are counts, so there are no intervals."
            )
            with reading(folders[name] / ROUTING):
                page.figure(figures.heatmaps(run.evidence), "heatmaps", caption)


def _routing_rows(name: str, evidence: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for layer in evidence["layers"]:
        ami, permuted = layer["adjusted_mutual_information"], layer["permuted"]
        dense = [effect["loss"] for effect in layer["dense"].values()]
        rows.append((
            f"{name}\n{layer['name']}", str(evidence["images"]), ami_cell(ami), f"{ami['p']:.3f}",
            f"{interval_cell(layer['effective_experts'], '.2f')} of {layer['num_experts']}",
            change_cell(permuted["loss"]) if permuted else "–",
            change_cell(min(dense, key=lambda change: change["value"])) if dense else "–",
        ))  # fmt: skip
    return rows


def _by_name(runs: Sequence[Path]) -> dict[str, Path]:
    """Return runs by the names of their folders, or by their paths if two folders have the same name."""
    short = [run.resolve().name for run in runs]
    return {name if short.count(name) == 1 else str(run): run for name, run in zip(short, runs, strict=True)}
