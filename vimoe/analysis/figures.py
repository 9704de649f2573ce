"""Figures of a run, by matplotlib, from the plain contents of its files: for PNGs and for notebooks. Imports no torch.

Figures are made without pyplot: a notebook keeps its backend, and nothing has to be closed. Names are shown as they
are: matplotlib would read what is between two dollar signs as mathematics.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vimoe.files import printable

CHANCE = 0.05  # a p above it is no evidence


COLOURS = ("#1f77b4", "#d95f02", "#2a8a3e", "#c2242c", "#6f4fa8")


LABELLED = 30  # classes whose names fit beside a heatmap


INTERVENTIONS = {
    "permuted": "permuted between images",
    "frozen": "the same for every image",
    "shared": "dense: shared expert alone",
    "merge": "dense: experts averaged",
    "matched": "dense: experts matched, then averaged",
}


class Dot(NamedTuple):
    """An estimate with its interval at height y, what it is, and in words if it may be nothing."""

    y: float
    change: dict[str, float]
    label: str
    doubt: str


def shares(evidence: dict[str, Any], layer: dict[str, Any]) -> np.ndarray:
    """P(expert | class) of a layer in the picture's order; NaN for a class that none of the drawn images is of."""
    drawn = drawn_counts(evidence, layer).astype(float)
    total = drawn.sum(axis=1, keepdims=True)
    return np.divide(drawn, total, out=np.full_like(drawn, np.nan), where=total > 0)


def drawn_counts(evidence: dict[str, Any], layer: dict[str, Any]) -> np.ndarray:
    """How often the classes (rows) chose the experts, in the picture's order; only of images that did not make it."""
    return np.array(layer["drawn"])[np.ix_(evidence["class_order"], layer["expert_order"])]


