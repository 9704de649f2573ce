"""A report page from a run's files: one HTML file with its figures inside, that opens from disk. Imports no torch."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vimoe.errors import FolderError
from vimoe.runs import ROUTING, ROUTING_BEFORE, SUMMARY, write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
p, ul { max-width: 62rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { font-weight: 600; border-bottom: 2px solid #999 }
img { max-width: 100%; height: auto } figcaption, .note { color: #555; font-size: .9rem } figure { margin: 1rem 0 }
code { background: #f3f3f3; padding: 0 .2rem }
"""


class Page:
    """A page that is written from top to bottom."""

    def __init__(self, title: str, figures: Path) -> None:
        self.title, self.figures = title, figures
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Starts a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, note: bool = False) -> None:
        """Adds a paragraph."""
        self._parts.append(f"<p{' class=note' if note else ''}>{html.escape(text)}</p>")

    def items(self, lines: Iterable[str]) -> None:
        """Adds a list."""
        self._parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Adds a table; the first column is the name of the row."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        self._parts.append(f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>")

    def figure(self, figure: Figure, name: str, caption: str) -> None:
        """Adds a figure, and writes it as figures/NAME.png too."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
        plt.close(figure)
        self.figures.mkdir(exist_ok=True)
        (self.figures / f"{name}.png").write_bytes(buffer.getvalue())
        data, caption = base64.b64encode(buffer.getvalue()).decode(), html.escape(caption)
        image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
        self._parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")

    def write(self, path: Path) -> Path:
        """Writes the page whole or not at all."""
        head = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<style>{STYLE}</style></head><body><h1>{html.escape(self.title)}</h1>"
        )
        write_text(path, head + "\n".join(self._parts) + "</body></html>\n")
        return path


def write_run_report(run: Path) -> Path:
    """Writes report.html of a run from the files that are there. Raises FolderError where one of them is damaged."""
    try:
        return _run_report(run)
    except (ValueError, KeyError, TypeError, ZeroDivisionError, IndexError) as error:
        raise FolderError(f"{run}: a file of the run is damaged ({error}); restore it, or train again") from error


def _run_report(run: Path) -> Path:
    page = Page(f"vimoe run {run.resolve().name}", run / "figures")
    summary = _json(run / SUMMARY)
    if "before" in summary:
        page.heading("Pruning")
        page.table(RECEIPT_HEADER, [receipt_row(when, [summary[when]]) for when in ("before", "after")])
        page.text(f"Top-1 on {summary['before']['images']} {summary['split']} images.", note=True)
        page.items(summary["verdicts"])
    if "val" in summary:
        page.heading("Training")
        val = summary["val"]
        page.text(
            f"{summary['train_images']} images, {summary['epochs']} epochs in {summary['seconds']:.0f} s. Best on "
            f"validation in epoch {summary['best_epoch']}: top-1 {val['top1']:.2%}, loss {val['loss']:.4f}, of "
            f"{val['images']} images."
        )
    if (run / "metrics.csv").exists():
        page.figure(curves(run / "metrics.csv"), "curves", "Loss and accuracy by epoch.")
    if (run / "load.csv").exists():
        page.figure(loads(run / "load.csv"), "load", "Share of each expert in training, by epoch; one panel a layer.")
    if (run / ROUTING).exists():
        add_routing(page, _json(run / ROUTING), "Routing")
    if (run / ROUTING_BEFORE).exists():
        add_routing(page, _json(run / ROUTING_BEFORE), "Routing before pruning")
    page.heading("Settings")
    page.table(("setting", "value"), [(k, v) for k, v in _flat(run / "config.yaml")])
    return page.write(run / "report.html")


RECEIPT_HEADER = ("", "top-1, %", "loss", "parameters, M", "activated, M", "MACs, G", "images/s")


def receipt_row(name: str, receipts: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """A row under RECEIPT_HEADER; of several receipts, such as those of seeds, mean and standard deviation."""

    def cell(key: str, unit: float, form: str) -> str:
        values = [receipt[key] / unit for receipt in receipts]
        mean = form.format(statistics.fmean(values))
        return mean if len(set(values)) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"

    return (
        name, cell("top1", 0.01, "{:.2f}"), cell("loss", 1, "{:.4f}"), cell("params", 1e6, "{:.3f}"),
        cell("activated_params", 1e6, "{:.3f}"), cell("macs", 1e9, "{:.4f}"), cell("images_per_second", 1, "{:.0f}"),
    )  # fmt: skip


def add_routing(page: Page, evidence: dict[str, Any], heading: str) -> None:
    """Adds the section on routing: scores of each layer and its heatmap."""
    page.heading(heading)
    base = evidence["base"]
    page.text(
        f"Measured on {base['images']} validation images, where the model has loss {base['loss']:.4f} and top-1 "
        f"{base['top1']:.2%}. AMI is the adjusted mutual information of class and expert (0 is chance, 1 is a function "
        f"of one another). The last two columns are changes of the loss in nats: when whole routing decisions are "
        f"permuted between images, once, and when the layer is made dense: its shared expert alone, or merged experts."
    )
    rows = []
    for layer in evidence["layers"]:
        dense = layer["merged_loss_change" if layer["shared_loss_change"] is None else "shared_loss_change"]
        rows.append((
            layer["name"], f"{layer['adjusted_mutual_information']:.3f}", f"{layer['mutual_information']:.3f}",
            f"{max(layer['load']):.1%}", f"{min(layer['load']):.1%}", f"{layer['permuted_loss_change']:+.4f}",
            f"{dense:+.4f}",
        ))  # fmt: skip
    page.table(("layer", "AMI", "MI, nats", "busiest expert", "idlest", "permuted", "made dense"), rows)
    caption = (
        "P(expert | class): a row a class, rows sum to 1. All layers have the order of classes that sorts the deepest "
        "one, whose diagonal is in part made by that: trust the AMI."
    )
    page.figure(heatmaps(evidence), "heatmaps", caption)


def heatmaps(evidence: dict[str, Any]) -> Figure:
    """P(expert | class) of every layer, classes in the order of the deepest layer's favourite experts."""
    layers = evidence["layers"]
    shares = [np.array(layer["counts"], dtype=float) for layer in layers]
    shares = [share / np.maximum(share.sum(axis=1, keepdims=True), 1) for share in shares]
    order = np.lexsort((-shares[-1].max(axis=1), shares[-1].argmax(axis=1)))
    columns = min(len(layers), 6)
    rows = -(-len(layers) // columns)
    classes = evidence["classes"]
    height = min(0.25 * len(classes) + 0.8, 4.0)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.9 * columns + 1.6, height * rows), squeeze=False, layout="constrained"
    )
    for axis, layer, share in zip(axes.flat, layers, shares, strict=False):
        image = axis.imshow(share[order], aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        axis.set_title(layer["name"], fontsize=9)
        axis.set_xticks(range(share.shape[1]))
        axis.tick_params(labelsize=7)
        axis.set_yticks([])
    for axis in list(axes.flat)[len(layers) :]:
        axis.axis("off")
    if len(classes) <= 30:
        for row in axes:
            row[0].set_yticks(range(len(classes)), [classes[i] for i in order])
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel("class", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8, label="P(expert | class)")
    return figure


def curves(metrics: Path) -> Figure:
    """Loss and accuracy by epoch, from metrics.csv."""
    rows = _csv(metrics)
    epochs = [int(row["epoch"]) for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for name, label in (("train_loss", "train (with its augmentation)"), ("val_loss", "validation")):
        left.plot(epochs, [float(row[name]) for row in rows], label=label, marker=".")
    right.plot(epochs, [100 * float(row["val_top1"]) for row in rows], label="validation", color="C1", marker=".")
    left.set(xlabel="epoch", ylabel="cross-entropy, nats")
    right.set(xlabel="epoch", ylabel="top-1, %")
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend()
    return figure


def loads(load: Path) -> Figure:
    """The share of each expert by epoch, one panel a layer, from load.csv."""
    rows = _csv(load)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    columns = min(len(layers), 6)
    height = -(-len(layers) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(1.9 * columns + 0.8, 1.7 * height), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, layer in zip(axes.flat, layers, strict=False):
        mine = [row for row in rows if row["layer"] == layer]
        for expert in dict.fromkeys(row["expert"] for row in mine):
            points = [(int(row["epoch"]), 100 * float(row["share"])) for row in mine if row["expert"] == expert]
            axis.plot(*zip(*points, strict=True), lw=1, marker="." if len(points) < 3 else None)
        axis.set_title(layer, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(bottom=0)
    for axis in list(axes.flat)[len(layers) :]:
        axis.axis("off")
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("share of an expert, %", fontsize=9)
    return figure


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _flat(config: Path) -> list[tuple[str, str]]:
    import yaml

    sections = yaml.safe_load(config.read_text())
    return [(f"{section}.{name}", str(value)) for section, v in sections.items() for name, value in v.items()]
