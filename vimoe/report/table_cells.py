"""Numbers of a run as cells of tables: scores, receipts, and estimates with their intervals. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from vimoe.analysis.plot_data import chance_warning, zero_warning

RECEIPT_HEADER = ("", "top-1, %", "loss", "parameters, M", "activated, M", "MACs, G", "images/s")
MEASURES = {"top1": "top-1, %", "top5": "top-5, %", "miou": "mean IoU, %", "pixel_accuracy": "pixel accuracy, %"}
RECEIPTS = {"before": "before pruning", "after": "pruned", "recovered": "pruned, then trained further"}
ACCURACY = {"top1": "Top-1", "pixel_accuracy": "Pixel accuracy"}  # the accuracy that interventions change


def judged_by(score: dict[str, Any]) -> str:
    """Return the key of the score that chooses the best epoch."""
    return "top1" if "top1" in score else "miou"


def accuracy_key(score: dict[str, Any]) -> str:
    """Return the key of ACCURACY that a score has."""
    return next(key for key in ACCURACY if key in score)


def measures(score: dict[str, Any]) -> dict[str, str]:
    """Return the accuracies of a score by name, in percent; top-1 with half its 95% interval."""
    cells = {name: f"{100 * score[key]:.2f}" for key, name in MEASURES.items() if key in score}
    if "top1" in score:
        cells[MEASURES["top1"]] += f"\u00a0±\u00a0{margin(score):.2f}"
    return cells


def margin(score: dict[str, Any]) -> float:
    """Return half the 95% interval of a top-1, in percentage points, from the number of its images."""
    return 196 * float((score["top1"] * (1 - score["top1"]) / score["images"]) ** 0.5)


def receipt_header(receipt: dict[str, Any]) -> tuple[str, ...]:
    """Return the header of a table of such receipts."""
    return ("", MEASURES[judged_by(receipt)], *RECEIPT_HEADER[2:])


def receipt_row(name: str, receipts: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return one row under `receipt_header`; several receipts (of seeds) give mean ± standard deviation."""

    def cell(key: str, unit: float, form: str) -> str:
        return over_seeds([receipt[key] for receipt in receipts], unit, form)

    return (
        name, cell(judged_by(receipts[0]), 0.01, "{:.2f}"), cell("loss", 1, "{:.4f}"), cell("params", 1e6, "{:.3f}"),
        cell("activated_params", 1e6, "{:.3f}"), cell("macs", 1e9, "{:.4f}"), cell("images_per_second", 1, "{:.0f}"),
    )  # fmt: skip


def receipt_rows(summary: dict[str, Any], name: str = "") -> list[tuple[str, ...]]:
    """Return the receipts of a pruned run as rows under `receipt_header`, each labelled with the name of the run."""
    return [
        receipt_row(f"{name}, {when}" if name else when, [summary[key]])
        for key, when in RECEIPTS.items()
        if summary.get(key)
    ]


def over_seeds(values: Sequence[float], unit: float, form: str) -> str:
    """Return mean ± standard deviation of values divided by `unit`, or their one value if all are equal."""
    values = [value / unit for value in values]
    mean = form.format(statistics.fmean(values))
    return mean if len(set(values)) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"


def interval_cell(estimate: dict[str, float], form: str = "+z.4f", unit: float = 1) -> str:
    """Return an estimate divided by `unit`, with its interval on the next line."""
    value, low, high = (format(estimate[key] / unit, form) for key in ("value", "low", "high"))
    return f"{value}\n[{low},\u00a0{high}]"


def change_cell(change: dict[str, float], form: str = "+z.4f", unit: float = 1) -> str:
    """Return a change with its interval, and with a warning if the interval contains 0."""
    return f"{interval_cell(change, form, unit)}\n{zero_warning(change)}".rstrip()


def ami_cell(ami: dict[str, float]) -> str:
    """Return an adjusted mutual information with its interval, and with a warning if chance explains it."""
    return f"{interval_cell(ami, 'z.3f')}\n{chance_warning(ami)}".rstrip()


def removed(step: dict[str, Any]) -> str:
    """Return the name of the layer or expert that a step of a pruning removed."""
    return step["layer"] if step["expert"] is None else f"{step['layer']}, expert {step['expert']}"
