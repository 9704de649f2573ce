"""Figures of a study as SVG: cost and score, and what routes know against what they matter."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vimoe.files import write_bytes
from vimoe.study.contrasts import layer_names, names_of
from vimoe.study.paired import interval
from vimoe.study.results import Results

FOLDER = "figures"
MARKERS = "osD^vP*X<>"  # of the MoE layers of a model, from the first to the last; then again


def draw(results: Results, data: str) -> Iterator[str]:
    """Write the figures of a data set, and yield a line of Markdown for each."""
    for name, plot, title in (("cost", cost, "cost and score"), ("routes", routes, "routes and what they matter")):
        if figure := plot(results, data):
            (results.study.folder / FOLDER).mkdir(exist_ok=True)
            path = Path(FOLDER, f"{data}-{name}.svg")
            write_bytes(results.study.folder / path, svg(figure))
            yield f"![{title}]({path.as_posix()})"


def cost(results: Results, data: str) -> Figure | None:
    """Return each arm's mean score with its 95% interval, a row an arm, from the cheapest down; None without a score.

    Many arms cost the same, so that points over a scale of costs would hide one another.
    """
    rows = []
    for arm in results.study.arms:
        cells = list(results.final(data, arm).values())
        if cells:
            names = names_of({cell["seed"]: cell["test"] for cell in cells})
            scores = interval([100 * cell["test"][names.judge] for cell in cells])
            rows.append((cells[0]["cost"]["macs"] / 1e9, arm, scores, names.judge_name))
    if not rows:
        return None
    rows.sort(key=lambda row: row[0])
    figure = Figure(figsize=(6, 1 + 0.25 * len(rows)), layout="constrained")
    axis = figure.add_subplot(xlabel=f"{rows[0][-1]} on test, %")
    axis.set_title("arm and multiply-adds of an image", fontsize=8, loc="left")
    for at, (_, _, scores, _) in enumerate(rows):
        half = None if scores.n < 2 else [scores.high - scores.value]
        axis.errorbar([scores.value], [at], xerr=half, fmt="o", color="C0", capsize=3, markersize=4)
    axis.set_yticks(range(len(rows)), [f"{arm}, {macs:.3f} G" for macs, arm, _, _ in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)  # half a row above and below, the cheapest first
    axis.grid(axis="x", alpha=0.3)
    return figure


def routes(results: Results, data: str) -> Figure | None:
    """Return the AMI of each MoE layer with the class against the cost of permuting its routes, as means over seeds.

    A line joins the layers of an arm. None without a measurement.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.add_subplot(xlabel="AMI of expert and class", ylabel="routes permuted, nats")
    pairs = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    colours = [*pairs[::2], *pairs[1::2]]  # the light ones last
    markers: dict[str, str] = {}  # by layer
    for number, arm in enumerate(results.study.arms):
        cells = [cell for cell in results.final(data, arm).values() if cell["analysis"]]
        points = []
        for layer in layer_names(cells):
            found = [e for cell in cells for e in cell["analysis"]["layers"] if e["name"] == layer and e["permuted"]]
            if found:
                x = interval([e["adjusted_mutual_information"]["value"] for e in found]).value
                y = interval([e["permuted"]["loss"]["value"] for e in found]).value
                points.append((x, y, markers.setdefault(layer, MARKERS[len(markers) % len(MARKERS)])))
        if points:
            colour = colours[number % len(colours)]
            axis.plot(*zip(*[(x, y) for x, y, _ in points], strict=True), color=colour, linewidth=0.8, label=arm)
            for x, y, marker in points:
                axis.plot([x], [y], marker, color=colour, markersize=5)
    if not markers:
        return None
    layers = [Line2D([], [], color="grey", marker=m, linestyle="", label=layer) for layer, m in markers.items()]
    handles = [*axis.get_legend_handles_labels()[0], *layers]
    for line in axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7).get_lines():
        line.set_linewidth(2)
    figure.set_figheight(max(4, 0.5 + 0.16 * len(handles)))
    return figure


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG, without a date or random names, so that the same figure gives the same bytes."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "vimoe"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
