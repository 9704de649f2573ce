"""Values of routing.json arranged for drawing, for matplotlib and for plotly. Imports no torch."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from vimoe.analysis.intervals import Interval
from vimoe.files import printable

CHANCE = 0.05  # with a p-value above it, dependence is not distinguishable from chance
COLOURS = ("#1f77b4", "#d95f02", "#2a8a3e", "#c2242c", "#6f4fa8", "#7a5230", "#008b8b")
PARENTS = {"given": "the dense model's FFN", "shared": "the shared expert", "base": "the FFN that they share"}
INTERVENTIONS = {
    "permuted": "permuted between images",
    "frozen": "the same for every image",
    "shared": "dense: shared expert alone",
    "merge": "dense: experts averaged",
    "matched": "dense: experts matched, then averaged",
    "join": "dense: experts side by side",
    "whole": "dense: pieces at full weight",
}


class Dot(NamedTuple):
    """An estimate with its interval, to be drawn as a dot with a bar.

    Attributes:
        y: height in the figure; layer i has the row around y = i.
        estimate: "value", "low" and "high".
        label: name of the layer or expert.
        warning: words for an estimate that is not distinguishable from 0 or from chance, else "".
    """

    y: float
    estimate: dict[str, float]
    label: str
    warning: str


def heatmap_shares(evidence: dict[str, Any], layer: dict[str, Any]) -> np.ndarray:
    """P(expert | class) of a layer, (classes, experts) in the heatmap's order; NaN for a class without images."""
    counts = heatmap_counts(evidence, layer).astype(float)
    total = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)


def heatmap_counts(evidence: dict[str, Any], layer: dict[str, Any]) -> np.ndarray:
    """Number of times that each class chose each expert, (classes, experts) in the heatmap's order.

    Only images that had no part in finding that order are counted.
    """
    return np.array(layer["drawn"])[np.ix_(evidence["class_order"], layer["expert_order"])]


def measured_interventions(layer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Effects of the interventions on a layer that were measured, by kind."""
    decisions = {kind: layer[kind] for kind in ("permuted", "frozen") if layer[kind]}
    return {**decisions, **layer["dense"]}


def zero_warning(change: dict[str, float]) -> str:
    """Return a warning in words if the interval of a change contains 0, else ""."""
    return "interval contains 0" if change["low"] <= 0 <= change["high"] else ""


def chance_warning(ami: dict[str, float]) -> str:
    """Return a warning in words if chance explains the mutual information of class and expert, else ""."""
    return "not distinguishable from chance" if ami["p"] > CHANCE else ""


def ami_dots(evidence: dict[str, Any]) -> list[Dot]:
    """Adjusted mutual information of class and expert, one dot for each layer."""
    amis = [(layer["name"], layer["adjusted_mutual_information"]) for layer in evidence["layers"]]
    return [Dot(i, ami, name, chance_warning(ami)) for i, (name, ami) in enumerate(amis)]


def effect_dots(evidence: dict[str, Any]) -> dict[str, list[Dot]]:
    """Change of the loss for each kind of intervention, one dot for each layer."""
    effects: dict[str, list[Dot]] = {kind: [] for kind in INTERVENTIONS}
    for i, layer in enumerate(evidence["layers"]):
        for kind, effect in measured_interventions(layer).items():
            effects[kind].append(Dot(i, effect["loss"], layer["name"], zero_warning(effect["loss"])))
    effects = {kind: dots for kind, dots in effects.items() if dots}
    shift = {kind: 0.7 * ((rank + 0.5) / len(effects) - 0.5) for rank, kind in enumerate(effects)}
    return {
        INTERVENTIONS[kind]: [dot._replace(y=dot.y + shift[kind]) for dot in dots] for kind, dots in effects.items()
    }


def expert_dots(evidence: dict[str, Any]) -> list[Dot]:
    """Change of the loss without each single expert, one dot for each expert."""
    return [
        Dot(
            i + 0.8 * ((expert + 0.5) / len(layer["experts"]) - 0.5),
            effect["loss"],
            f"{layer['name']}, expert {expert} (load {layer['load'][expert]:.1%})",
            zero_warning(effect["loss"]),
        )
        for i, layer in enumerate(evidence["layers"])
        for expert, effect in enumerate(layer["experts"])
    ]


def compared(layer: dict[str, Any], *place: str) -> Any:
    """Return a part of a layer's comparison of experts by its keys; None where it, or a part on the way, is missing."""
    found: Any = layer["comparison"]
    for key in place:
        found = (found or {}).get(key)
    return found


def matrix_names(evidence: dict[str, Any]) -> list[str]:
    """Return the names of the matrices of all layers' experts; none in files of an older version."""
    return list(dict.fromkeys(n for layer in evidence["layers"] for n in compared(layer, "weights", "matrices") or ()))


def by_depth(evidence: dict[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """Return what is compared of experts by title of a panel, and by name: a value for each layer, None for none.

    A value is a number, or "value", "low" and "high", the last two its range by chance. Files of an older version have
    no panels.
    """
    names = matrix_names(evidence)
    of_matrices = {
        "two experts": {"": "cosine", ", means of units": "neuron_mean", ", matched": "reordered"},
        "experts and parent": {"": "parent"},
        "router rows, R squared": {"": "router"},
    }
    places: dict[str, dict[str, tuple[str, ...]]] = {
        title: {f"{m}{words}": ("weights", "matrices", m, key) for words, key in keys.items() for m in names}
        for title, keys in of_matrices.items()
    }
    places["experts and parent"]["equal value rows"] = ("weights", "rho_parent")
    places |= {
        "order of hidden units": {"Kendall's tau": ("weights", "tau"), "equal value rows": ("weights", "rho")},
        "outputs of two experts": {"angular similarity": ("outputs", "angular")},
        "score rank = norm rank": {"share of experts": ("outputs", "diagonal")},
    }
    panels = {
        title: {name: [compared(layer, *place) for layer in evidence["layers"]] for name, place in series.items()}
        for title, series in places.items()
    }
    known = {
        title: {name: values for name, values in series.items() if any(value is not None for value in values)}
        for title, series in panels.items()
    }
    return {title: series for title, series in known.items() if series}


def short(name: str, length: int = 18) -> str:
    """Return a name cut to a length that fits beside an axis."""
    name = printable(name)
    return name if len(name) <= length else name[: length - 1] + "…"


def short_layer(name: str, length: int = 14) -> str:
    """Return a layer's name cut to a length that fits beside an axis; its end stays, which tells layers apart.

    >>> short_layer("backbone.blocks.10.mlp"), short_layer("vit.encoder_layer_11.mlp")
    ('blocks.10.mlp', '…_layer_11.mlp')
    """
    name = printable(name)
    while len(name) > length and re.search(r"\..*\d", name):  # what is left still has a number
        name = name.partition(".")[2]
    return name if len(name) <= length else "…" + name[1 - length :]


def advantage_line(layer: str, probe: dict[str, Any]) -> str:
    """Return a sentence on what the expert that serves a class has before others, given `LayerEvidence.probe`."""
    right, loss = (Interval(**probe[name]) for name in ("advantage", "advantage_loss"))
    return (
        f"{layer}: alone, the expert that serves a class has {100 * right.value:+.2f} "
        f"[{100 * right.low:+.2f}, {100 * right.high:+.2f}] points more right than the others alone, and a loss that "
        f"is {loss} nats lower."
    )
