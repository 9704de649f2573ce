"""Figures of a study as SVG: cost against score, and what routes know against what they matter."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.paired import interval
from harness.results import Results
from harness.tables import layer_names, names_of
from vimoe.files import write_bytes

FOLDER = "figures"


def draw(results: Results, data: str) -> Iterator[str]:
    """Write the figures of a data set, and yield a line of Markdown for each."""
    for name, plot, title in (("cost", cost, "cost against score"), ("routes", routes, "routes and what they matter")):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axis = figure.add_subplot()
        axis.margins(x=0.2)  # room for the names at the right of the last points
        if plot(results, data, axis):
            (results.study.folder / FOLDER).mkdir(exist_ok=True)
            path = Path(FOLDER, f"{data}-{name}.svg")
            write_bytes(results.study.folder / path, svg(figure))
            yield f"![{title}]({path.as_posix()})"


def cost(results: Results, data: str, axis: Axes) -> bool:
    """Draw each arm's mean score with its 95% interval over its multiply-adds; return False if there is none."""
    drawn = False
    for arm in results.study.arms:
        cells = results.final(data, arm)
        if not cells:
            continue
        names = names_of({seed: cell["test"] for seed, cell in cells.items()})
        scores = interval([100 * cell["test"][names.judge] for cell in cells.values()])
        ends = [[0.0], [0.0]] if scores.n < 2 else [[scores.value - scores.low], [scores.high - scores.value]]
        x = [next(iter(cells.values()))["cost"]["macs"] / 1e9]
        axis.errorbar(x, [scores.value], ends, fmt="o", capsize=3, markersize=4)
        axis.annotate(arm, (x[0], scores.value), xytext=(4, 3), textcoords="offset points", fontsize=6)
        axis.set(xlabel="multiply-adds of an image, G", ylabel=f"{names.judge_name} on test, %")
        drawn = True
    return drawn


def routes(results: Results, data: str, axis: Axes) -> bool:
    """Draw the AMI of each MoE layer with the class against the cost of permuting its routes, as means over seeds."""
    drawn = False
    for arm in results.study.arms:
        cells = [cell for cell in results.final(data, arm).values() if cell["analysis"]]
        for layer in layer_names(cells):
            found = [e for cell in cells for e in cell["analysis"]["layers"] if e["name"] == layer and e["permuted"]]
            if not found:
                continue
            x = interval([e["adjusted_mutual_information"]["value"] for e in found]).value
            y = interval([e["permuted"]["loss"]["value"] for e in found]).value
            axis.plot([x], [y], "o", markersize=4)
            axis.annotate(f"{arm}, {layer}", (x, y), xytext=(4, 3), textcoords="offset points", fontsize=5)
            axis.set(xlabel="AMI of expert and class", ylabel="routes permuted, nats")
            drawn = True
    return drawn


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG, without a date or random names, so that the same figure gives the same bytes."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "vimoe"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
