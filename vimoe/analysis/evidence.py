"""The evidence on the MoE layers of a model: what analysis finds, as JSON, as text, in a notebook and as figures.

Axes: C classes, N experts, L layers.
"""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vimoe.analysis import figures
from vimoe.analysis.interventions import Changes
from vimoe.analysis.statistics import CONFIDENCE, Dependence, Interval, mean_intervals, over
from vimoe.errors import ConfigError, nearest
from vimoe.metrics.base import Score, read_score


@dataclass(frozen=True)
class Effect:
    """What an intervention changes on average over images: the loss in nats, and the share that is right.

    Right are images (top-1), or in a segmentation pixels of an image.
    """

    loss: Interval
    right: Interval

    @classmethod
    def each(cls, changes: Changes, seed: int, sequences: np.ndarray | None = None) -> list[Effect]:
        """Of every intervention; sequences as in `vimoe.analysis.statistics`."""
        losses, shares = (mean_intervals(columns, seed, sequences) for columns in (changes.loss, changes.right))
        return [cls(loss, right) for loss, right in zip(losses, shares, strict=True)]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Effect:
        """The inverse of `dataclasses.asdict`."""
        return cls(Interval(**values["loss"]), Interval(**values["right"]))


@dataclass(frozen=True)
class LayerEvidence:
    """What validation images say of one MoE layer. Intervals are 95%, over images or sequences.

    Attributes:
        name: module name of the layer.
        routing, num_experts: as in its MoEConfig.
        top_k: the most experts that a unit can get.
        counts: (C, N), how often the units of each class chose each expert; from it follow heatmap and load.
        drawn: the same of the half of the images that `expert_order` and `Evidence.class_order` were not found on.
        expert_order: (N,) an order of the experts that brings out blocks.
        gate_mass: (N,) mean over units of the gate that each expert got, 0 where it was not chosen.
        adjusted_mutual_information: of class and expert, with its p-value and the mutual information in nats.
        effective_experts: exp(entropy of the load), 1 to N.
        permuted: when whole decisions (experts and gates) are permuted between images, mean of several draws. Its
            interval is over both images, the one that takes and the one that gives.
        frozen: when every unit gets the most frequent decision.
        dense: when a dense FFN is in the layer's place, by `how` of `vimoe.densify`: those that the layer allows.
        experts: when expert e cannot be chosen, for each e; empty where N = k.
        comparison: how alike the experts are (vimoe.analysis.expert_similarity).
        examples: for each expert places in the loader of the images that it got most of.
        draws: how many permutations `permuted` is the mean of; 0 where nothing was overruled.
    """

    name: str
    routing: str
    num_experts: int
    top_k: int
    counts: np.ndarray
    drawn: np.ndarray
    expert_order: np.ndarray
    gate_mass: np.ndarray
    adjusted_mutual_information: Dependence
    effective_experts: Interval
    permuted: Effect | None
    frozen: Effect | None
    dense: dict[str, Effect]
    experts: tuple[Effect, ...]
    comparison: dict[str, Any] | None
    examples: tuple[tuple[int, ...], ...]
    draws: int = 0

    @property
    def heatmap(self) -> np.ndarray:
        """(C, N) P(expert | class): each row sums to 1, or is 0 for a class without images."""
        return self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)

    @property
    def load(self) -> np.ndarray:
        """(N,) share of all decisions that each expert got; sums to 1, or to 0 without any."""
        return self.counts.sum(axis=0) / max(self.counts.sum(), 1)

    @property
    def best_dense(self) -> tuple[str, Effect]:
        """The way of making the layer dense that has the lowest loss, and what it changes."""
        return min(self.dense.items(), key=lambda item: item[1].loss.value)

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        values = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self).items()}
        return {**values, "load": self.load.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerEvidence:
        """The inverse of `to_dict`."""
        arrays = {key: np.array(values[key]) for key in ("counts", "drawn", "expert_order", "gate_mass")}
        effects = {key: values[key] and Effect.from_dict(values[key]) for key in ("permuted", "frozen")}
        made = {
            "adjusted_mutual_information": Dependence(**values["adjusted_mutual_information"]),
            "effective_experts": Interval(**values["effective_experts"]),
            "dense": {how: Effect.from_dict(effect) for how, effect in values["dense"].items()},
            "experts": tuple(Effect.from_dict(effect) for effect in values["experts"]),
            "examples": tuple(map(tuple, values["examples"])),
        }
        return cls(**{k: v for k, v in values.items() if k != "load"} | arrays | effects | made)


@dataclass(frozen=True)
class Evidence:
    """The evidence on every MoE layer of a model.

    Attributes:
        layers: in forward order.
        base: the score of the untouched model on all images.
        classes: their names.
        images: how many images the numbers are of, overruled_images: and the interventions.
        draws: permutations, at most; `LayerEvidence.draws` says how many were enough.
        class_order: (C,) one order for all layers, found on one half of the images; draw `LayerEvidence.drawn`.
        pairs: distinct (layer, expert) pairs that an image activates: the mean, the least and the most.
        routes: distinct combinations of experts over depth that were taken, their effective number exp(entropy), and
            how many there could be: the routing degree, the product over layers of C(N, k).
        agreement: AMI between the images' favourite experts of each two layers: "value", "low", "high", each (L, L).
        sequences: how many videos the images are frames of, overruled_sequences: and those of the interventions; None
            where nothing says. With 5 or more of them intervals are over sequences, else over images.
    """

    layers: tuple[LayerEvidence, ...]
    base: Score
    classes: tuple[str, ...]
    images: int
    overruled_images: int
    draws: int
    class_order: np.ndarray
    pairs: tuple[Interval, int, int]
    routes: tuple[int, float, int]
    agreement: dict[str, np.ndarray]
    sequences: int | None = None
    overruled_sequences: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it: what `routing.json` holds."""
        mean, low, high = self.pairs
        return {
            "base": self.base.to_dict(),
            "classes": list(self.classes),
            "confidence": CONFIDENCE,
            "images": self.images,
            "overruled_images": self.overruled_images,
            "sequences": self.sequences,
            "overruled_sequences": self.overruled_sequences,
            "draws": self.draws,
            "class_order": self.class_order.tolist(),
            "pairs": {"mean": asdict(mean), "low": low, "high": high},
            "routes": dict(zip(("used", "effective", "possible"), self.routes, strict=True)),
            "agreement": {key: matrix.tolist() for key, matrix in self.agreement.items()},
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evidence:
        """The inverse of `to_dict`."""
        pairs, routes = values["pairs"], values["routes"]
        all_draws = {"draws": values["draws"]}  # as older files mean it, which do not say so for each layer
        made = {
            "layers": tuple(LayerEvidence.from_dict({**all_draws, **layer}) for layer in values["layers"]),
            "base": read_score(values["base"]),
            "classes": tuple(values["classes"]),
            "class_order": np.array(values["class_order"]),
            "pairs": (Interval(**pairs["mean"]), pairs["low"], pairs["high"]),
            "routes": (routes["used"], routes["effective"], routes["possible"]),
            "agreement": {key: np.array(matrix) for key, matrix in values["agreement"].items()},
        }
        return cls(**{k: v for k, v in values.items() if k != "confidence"} | made)

    def plot_heatmap(self, layer: str, axis: Axes | None = None) -> Axes:
        """Draws P(expert | class) of a layer, by module name, on an axis of yours or a new one."""
        names = [each.name for each in self.layers]
        if layer not in names:
            raise ConfigError(f"layer={layer!r}: expected one of {', '.join(names)}; {nearest(layer, names)}")
        return figures.heatmap(self.to_dict(), layer, axis)

    def plot_heatmaps(self) -> Figure:
        """P(expert | class) of all layers, with one order of the classes."""
        return figures.heatmaps(self.to_dict())

    def plot_effects(self) -> Figure:
        """What the interventions change, with intervals."""
        return figures.effects(self.to_dict())

    def _repr_html_(self) -> str:
        head = ("layer", "AMI", "p", "effective experts", "permuted, nats", "made dense, nats", "how")
        cells = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
        cells += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self._rows()]
        first, *rest = self._notes()
        return f"<p>{first}</p><table>{''.join(cells)}</table>{''.join(f'<p>{note}</p>' for note in rest)}"

    def __str__(self) -> str:
        widths = (-18, 7, 7, 9, 27, 27, -9)
        head = ("layer", "AMI", "p", "experts", "permuted", "made dense", "")
        lines = [
            " ".join(f"{cell:<{-w}}" if w < 0 else f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in (head, *self._rows())
        ]
        first, *rest = self._notes()
        return "\n".join([first, *lines, *rest])

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for e in self.layers:
            ami, (how, dense) = e.adjusted_mutual_information, e.best_dense if e.dense else ("", None)
            effects = [str(effect.loss) if effect else "" for effect in (e.permuted, dense)]
            rows.append((e.name, f"{ami.value:.3f}", f"{ami.p:.3f}", f"{e.effective_experts.value:.1f}", *effects, how))
        return rows

    def _notes(self) -> list[str]:
        mean, low, high = self.pairs
        used, effective, possible = self.routes
        what = over(self.overruled_sequences)
        other = "other " if self.overruled_images else ""
        measured = f"Changes of the loss in nats on {self.overruled_images} images, with 95% intervals {what}."
        return [
            f"The untouched model on validation: {self.base}.",
            *([measured] if self.overruled_images else []),
            *([f"All {other}intervals are {over(self.sequences)}."] if self.sequences is not None else []),
            f"An image activates {mean.value:.1f} experts ({low} to {high}); {used} of {possible} routes are used, "
            f"effectively {effective:.1f}.",
        ]
