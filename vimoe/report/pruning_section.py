"""Parts of a pruned run's page: score and cost before and after, removals, and layers that were kept. No torch."""

from __future__ import annotations

from typing import Any

from vimoe.analysis.intervals import over
from vimoe.analysis.plot_data import INTERVENTIONS
from vimoe.metrics.registry import shown
from vimoe.report.html_page import Page
from vimoe.report.table_cells import change_cell, margin, receipt_header, receipt_rows, removed
from vimoe.report.training_section import epochs

REPLACEMENTS = {kind: name.removeprefix("dense: ") for kind, name in INTERVENTIONS.items()} | {
    "dropped": "other experts"
}


def add_receipt(page: Page, model: str, data: str, summary: dict[str, Any]) -> None:
    """Add score and cost before and after a pruning, and which layers it removed and kept.

    Args:
        page: page to add to.
        model: description of the model that was pruned.
        data: path of the data.
        summary: content of summary.json.
    """
    before, steps = summary["before"], summary["steps"]
    page.table(receipt_header(shown(before)), receipt_rows(summary))
    merged = "tolerance" in summary and summary["tolerance"] is None
    done = (
        "Every MoE layer was made dense, as the mean of its experts by the gates that they got on validation images"
        if merged
        else "MoE layers and experts were removed as long as their removal cost little on validation images"
    )
    gone, left = "; ".join(removed(step) for step in steps), ", ".join(summary["after"]["moe_layers"])
    page.text(
        f"This run was pruned from a trained model: {model}. The data is {data}. {done}. Removed: {gone or 'nothing'}. "
        f"MoE layers that were kept: {left or 'none, so the pruned model is dense'}."
    )
    sentences = [
        f"All rows are scores of the same {before['images']} {summary['split']} images. Activated parameters are the "
        f"parameters that one image uses. MACs are multiply-adds for one image. Images/s was measured on the machine "
        f"that pruned."
    ]
    if features := summary.get("features"):
        sentences.append(f"Scores were computed from their features before {features['before']}, rounded to float16.")
    if (half := margin(before)) is not None:
        sentences.append(
            f"For this number of images the 95% margin of a {shown(before).judge_name} is ± {half:.2f} points; the "
            f"margin of a difference on the same images is usually smaller."
        )
    if summary.get("recovered"):
        further = epochs(summary["recovery_epochs"], "further ")
        sentences.append(f"The last row is the pruned model after {further} of training.")
    page.text(" ".join(sentences), note=True)


def add_decisions(page: Page, summary: dict[str, Any]) -> None:
    """Add the section on the removals of a pruning, and on the layers that were kept, from summary.json."""
    accuracy = shown(summary["before"]).right_name
    page.heading("Pruning decisions")
    _add_removals(page, summary, accuracy)
    if summary["kept"]:
        _add_kept_layers(page, summary["kept"], accuracy)
    left = summary["after"]["moe_layers"]
    if others := [name for name in left if name not in {layer["layer"] for layer in summary["kept"]}]:
        page.text(
            f"No method makes these MoE layers dense, so they stay: {', '.join(others)}. They have no shared expert, "
            f"and experts that are no FFNs."
        )


def _add_removals(page: Page, summary: dict[str, Any], accuracy: str) -> None:
    tolerance, steps = summary["tolerance"], summary["steps"]
    rule = (
        "Every layer was made dense, whatever it costs."
        if tolerance is None
        else f"A layer or expert is removed if the upper end of the interval is at most the tolerance of {tolerance} "
        f"nats. Experts have the numbers that they had before pruning."
    )
    page.text(
        f"Each row is one removal, in order. The change is the difference in validation loss from the previous step; "
        f"the total is the difference from the unpruned model. Brackets hold 95% bootstrap intervals "
        f"{over(summary.get('sequences'))}. {rule}"
    )
    if not steps:
        page.text("Nothing was removed: no removal was certain to cost at most the tolerance.")
        return
    head = ["removed", "replaced by", "change, nats", "total, nats", f"total {accuracy}, points"]
    rows = [
        [
            f"{i}. {removed(step)}", REPLACEMENTS.get(step["how"], step["how"]), change_cell(step["change"]["loss"]),
            *_total_cells(step["total"]),
        ]
        for i, step in enumerate(steps, start=1)
    ]  # fmt: skip
    if calibrated := [each for step in steps if (each := (step["total"] or {}).get("calibrated"))]:
        page.text("The calibrated total is that of the loss at the temperature that fits each model best.")
        head.append("total calibrated, nats")
        for row, each in zip(rows, calibrated, strict=True):
            row.append(change_cell(each))
    page.table(head, rows)


def _add_kept_layers(page: Page, kept: list[dict[str, Any]], accuracy: str) -> None:
    page.subheading("Layers that were kept")
    page.text(
        "For each MoE layer that was kept, the table shows the change on validation if the pruned model lost it too, "
        "with its cheapest dense replacement. The upper ends of these intervals are above the tolerance. If an "
        "interval contains 0, there are too few images to say whether the layer is needed."
    )
    page.table(
        ("layer", "experts left", "cheapest replacement", "loss, nats", f"{accuracy}, points"),
        [
            (
                layer["layer"], str(layer["experts"]), REPLACEMENTS.get(layer["how"], layer["how"]),
                change_cell(layer["change"]["loss"]), change_cell(layer["change"]["right"], "+z.2f", 0.01),
            )
            for layer in kept
        ],
    )  # fmt: skip


def _total_cells(total: dict[str, Any] | None) -> tuple[str, str]:
    """Return the cells of the total change of loss and accuracy; dashes if it was not measured."""
    return (change_cell(total["loss"]), change_cell(total["right"], "+z.2f", 0.01)) if total else ("–", "–")
