"""Curves of a training by matplotlib: loss, score, and share of each expert by epoch. Imports no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vimoe.analysis.figures import panels
from vimoe.errors import FolderError
from vimoe.files import printable, read_text
from vimoe.metrics.registry import shown


def curves(metrics: Path | Mapping[str, Path]) -> Figure:
    """Draw loss and score by epoch.

    Args:
        metrics: path of the metrics.csv of one run, or those of several runs by name.
    """
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    judge = "score"
    for name, path in (metrics if isinstance(metrics, Mapping) else {"validation": metrics}).items():
        rows = _csv(path, "epoch", "train_loss")  # and others from the first validation on
        if not isinstance(metrics, Mapping):
            loss = [float(row["train_loss"]) for row in rows]
            left.plot([int(row["epoch"]) for row in rows], loss, label="train (augmented)", color="C1", marker=".")
        if not (rows := [row for row in rows if row.get("val_loss")]):  # no epoch was validated yet
            continue
        epochs = [int(row["epoch"]) for row in rows]
        (line,) = left.plot(epochs, [float(row["val_loss"]) for row in rows], label=name, marker=".")
        score = shown({key.removeprefix("val_"): value for key, value in rows[0].items()})
        shares = [100 * float(row[f"val_{score.judge}"]) for row in rows]
        right.plot(epochs, shares, color=line.get_color(), marker=".")
        judge = score.judge_name
    left.set(xlabel="epoch", ylabel="cross-entropy, nats" if isinstance(metrics, Path) else "validation loss, nats")
    right.set(xlabel="epoch", ylabel=f"{judge} on validation, %")
    for axis in (left, right):
        axis.xaxis.set_major_locator(_whole_epochs())
    lines = left.get_lines()  # named here: matplotlib leaves names that begin with an underscore out of a legend
    names = [printable(str(line.get_label())) for line in lines]
    legend = figure.legend(lines, names, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _whole_epochs() -> MaxNLocator:
    """Return a locator of ticks at whole epochs, also for a single epoch."""
    return MaxNLocator(integer=True, min_n_ticks=1)


def loads(load: Path) -> Figure:
    """Draw the share of each expert by epoch from load.csv, with one panel for each layer."""
    rows = _csv(load, "epoch", "layer", "expert", "share")
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, axes = panels(len(layers), 1.9, 1.7, sharey=True)
    for axis, layer in zip(axes, layers, strict=True):
        own_rows = [row for row in rows if row["layer"] == layer]
        for expert in dict.fromkeys(row["expert"] for row in own_rows):
            points = [(int(row["epoch"]), 100 * float(row["share"])) for row in own_rows if row["expert"] == expert]
            axis.plot(*zip(*points, strict=True), lw=1, marker="." if len(points) < 3 else None)
        axis.set_title(layer, fontsize=9, parse_math=False)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(_whole_epochs())
    axes[0].set_ylim(bottom=0)  # for all panels, which share this axis; after the lines, which set the top
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("share of an expert, %", fontsize=9)
    return figure


def _csv(path: Path, *columns: str) -> list[dict[str, str]]:
    """Return the rows of a file of a training. Raises FolderError if it lacks one of these columns."""
    table = csv.DictReader(io.StringIO(read_text(path), newline=""))
    if missing := [name for name in columns if name not in (table.fieldnames or ())]:
        raise FolderError(f"{path} has no column {missing[0]!r}: expected what the training wrote; restore it")
    return list(table)
