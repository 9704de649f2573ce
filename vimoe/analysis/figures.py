"""Figures of a run by matplotlib, for PNG files and notebooks, from the plain contents of its files. Imports no torch.

Figures are made without pyplot: a notebook keeps its backend, and no figure has to be closed. Names are drawn without
matplotlib's mathematics, which would read text between two dollar signs as a formula.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vimoe.analysis.plot_data import (
    COLOURS,
    Dot,
    ami_dots,
    by_depth,
    compared,
    effect_dots,
    expert_dots,
    heatmap_shares,
    matrix_names,
    short,
    short_layer,
)

LABELLED = 30  # most classes whose names fit beside a heatmap
DRAWN = 12  # most layers that get a column of their own


def heatmap(evidence: dict[str, Any], layer: str, axis: Axes | None = None) -> Axes:
    """Draw P(expert | class) of one layer: a row for each class, a column for each expert."""
    axis = axis or Figure(figsize=(4, 4), layout="constrained").subplots()
    found = next(each for each in evidence["layers"] if each["name"] == layer)
    share, classes = heatmap_shares(evidence, found), [evidence["classes"][i] for i in evidence["class_order"]]
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
    """Draw P(expert | class) of every layer, with one order of the classes."""
    layers, classes = evidence["layers"], len(evidence["classes"])
    figure, axes = panels(len(layers), 1.9, min(0.25 * classes + 0.8, 4.0), sharey=True)
    for axis, layer in zip(axes, layers, strict=True):
        heatmap(evidence, layer["name"], axis)
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel("class", fontsize=9)
    figure.colorbar(axes[0].images[0], ax=axes, shrink=0.8, label="P(expert | class)")
    return figure


def ami(evidence: dict[str, Any]) -> Figure:
    """Draw the adjusted mutual information of class and expert by layer; a hollow dot is explained by chance."""
    layers = evidence["layers"]
    figure = Figure(figsize=(9, 0.3 * len(layers) + 1), layout="constrained")
    axis = figure.subplots()
    _dots(axis, ami_dots(evidence), COLOURS[0])
    _rows(axis, layers)
    axis.set_xlabel("adjusted mutual information of class and expert")
    return figure


def effects(evidence: dict[str, Any]) -> Figure:
    """Draw the change of the loss under each intervention by layer; a hollow dot has an interval that contains 0."""
    effects_by_kind, layers = effect_dots(evidence), evidence["layers"]
    figure = Figure(figsize=(9, len(layers) * (0.16 * len(effects_by_kind) + 0.15) + 1.2), layout="constrained")
    axis = figure.subplots()
    for (kind, dots), colour in zip(effects_by_kind.items(), COLOURS, strict=False):
        _dots(axis, dots, colour, label=kind)
    _rows(axis, layers)
    axis.set_xlabel("change of the loss, nats")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return figure


def expert_effects(evidence: dict[str, Any]) -> Figure:
    """Draw the change of the loss without each single expert; a hollow dot has an interval that contains 0."""
    dots, layers = expert_dots(evidence), evidence["layers"]
    figure = Figure(figsize=(9, min(0.1 * len(dots) + 0.15 * len(layers) + 0.8, 14)), layout="constrained")
    axis = figure.subplots()
    _dots(axis, dots, COLOURS[0])
    _rows(axis, layers)
    axis.set_xlabel("change of the loss without the expert, nats")
    return figure


def agreement(evidence: dict[str, Any]) -> Figure:
    """Draw the adjusted mutual information between the favourite experts of each two layers."""
    matrix = np.array(evidence["agreement"]["value"], dtype=float)
    names = [layer["name"] for layer in evidence["layers"]]
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


def experts_by_depth(evidence: dict[str, Any]) -> Figure:
    """Draw similarities of experts by layer; below them, a column a layer, principal axes and ranks.

    A bar is the range of a figure by chance. A hollow dot lies inside of it.
    """
    curves, layers = by_depth(evidence), evidence["layers"]
    columns = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, DRAWN).round().astype(int))]
    matrices = [name for name in matrix_names(evidence) if any(_axes_of(layer, name) for layer in columns)]
    ranks = any(compared(layer, "outputs", "ranks") for layer in columns)
    rows = -(-len(curves) // 3)
    side = 9.0 / max(len(columns), 6)
    heights = [2.1 * rows + 0.5, *([side * len(matrices) + 0.3] if matrices else []), *([side + 0.4] if ranks else [])]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    top, *below = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat
    axes = list(top.subplots(rows, 3, squeeze=False).flat)
    for axis, (title, series) in zip(axes, curves.items(), strict=False):
        _curves(axis, title, series, [layer["name"] for layer in layers])
    for axis in axes[len(curves) :]:
        axis.axis("off")
    if matrices:
        grid = below[0].subplots(len(matrices), max(len(columns), 6), squeeze=False)
        _columns(
            grid, columns, lambda axis, layer, row: _plane(axis, _axes_of(layer, matrices[row]), layer["num_experts"])
        )
        for axis, name in zip(grid[:, 0], matrices, strict=True):
            axis.set_ylabel(f"{name}, PCA", fontsize=7)
    if ranks:
        grid = below[-1].subplots(1, max(len(columns), 6), squeeze=False)
        _columns(grid, columns, lambda axis, layer, _: _ranks(axis, compared(layer, "outputs", "ranks")))
        grid[0, 0].set_ylabel("score rank", fontsize=7)
        grid[0, 0].set_xlabel("norm rank", fontsize=7)
    return figure


def _axes_of(layer: dict[str, Any], name: str) -> Any:
    return compared(layer, "weights", "matrices", name, "pca")


def _curves(axis: Axes, title: str, series: dict[str, list[Any]], names: list[str]) -> None:
    of = list(dict.fromkeys(name.partition(", ")[0] for name in series))  # a colour for each matrix
    kinds = list(dict.fromkeys(name.partition(", ")[2] for name in series))
    for name, values in series.items():
        what, _, kind = name.partition(", ")
        colour, style = COLOURS[of.index(what)], ("-", "--", ":")[kinds.index(kind)]
        known = [(x, value) for x, value in enumerate(values) if value is not None]
        numbers = [value["value"] if isinstance(value, dict) else value for _, value in known]
        axis.plot([x for x, _ in known], numbers, style, lw=1.2, color=colour, label=name)
        for (x, value), number in zip(known, numbers, strict=True):
            chance = isinstance(value, dict)
            if chance:
                axis.plot([x, x], [value["low"], value["high"]], lw=5, alpha=0.3, color=colour, solid_capstyle="butt")
            inside = chance and value["low"] <= number <= value["high"]
            axis.plot(x, number, "o", ms=4, mfc="w" if inside else colour, color=colour)
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)
    thinned = range(0, len(names), -(-len(names) // DRAWN))
    axis.set_xticks(
        thinned, [short_layer(names[i]) for i in thinned], rotation=0 if len(names) < 4 else 90, parse_math=False
    )
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.margins(y=0.12)
    axis.legend(fontsize=6, frameon=False)


def _columns(grid: Any, layers: list[dict[str, Any]], draw: Callable[[Axes, dict[str, Any], int], None]) -> None:
    """Draw a row of panels with a column for each layer, without ticks; panels without a layer are left out."""
    for (row, column), axis in np.ndenumerate(grid):
        axis.set_xticks([])
        axis.set_yticks([])
        if column >= len(layers):
            axis.axis("off")
            continue
        draw(axis, layers[column], row)
        if row == 0:
            axis.set_title(short_layer(layers[column]["name"]), fontsize=7, parse_math=False)


def _plane(axis: Axes, points: Any, experts: int) -> None:
    """Draw experts by their number, and the parent, where there is one more point, as a triangle."""
    for number, (x, y) in enumerate(points or ()):
        if number < experts:
            axis.text(x, y, str(number), fontsize=6, ha="center", va="center_baseline", color=COLOURS[0])
        else:
            axis.plot(x, y, "^", ms=5, color=COLOURS[1])
    if points:
        axis.plot(*zip(*points, strict=True), ",", alpha=0)  # texts do not count where limits are found
        axis.margins(0.15)


def _ranks(axis: Axes, counts: Any) -> None:
    if counts:
        axis.imshow(counts, cmap="viridis", vmin=0, origin="lower")


def contact_sheet(rows: Mapping[str, Sequence[tuple[Any, str]]]) -> Figure:
    """Draw named rows of images, each an array (height, width, 3) with a caption."""
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.15 * columns + 0.9, 1.35 * len(rows)), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
        for axis in axes:
            axis.axis("off")
        for axis, (image, caption) in zip(axes, images, strict=False):
            axis.imshow(image)
            axis.set_title(short(caption, 16), fontsize=7, pad=2, parse_math=False)
        axes[0].text(
            -0.15, 0.5, name, transform=axes[0].transAxes, rotation=90, ha="right", va="center", fontsize=8,
            parse_math=False,
        )  # fmt: skip
    return figure


def panels(count: int, width: float, height: float, sharey: bool) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels of the given size in inches, at most six in a row."""
    columns = min(count, 6)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 1.6, height * rows + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes[:count]


