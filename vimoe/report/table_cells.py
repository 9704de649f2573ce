"""Numbers of a run as cells of tables: scores, receipts, and estimates with their intervals. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from vimoe.analysis.plot_data import chance_warning, zero_warning
from vimoe.metrics.registry import Shown, shown

COSTS = ("loss", "parameters, M", "activated, M", "MACs, G", "images/s")  # columns of a receipt after its score
RECEIPTS = {"before": "before pruning", "after": "pruned", "recovered": "pruned, then trained further"}


def measures(score: dict[str, Any]) -> dict[str, str]:
    """Return the shares of a score by name, in percent; the first with half its 95% interval if it has one.

    Files of an older version lack some.
    """
    names = shown(score)
    cells = {
        f"{name}, %": f"{100 * score[key]:.2f}" for key, name in names.shares.items() if score.get(key) is not None
    }
    if (half := margin(score)) is not None:
        cells[f"{names.judge_name}, %"] += f"\u00a0±\u00a0{half:.2f}"
    return cells


def margin(score: dict[str, Any]) -> float | None:
    """Return half the 95% interval, in percentage points, of a share of so many images; None for another share.

    The interval is Wilson's, which has a width where all images are right, too.
    """
    names = shown(score)
    if not names.counts_images:
        return None
    share, images, z = score[names.judge], score["images"], 1.96
    return 100 * z * math.sqrt(share * (1 - share) / images + (z / images) ** 2 / 4) / (1 + z**2 / images)


def receipt_header(names: Shown) -> tuple[str, ...]:
    """Return the header of a table of receipts whose scores have these names."""
    return ("", f"{names.judge_name}, %", *COSTS)


def receipt_row(name: str, receipts: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return one row under `receipt_header`; several receipts (of seeds) give mean ± standard deviation."""

    def cell(key: str, unit: float, form: str) -> str:
        return over_seeds([receipt[key] for receipt in receipts], unit, form)

    return (
        name, cell(shown(receipts[0]).judge, 0.01, "{:.2f}"), cell("loss", 1, "{:.4f}"), cell("params", 1e6, "{:.3f}"),
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
