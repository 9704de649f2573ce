"""Curves of a training for files and notebooks; no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vimoe.analysis.figures import _panels
from vimoe.files import printable, read_text
from vimoe.metrics.registry import shown


def curves(metrics: Path | Mapping[str, Path]) -> Figure:
    """Loss and score by epoch, from the metrics.csv of a run, or of several by name."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, path in (metrics if isinstance(metrics, Mapping) else {"validation": metrics}).items():
        rows = _csv(path)
        epochs = [int(row["epoch"]) for row in rows]
        if not isinstance(metrics, Mapping):
            loss = [float(row["train_loss"]) for row in rows]
            left.plot(epochs, loss, label="train (with its augmentation)", color="C1", marker=".")
        (line,) = left.plot(epochs, [float(row["val_loss"]) for row in rows], label=name, marker=".")
        names = shown({key.removeprefix("val_"): value for key, value in rows[0].items()})
        scores = [100 * float(row[f"val_{names.judge}"]) for row in rows]
        right.plot(epochs, scores, color=line.get_color(), marker=".")
    left.set(xlabel="epoch", ylabel="cross-entropy, nats" if isinstance(metrics, Path) else "validation loss, nats")
    right.set(xlabel="epoch", ylabel=f"{names.judge_name} on validation, %")
    for axis in (left, right):
        axis.xaxis.set_major_locator(_whole())
    lines = left.get_lines()  # all of them: by itself a legend has no name that begins with an underscore
    labels = [printable(str(line.get_label())) for line in lines]
    legend = figure.legend(lines, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _whole() -> MaxNLocator:
    """Ticks at whole epochs, also where there is but one."""
    return MaxNLocator(integer=True, min_n_ticks=1)


def loads(load: Path) -> Figure:
    """The share of each expert by epoch, one panel a layer, from load.csv."""
    rows = _csv(load)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, axes = _panels(len(layers), 1.9, 1.7, sharey=True)
    for axis, layer in zip(axes, layers, strict=True):
        mine = [row for row in rows if row["layer"] == layer]
        for expert in dict.fromkeys(row["expert"] for row in mine):
            points = [(int(row["epoch"]), 100 * float(row["share"])) for row in mine if row["expert"] == expert]
            axis.plot(*zip(*points, strict=True), lw=1, marker="." if len(points) < 3 else None)
        axis.set_title(layer, fontsize=9, parse_math=False)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(_whole())
    axes[0].set_ylim(bottom=0)  # of all, once all lines are there
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("share of an expert, %", fontsize=9)
    return figure


def _csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(read_text(path), newline="")))
