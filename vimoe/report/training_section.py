"""Parts of a run's page about its training: score, model, data, loss curves, loads. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vimoe.metrics.registry import shown
from vimoe.report.curves import curves, loads
from vimoe.report.html_page import Page
from vimoe.report.table_cells import measures
from vimoe.run_folder import SUMMARY

ALARMS = 6  # most that the page lists


def add_score(page: Page, model: str, data: str, summary: dict[str, Any]) -> None:
    """Add the score of a training, what was trained, and which weights were kept.

    Args:
        page: page to add to.
        model: description of the model in words.
        data: path of the data.
        summary: content of summary.json; without a training's result there is only a sentence.
    """
    if "val" not in summary:
        page.text(f"The model is {model}. The data is {data}. There is no {SUMMARY}, so no result can be shown.")
        return
    val = summary["val"]
    names, accuracies = shown(val), measures(val)
    header = ("", "images", *accuracies, "loss")
    page.table(header, [("validation", str(val["images"]), *accuracies.values(), f"{val['loss']:.4f}")])
    early = ", and stopped early because the score no longer improved" if summary.get("stopped_early") else ""
    tasks = f", in {len(summary['tasks']['trained'])} tasks one after the other," if "tasks" in summary else ""
    page.text(
        f"The model is {model}. It was trained on {summary['train_images']} images of {data}{tasks} for "
        f"{epochs(summary['epochs'])} in {summary['seconds']:.0f} s{early}. {_kept(summary)}"
    )
    margins = "± is the 95% margin for this number of images. " if names.counts_images else ""
    page.text(
        f"{margins}The scores are slightly optimistic, because they chose the epoch. vimoe evaluate scores the test "
        f"images, which decided nothing.",
        note=True,
    )
    if alarms := summary.get("alarms"):
        count = f"{len(alarms)} alarms. The last are" if len(alarms) > 1 else "an alarm"
        page.text(f"Training raised {count}:")
        page.items(alarms[-ALARMS:])


def add_curves(page: Page, metrics: Path, summary: dict[str, Any]) -> None:
    """Add the figure of metrics.csv: loss and score by epoch."""
    images = summary["val"]["images"] if "val" in summary else summary.get("validation_images", "the run's")
    page.figure(
        curves(metrics),
        "curves",
        f"Loss and score by epoch. Lower is better on the left, higher on the right. If the training loss keeps "
        f"falling while the validation loss does not, the model overfits. Validation has {images} images. This is one "
        f"training, so there is no interval.",
    )


def add_loads(page: Page, load: Path) -> None:
    """Add the figure of load.csv: the share of each expert by epoch."""
    page.figure(
        loads(load),
        "load",
        "Share of the training images (or tokens) that each expert received, by epoch: one panel for each layer, one "
        "line for each expert. In a balanced layer all lines are equal; an expert with a line at 0 is idle. These are "
        "counts, so there is no interval.",
    )


def epochs(number: int, which: str = "") -> str:
    """Return a number of epochs in words, such as "3 further epochs"."""
    return f"{number} {which}epoch{'s' * (number != 1)}"


def add_details(page: Page, summary: dict[str, Any]) -> None:
    """Add what else is known of a training: its stages, cached features, fused experts and score by class."""
    val = summary["val"]
    names = shown(val)
    if stages := summary.get("stages"):
        parts = ", ".join(f"{stage['train_only']} ({epochs(stage['epochs'])})" for stage in stages)
        page.text(f"One part was trained after the other: {parts}. Epochs are counted on; the best one is of the last.")
    if features := summary.get("features"):
        views = f"{features['views']} augmented view{'s' * (features['views'] != 1)}"
        page.text(
            f"The trunk before {features['before']} was frozen. Its features for {views} of each training image and "
            f"for validation were computed once and used in place of the images: {features['bytes'] / 1e9:.2f} GB, "
            f"{features['seconds']:.0f} s in addition to the time above (0 s if an earlier run had left them).",
            note=True,
        )
    if fused := summary.get("fused"):
        page.text(
            "The experts of each layer were fused into one FFN, so the model is dense. Every score is one of the dense "
            "model. The spread is the distance of the experts from their fused weights, relative to the norm of these: "
            "near 0, the experts were one.",
            note=True,
        )
        page.table(
            ("layer", "shares of its experts", "spread"),
            [(name, ", ".join(f"{share:.3f}" for share in row["shares"]), f"{row['spread']:.4f}")
             for name, row in fused.items()],
        )  # fmt: skip
    for key, sentence in names.limits.items():
        if key in summary:
            page.text(sentence.format(f"{100 * summary[key]:.2f}"), note=True)
    if names.by_class and "classes" in summary:
        _add_class_scores(page, names.by_class[1], val[names.by_class[0]], summary["classes"])
    if frozen := summary.get("router_freeze"):
        layers = ", ".join(f"{layer} (after epoch {epoch})" for layer, epoch in frozen.items())
        page.text(f"Routers that did not change any more to the end: {layers}.", note=True)


def _kept(summary: dict[str, Any]) -> str:
    """Return a sentence on the epochs whose weights were kept."""
    if "tasks" in summary:
        best = ", ".join(str(task["best_epoch"]) for task in summary["tasks"]["trained"])
        return f"Each task kept its epoch with the best score on its own validation images: {best}."
    images = summary["val"]["images"]
    return f"Epoch {summary['best_epoch']} had the best score on the {images} validation images; its weights were kept."


def _add_class_scores(page: Page, name: str, shares: list[float | None], classes: list[str]) -> None:
    rows = [(each, "–" if share is None else f"{100 * share:.2f}") for each, share in zip(classes, shares, strict=True)]
    page.table(("class", f"{name} on validation, %"), sorted(rows, key=lambda row: row[1] == "–"))