def _dots(axis: Axes, dots: list[Dot], colour: str, label: str | None = None) -> None:
    for dot in dots:
        value, low, high = (dot.estimate[key] for key in ("value", "low", "high"))
        sides = [[max(value - low, 0)], [max(high - value, 0)]]  # a bootstrap interval need not contain the estimate
        axis.errorbar(value, dot.y, xerr=sides, fmt="o", ms=4, mfc="w" if dot.warning else colour, color=colour, lw=1.2)
    if label:
        axis.plot([], [], "o", ms=4, color=colour, label=label)


def _rows(axis: Axes, layers: list[dict[str, Any]]) -> None:
    """Give each layer one row, the first layer at the top."""
    axis.set_yticks(range(len(layers)), [layer["name"] for layer in layers], fontsize=8, parse_math=False)
    axis.set_ylim(len(layers) - 0.5, -0.5)
    axis.axvline(0, color="0.4", lw=0.8)
    for i in range(1, len(layers)):
        axis.axhline(i - 0.5, color="0.9", lw=0.8)


def png(figure: Figure, dpi: int = 110) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box here; the page has the name
        if layout := figure.get_layout_engine():  # to find it, savefig would draw the whole figure once more
            figure.set_dpi(dpi)
            layout.execute(figure)
            figure.set_layout_engine(None)
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
