"""Figures show the numbers of routing.json, in its order, and tell changes from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.found import effect, evidence
from matplotlib.figure import Figure
from matplotlib.text import Text

from vimoe.analysis import figures, plot_data
from vimoe.report import plotly_figures
from vimoe.report.curves import curves, loads


def test_heatmaps_draw_the_counts_that_did_not_make_the_order() -> None:
    found = evidence(layers=1, classes=3, experts=2)
    layer = found["layers"][0]
    found["class_order"], layer["expert_order"] = [2, 0, 1], [1, 0]
    layer["drawn"], layer["counts"] = [[3, 1], [0, 0], [0, 5]], [[9, 9]] * 3
    expected = [[1, 0], [0.25, 0.75], [np.nan, np.nan]]
    np.testing.assert_array_equal(plot_data.heatmap_shares(found, layer), expected)
    axis = figures.heatmap(found, layer["name"])
    np.testing.assert_array_equal(np.ma.filled(axis.images[0].get_array().astype(float), np.nan), expected)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["class 2", "class 0", "class 1"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "0"]
    plot = plotly_figures.heatmaps(found)
    np.testing.assert_array_equal(plot.data[0].z, expected)
    assert list(plot.layout.yaxis.ticktext) == ["class 2", "class 0", "class 1"]
    assert list(plot.layout.xaxis.ticktext) == ["1", "0"]
    assert [list(cell) for cell in plot.data[0].customdata[1]] == [["class 0", 1, 1, 4], ["class 0", 0, 3, 4]]


def test_the_layer_with_the_largest_ami_comes_first_and_each_can_be_chosen() -> None:
    found = evidence(layers=3)
    found["layers"][1]["adjusted_mutual_information"]["value"] = 0.99
    plot = plotly_figures.heatmaps(found)
    assert [trace.visible for trace in plot.data] == [False, True, False]
    buttons = plot.layout.updatemenus[0].buttons
    assert [button.args[0]["visible"].index(True) for button in buttons] == [0, 1, 2]
    assert buttons[2].args[1]["xaxis.ticktext"] == [str(e) for e in found["layers"][2]["expert_order"]]


def test_a_dot_is_hollow_where_its_interval_holds_zero() -> None:
    found = evidence(layers=2)
    found["layers"][0]["dense"], found["layers"][1]["dense"] = {}, {"shared": effect(0.5, 0.1)}
    found["layers"][0]["permuted"], found["layers"][1]["permuted"] = effect(0.1, 0.2), effect(-0.3, 0.1)
    plot = plotly_figures.effects(found)
    assert [trace.name for trace in plot.data if trace.name] == [
        plot_data.INTERVENTIONS[k] for k in ("permuted", "frozen", "shared")
    ]
    permuted = plot.data[0]
    assert list(permuted.x) == [0.1, -0.3] and list(permuted.marker.symbol) == ["circle-open", "circle"]
    assert "interval contains 0" in permuted.text[0] and "contains" not in permuted.text[1]
    np.testing.assert_allclose(permuted.error_x.array, [0.2, 0.1])
    (axis,) = figures.effects(found).axes
    faces = [container.lines[0].get_markerfacecolor() for container in axis.containers]
    assert faces == [
        "w",
        plot_data.COLOURS[0],
        "w",
        plot_data.COLOURS[1],
        plot_data.COLOURS[2],
    ]  # permuted, frozen, shared; layer 0 first


def test_single_experts_are_named_with_their_load() -> None:
    found = evidence(layers=2, experts=4)
    dots = plot_data.expert_dots(found)
    assert [round(dot.y) for dot in dots] == [0] * 4 + [1] * 4 and dots == sorted(dots, key=lambda dot: dot.y)
    assert dots[6].label.startswith("blocks.1.mlp, expert 2 (load ")
    assert dots[6].estimate == found["layers"][1]["experts"][2]["loss"]


@pytest.mark.parametrize("name", ["ami", "effects", "expert_effects", "agreement", "heatmaps", "experts_by_depth"])
def test_every_figure_can_be_drawn_of_one_layer_and_of_twelve(name: str) -> None:
    for layers in (1, 12):
        figure = getattr(figures, name)(evidence(layers=layers, classes=3, experts=2))
        figure.draw_without_rendering()
        assert len(figure.axes) >= (layers if name in ("heatmaps", "experts_by_depth") else 1)


def test_experts_by_depth_draws_each_figure_with_its_range_by_chance() -> None:
    found = evidence(layers=3, experts=4)
    assert list(plot_data.by_depth(found)) == [
        "two experts", "experts and parent", "router rows, R squared", "order of hidden units",
        "outputs of two experts", "score rank = norm rank",
    ]  # fmt: skip
    figure = figures.experts_by_depth(found)
    panel = next(axis for axis in figure.axes if axis.get_title() == "score rank = norm rank")
    drawn = {tuple(line.get_xydata().flatten().tolist()): line for line in panel.lines}
    assert drawn[0, 0.25, 1, 0.375, 2, 0.5] and drawn[1, 0.125, 1, 0.4375]  # values, and a range
    faces = [drawn[x, 0.25 + 0.125 * x].get_markerfacecolor() for x in range(3)]
    assert faces == ["w", "w", plot_data.COLOURS[0]]
    planes = [axis for axis in figure.axes if axis.texts]
    assert [[text.get_text() for text in axis.texts] for axis in planes] == [["0", "1", "2", "3"]] * 6
    assert all(any(line.get_marker() == "^" for line in axis.lines) for axis in planes)


def test_layers_without_a_comparison_leave_gaps() -> None:
    found = evidence(layers=3)
    found["layers"][1]["comparison"] = {"num_experts": 8, "weights": None, "outputs": None, "parent": None}
    series = plot_data.by_depth(found)["order of hidden units"]["Kendall's tau"]
    assert [value is None for value in series] == [False, True, False]
    figures.experts_by_depth(found).draw_without_rendering()
    for layer in found["layers"]:
        layer["comparison"] = None
    assert plot_data.by_depth(found) == {} and plot_data.matrix_names(found) == []


HOSTILE = ["$0_$50", "$50_$100", "$5-$10", r"a_$\frac", "$$", "_x$y$"]


def shown(figure: Figure) -> set[str]:
    """The names of HOSTILE that a figure shows letter by letter; draws it."""
    figure.canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and "$" in text.get_text()]
    assert not any(text.get_parse_math() for text in texts), [text.get_text() for text in texts]
    return {text.get_text() for text in texts} & set(HOSTILE)


def hostile_run(path: Path) -> Path:
    path.write_text("epoch,layer,expert,share,train_loss,val_loss,val_top1\n" + "".join(
        f"1,{name},0,0.5,2,3,0.25\n" for name in HOSTILE))  # fmt: skip
    return path


def named_so(layers: int) -> dict[str, Any]:
    found = evidence(layers, classes=len(HOSTILE), experts=3)
    found["classes"] = list(HOSTILE)
    for layer, name in zip(found["layers"], HOSTILE, strict=False):
        layer["name"] = name
    return found


DRAWN = {
    "heatmap": lambda path: figures.heatmap(named_so(1), HOSTILE[0]).figure,
    "heatmaps": lambda path: figures.heatmaps(named_so(6)),
    "ami": lambda path: figures.ami(named_so(6)),
    "effects": lambda path: figures.effects(named_so(6)),
    "expert_effects": lambda path: figures.expert_effects(named_so(6)),
    "agreement": lambda path: figures.agreement(named_so(6)),
    "experts_by_depth": lambda path: figures.experts_by_depth(named_so(6)),
    "captions": lambda path: figures.contact_sheet({"row": [(np.ones((2, 2, 3)), name) for name in HOSTILE]}),
    "rows": lambda path: figures.contact_sheet({name: [(np.ones((2, 2, 3)), "x")] for name in HOSTILE}),
    "curves": lambda path: curves(dict.fromkeys(HOSTILE, hostile_run(path / "metrics.csv"))),
    "loads": lambda path: loads(hostile_run(path / "load.csv")),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_names_with_dollar_signs_are_shown_as_they_are(tmp_path: Path, kind: str) -> None:
    assert shown(DRAWN[kind](tmp_path)) == set(HOSTILE)


def test_plots_have_names_with_dollar_signs_too() -> None:
    assert list(plotly_figures.heatmaps(named_so(1)).layout.yaxis.ticktext) == [
        HOSTILE[i] for i in named_so(1)["class_order"]
    ]