def interventions(layer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The effects of overruling a layer, by kind; those that were measured."""
    decisions = {kind: layer[kind] for kind in ("permuted", "frozen") if layer[kind]}
    return {**decisions, **layer["dense"]}


def doubt(change: dict[str, float]) -> str:
    """In words, if a change may be nothing: its interval contains 0."""
    return "cannot be told from 0" if change["low"] <= 0 <= change["high"] else ""


def doubt_of_dependence(ami: dict[str, float]) -> str:
    """In words, if chance explains that an expert seems to follow the class."""
    return "not distinguishable from chance" if ami["p"] > CHANCE else ""


def dependence_dots(evidence: dict[str, Any]) -> list[Dot]:
    """Adjusted mutual information of class and expert; layer i stands at y = i."""
    found = [layer["adjusted_mutual_information"] for layer in evidence["layers"]]
    names = [layer["name"] for layer in evidence["layers"]]
    return [Dot(i, ami, name, doubt_of_dependence(ami)) for i, (name, ami) in enumerate(zip(names, found, strict=True))]


def effect_dots(evidence: dict[str, Any]) -> dict[str, list[Dot]]:
    """The change of the loss for each kind of intervention, a dot a layer; layer i stands around y = i."""
    found: dict[str, list[Dot]] = {kind: [] for kind in INTERVENTIONS}
    for i, layer in enumerate(evidence["layers"]):
        for kind, effect in interventions(layer).items():
            found[kind].append(Dot(i, effect["loss"], layer["name"], doubt(effect["loss"])))
    found = {kind: dots for kind, dots in found.items() if dots}
    shift = {kind: 0.7 * ((rank + 0.5) / len(found) - 0.5) for rank, kind in enumerate(found)}
    return {INTERVENTIONS[kind]: [dot._replace(y=dot.y + shift[kind]) for dot in dots] for kind, dots in found.items()}


def expert_dots(evidence: dict[str, Any]) -> list[Dot]:
    """The change of the loss without each single expert; those of layer i stand around y = i."""
    return [
        Dot(
            i + 0.8 * ((expert + 0.5) / len(layer["experts"]) - 0.5),
            effect["loss"],
            f"{layer['name']}, expert {expert} (load {layer['load'][expert]:.1%})",
            doubt(effect["loss"]),
        )
        for i, layer in enumerate(evidence["layers"])
        for expert, effect in enumerate(layer["experts"])
    ]


def heatmap(evidence: dict[str, Any], layer: str, axis: Axes | None = None) -> Axes:
    """P(expert | class) of the layer of that name."""
    axis = axis or Figure(figsize=(4, 4), layout="constrained").subplots()
    found = next(each for each in evidence["layers"] if each["name"] == layer)
    share, classes = shares(evidence, found), [evidence["classes"][i] for i in evidence["class_order"]]
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="lightgrey")
    axis.imshow(share, aspect="auto", vmin=0, vmax=1, cmap=colours, interpolation="nearest")
    axis.set_title(layer, fontsize=9, parse_math=False)
    axis.tick_params(labelsize=7)
    thinned = range(0, share.shape[1], -(-share.shape[1] // 16))
    axis.set_xticks(thinned, [str(found["expert_order"][i]) for i in thinned])
    named = classes if len(classes) <= LABELLED else []
    axis.set_yticks(range(len(named)), [short(name) for name in named], parse_math=False)
    return axis


def heatmaps(evidence: dict[str, Any]) -> Figure:
    """P(expert | class) of every layer, in one order of the classes."""
    layers, classes = evidence["layers"], len(evidence["classes"])
    figure, axes = _panels(len(layers), 1.9, min(0.25 * classes + 0.8, 4.0), sharey=True)
    for axis, layer in zip(axes, layers, strict=True):
        heatmap(evidence, layer["name"], axis)
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel("class", fontsize=9)
    figure.colorbar(axes[0].images[0], ax=axes, shrink=0.8, label="P(expert | class)")
    return figure


def dependence(evidence: dict[str, Any]) -> Figure:
    """Adjusted mutual information of class and expert, layer by layer; hollow where chance explains it."""
    layers = evidence["layers"]
    figure = Figure(figsize=(9, 0.3 * len(layers) + 1), layout="constrained")
    axis = figure.subplots()
    _dots(axis, dependence_dots(evidence), COLOURS[0])
    _rows(axis, layers)
    axis.set_xlabel("adjusted mutual information of class and expert")
    return figure


def effects(evidence: dict[str, Any]) -> Figure:
    """The change of the loss when a layer is overruled, with intervals; hollow where they contain 0."""
    found, layers = effect_dots(evidence), evidence["layers"]
    figure = Figure(figsize=(9, len(layers) * (0.16 * len(found) + 0.15) + 1.2), layout="constrained")
    axis = figure.subplots()
    for (kind, dots), colour in zip(found.items(), COLOURS, strict=False):
        _dots(axis, dots, colour, label=kind)
    _rows(axis, layers)
    axis.set_xlabel("change of the loss, nats")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return figure


def experts(evidence: dict[str, Any]) -> Figure:
    """The change of the loss without each single expert, from top to bottom; hollow where intervals contain 0."""
    dots, layers = expert_dots(evidence), evidence["layers"]
    figure = Figure(figsize=(9, min(0.1 * len(dots) + 0.15 * len(layers) + 0.8, 14)), layout="constrained")
    axis = figure.subplots()
    _dots(axis, dots, COLOURS[0])
    _rows(axis, layers)
    axis.set_xlabel("change of the loss without the expert, nats")
    return figure


def agreement(evidence: dict[str, Any]) -> Figure:
    """Adjusted mutual information between the favourite experts of each two layers."""
    matrix, names = (
        np.array(evidence["agreement"]["value"], dtype=float),
        [layer["name"] for layer in evidence["layers"]],
    )
    side = 0.42 * len(names)
    figure = Figure(figsize=(side + 2.6, side + 1.4), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
    axis.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    for (i, j), value in np.ndenumerate(matrix):
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color="w" if value < 0.6 else "k")
    figure.colorbar(image, ax=axis, shrink=0.8, label="AMI")
    return figure


def contact_sheet(rows: Mapping[str, Sequence[tuple[Any, str]]]) -> Figure:
    """Pictures, each an array (height, width, 3) with a caption, in named rows."""
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.15 * columns + 0.9, 1.35 * len(rows)), layout="constrained")
    for axes, (name, pictures) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
        for axis in axes:
            axis.axis("off")
        for axis, (picture, caption) in zip(axes, pictures, strict=False):
            axis.imshow(picture)
            axis.set_title(short(caption, 16), fontsize=7, pad=2, parse_math=False)
        axes[0].text(
            -0.15, 0.5, name, transform=axes[0].transAxes, rotation=90, ha="right", va="center", fontsize=8,
            parse_math=False,
        )  # fmt: skip
    return figure


def short(name: str, length: int = 18) -> str:
    """Return a name that fits beside an axis."""
    name = printable(name)
    return name if len(name) <= length else name[: length - 1] + "…"


def _panels(count: int, width: float, height: float, sharey: bool) -> tuple[Figure, list[Axes]]:
    """Panels in rows of six at most."""
    columns = min(count, 6)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 1.6, height * rows + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes[:count]


def _dots(axis: Axes, dots: list[Dot], colour: str, label: str | None = None) -> None:
    for dot in dots:
        value, low, high = (dot.change[key] for key in ("value", "low", "high"))
        sides = [[max(value - low, 0)], [max(high - value, 0)]]  # a bootstrap interval need not hold the estimate
        axis.errorbar(value, dot.y, xerr=sides, fmt="o", ms=4, mfc="w" if dot.doubt else colour, color=colour, lw=1.2)
    if label:
        axis.plot([], [], "o", ms=4, color=colour, label=label)


def _rows(axis: Axes, layers: list[dict[str, Any]]) -> None:
    """A row a layer, the first on top."""
    axis.set_yticks(range(len(layers)), [layer["name"] for layer in layers], fontsize=8, parse_math=False)
    axis.set_ylim(len(layers) - 0.5, -0.5)
    axis.axvline(0, color="0.4", lw=0.8)
    for i in range(1, len(layers)):
        axis.axhline(i - 0.5, color="0.9", lw=0.8)


def png(figure: Figure, dpi: int = 110) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # it is a box in the figure; the page has it
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
