"""Interactive figures by plotly from the plain contents of routing.json. Imports no torch.

Plotly reads its labels as HTML, so names from files are escaped.
"""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go

from vimoe.analysis.plot_data import (
    COLOURS,
    Dot,
    ami_dots,
    effect_dots,
    expert_dots,
    heatmap_counts,
    heatmap_shares,
    short,
)

LABELLED = 120  # most classes that each get a line for their name


def heatmaps(evidence: dict[str, Any]) -> go.Figure:
    """Draw P(expert | class), one layer at a time; the layer with the largest AMI comes first."""
    layers = evidence["layers"]
    names = [html.escape(evidence["classes"][i]) for i in evidence["class_order"]]
    values = [layer["adjusted_mutual_information"]["value"] for layer in layers]
    first = int(np.argmax(values))
    thinned = list(range(0, len(names), -(-len(names) // LABELLED)))
    figure = go.Figure([_heatmap(evidence, layer, names, i == first) for i, layer in enumerate(layers)])
    buttons = [
        {
            "label": f"{html.escape(layer['name'])} (AMI {value:.2f})",
            "method": "update",
            "args": [
                {"visible": [j == i for j in range(len(layers))]},
                {f"xaxis.{key}": value for key, value in _experts(layer).items()},
            ],
        }
        for i, (layer, value) in enumerate(zip(layers, values, strict=True))
    ]
    figure.update_layout(
        height=150 + max(150, min(26 * len(names), 1300)),
        margin={"l": 10, "r": 10, "t": 120, "b": 20},
        xaxis={**_experts(layers[first]), "side": "top", "title": "expert", "fixedrange": True, "constrain": "domain"},
        yaxis={
            "autorange": "reversed",
            "tickvals": thinned,
            "ticktext": [html.escape(short(evidence["classes"][evidence["class_order"][i]])) for i in thinned],
            "automargin": True,
            "tickfont": {"size": 9 if len(names) > 50 else 11},
            "fixedrange": len(names) <= LABELLED,  # otherwise a finger on the figure would not scroll the page
        },
        updatemenus=[{
            "buttons": buttons, "active": first, "showactive": True, "direction": "down",
            "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 50},
        }],
    )  # fmt: skip
    return _plain(figure)


def ami(evidence: dict[str, Any]) -> go.Figure:
    """Draw the adjusted mutual information of class and expert by layer, with intervals."""
    figure = go.Figure([_dots(ami_dots(evidence), "AMI", COLOURS[0])])
    return _rows(figure, evidence["layers"], 28 * len(evidence["layers"]) + 80, "AMI of class and expert")


def effects(evidence: dict[str, Any]) -> go.Figure:
    """Draw the change of the loss under each intervention by layer, with intervals."""
    effects_by_kind, layers = effect_dots(evidence), evidence["layers"]
    figure = go.Figure()
    for (kind, dots), colour in zip(effects_by_kind.items(), COLOURS, strict=False):
        figure.add_trace(_dots(dots, kind, colour))
        # a dot of its own for the legend, which would else show the first of its kind, perhaps a hollow one
        figure.add_scatter(x=[None], y=[None], mode="markers", name=kind, marker={"color": colour, "size": 7})
    height = len(layers) * (18 * len(effects_by_kind) + 14) + 80 + 22 * len(effects_by_kind)
    return _rows(figure, layers, height, "change of the loss, nats")


def expert_effects(evidence: dict[str, Any]) -> go.Figure:
    """Draw the change of the loss without each single expert, with intervals."""
    dots, layers = expert_dots(evidence), evidence["layers"]
    height = min(10 * len(dots) + 14 * len(layers) + 80, 2400)
    return _rows(
        go.Figure([_dots(dots, "change of the loss, nats", COLOURS[0])]),
        layers,
        height,
        "change of the loss without the expert, nats",
    )


def _heatmap(evidence: dict[str, Any], layer: dict[str, Any], names: list[str], visible: bool) -> go.Heatmap:
    counts = heatmap_counts(evidence, layer)
    counted = "images" if layer["routing"] == "image" and layer["top_k"] == 1 else "choices"
    rows = zip(names, counts.tolist(), strict=True)
    return go.Heatmap(
        z=heatmap_shares(evidence, layer),
        customdata=[
            [[name, expert, count, sum(row)] for expert, count in zip(layer["expert_order"], row, strict=True)]
            for name, row in rows
        ],
        hovertemplate=f"class %{{customdata[0]}}<br>expert %{{customdata[1]}} of {html.escape(layer['name'])}<br>"
        f"P(expert | class) %{{z:.1%}}<br>%{{customdata[2]}} of %{{customdata[3]}} {counted}<extra></extra>",
        hoverongaps=False,
        visible=visible,
        zmin=0,
        zmax=1,
        colorscale="Viridis",
        colorbar={"thickness": 10, "len": 160, "lenmode": "pixels", "y": 1, "yanchor": "top", "tickformat": ".0%"},
    )


def _experts(layer: dict[str, Any]) -> dict[str, Any]:
    order = layer["expert_order"]
    return {"tickvals": list(range(len(order))), "ticktext": [str(expert) for expert in order]}


def _dots(dots: list[Dot], name: str, colour: str) -> go.Scatter:
    values = np.array([[dot.estimate[key] for key in ("value", "low", "high")] for dot in dots])
    words = [
        f"{html.escape(dot.label)}<br>{name}: {value:+.4f} [{low:+.4f}, {high:+.4f}]"
        + (f"<br>{dot.warning}" if dot.warning else "")
        for dot, (value, low, high) in zip(dots, values, strict=True)
    ]
    return go.Scatter(
        x=values[:, 0],
        y=[dot.y for dot in dots],
        error_x={
            "array": np.maximum(values[:, 2] - values[:, 0], 0),
            "arrayminus": np.maximum(values[:, 0] - values[:, 1], 0),
            "thickness": 1.2,
            "width": 3,
        },
        mode="markers",
        showlegend=False,
        text=words,
        hovertemplate="%{text}<extra></extra>",
        marker={
            "color": colour,
            "size": 7,
            "symbol": ["circle-open" if dot.warning else "circle" for dot in dots],
        },
    )


def _rows(figure: go.Figure, layers: list[dict[str, Any]], height: int, xlabel: str) -> go.Figure:
    """Give each layer one row, the first layer at the top."""
    figure.update_layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 50},
        xaxis={
            "title": xlabel,
            "zeroline": True,
            "zerolinecolor": "#666",
            "fixedrange": True,
            "nticks": 7,
            "rangemode": "tozero",
        },
        yaxis={
            "range": [len(layers) - 0.5, -0.5],
            "tickvals": list(range(len(layers))),
            "ticktext": [html.escape(layer["name"]) for layer in layers],
            "automargin": True,
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
    )
    for i in range(1, len(layers)):
        figure.add_hline(i - 0.5, line={"color": "#ddd", "width": 1})
    return _plain(figure)


def _plain(figure: go.Figure) -> go.Figure:
    return figure.update_layout(template="plotly_white", font={"size": 12, "color": "#1a1a1a"}, dragmode="zoom")
