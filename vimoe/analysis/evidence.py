"""The evidence on the MoE layers of a model: what analysis finds, as JSON, as text, in a notebook and as figures.

Axes: C classes, N experts, L layers.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vimoe.analysis import figures
from vimoe.analysis.changes import Changes, Fit
from vimoe.analysis.dependence import Dependence
from vimoe.analysis.intervals import CONFIDENCE, Interval, mean_intervals, over, pair_interval
from vimoe.analysis.plot_data import advantage_line
from vimoe.errors import ConfigError, VimoeError, choice, counted
from vimoe.metrics.base import Score, read_score
from vimoe.moe import MoE


@dataclass(frozen=True)
class Calibrated(Interval):
    """Mean change of the loss in nats if both models have the temperature that fits them best (`Changes.fit`).

    The rest of the change of the loss is calibration alone. The interval is for these two temperatures.

    Attributes:
        temperature_before, temperature_after: temperatures of the untouched and of the overruled model. They are fitted
            on the images that are measured.
    """

    temperature_before: float
    temperature_after: float

    @classmethod
    def of(cls, interval: Interval, fit: Fit) -> Calibrated:
        return cls(**vars(interval), temperature_before=fit.before, temperature_after=fit.after)


@dataclass(frozen=True)
class Effect:
    """Mean change over images by an intervention: of the loss in nats, and of the share that is right.

    Right is an image (top-1), or the share of its pixels; the metric says which. Each image counts the same, however
    many of its pixels have a class; an image without any does not count.

    Attributes:
        loss, right: change of the loss in nats, and of the share.
        calibrated: change of the loss without what is a mere scale of the logits; None if the metric has no temperature
            (`Metric.calibrates`), and in files of an older version.
    """

    loss: Interval
    right: Interval
    calibrated: Calibrated | None = None

    @classmethod
    def each(cls, changes: Changes, seed: int, sequences: np.ndarray | None = None) -> list[Effect]:
        """Return the effect of every intervention; sequences as in `vimoe.analysis.intervals`."""
        losses, shares = (mean_intervals(columns, seed, sequences) for columns in (changes.loss, changes.right))
        if not changes.calibrates or not losses:
            return list(map(cls, losses, shares))
        fits = [changes.columns(slice(v, v + 1)).fit() for v in range(len(losses))]
        intervals = mean_intervals(np.hstack([fit.change for fit in fits]), seed, sequences)
        return list(map(cls, losses, shares, map(Calibrated.of, intervals, fits)))

    @classmethod
    def of_draws(cls, changes: Changes, partners: np.ndarray, seed: int, sequences: np.ndarray | None = None) -> Effect:
        """Return the mean effect of interventions that each give image i the decisions of image partners[i, v].

        Args:
            changes: changes (I, V) of each image by each intervention; one temperature fits all of these.
            partners, seed, sequences: arguments of `vimoe.analysis.intervals.pair_interval`.
        """

        def interval(values: np.ndarray) -> Interval:
            return pair_interval(values, partners, seed, sequences)

        fit = changes.fit() if changes.calibrates else None
        calibrated = fit and Calibrated.of(interval(fit.change), fit)
        return cls(interval(changes.loss), interval(changes.right), calibrated)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Effect:
        """Return the effect of these plain values, the inverse of `dataclasses.asdict`."""
        calibrated = values.get("calibrated") and Calibrated(**values["calibrated"])
        return cls(Interval(**values["loss"]), Interval(**values["right"]), calibrated)


@dataclass(frozen=True)
class LayerEvidence:
    """Evidence on one MoE layer from validation images. Intervals are 95%, over images or sequences.

    Attributes:
        name: module name of the layer.
        routing, num_experts: settings of the layer, as in its MoEConfig.
        top_k: number of slots of an image or token, the most experts that it can get (`Router.slots`). The softmax
            router has as many as the setting of this name.
        counts: (C, N) number of times that the units of each class chose each expert; heatmap and load follow from it.
        drawn: (C, N) the same for the half of the images that `expert_order` and `Evidence.class_order` were not found
            on.
        expert_order: (N,) order of the experts that brings out blocks.
        gate_mass: (N,) mean over units of each expert's gate, 0 for a unit that did not choose it.
        adjusted_mutual_information: dependence of class and expert, with p-value and mutual information in nats.
        effective_experts: exp(entropy of the load), 1 to N.
        permuted: effect of whole decisions (experts and gates) permuted between images, mean of several draws. Its
            interval is over both images, the one that takes and the one that gives.
        frozen: effect of the most frequent decision for every unit, or that of its pool (`moe.groups`).
        dense: effect of replacing the layer by a dense FFN, for each `how` that the layer supports.
        experts: effect of each expert's absence; empty if N is the setting `top_k`, so that none can be left out.
        comparison: similarity of the experts (vimoe.analysis.expert_similarity).
        examples: indices, in the loader, of the images that gave each expert the largest gates.
        draws: number of permutations in `permuted`; 0 without interventions.
        diversity: figures of `vimoe.analysis.diversity`, of "all" experts and of "chosen" ones; None in files of an
            older version.
        probe: figures of `vimoe.analysis.probe`; None if experts were not probed.

    `permuted` and `frozen` are None, and `experts` empty, if the router's decisions cannot be overruled
    (`Router.overrulable`).
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
    diversity: dict[str, dict[str, float] | None] | None = None
    probe: dict[str, Any] | None = None

    @property
    def heatmap(self) -> np.ndarray:
        """(C, N) P(expert | class); each row sums to 1, or is 0 for a class without images."""
        return self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)

    @property
    def load(self) -> np.ndarray:
        """(N,) share of all decisions by expert; it sums to 1, or to 0 without any."""
        return self.counts.sum(axis=0) / max(self.counts.sum(), 1)

    @property
    def best_dense(self) -> tuple[str, Effect]:
        """`how` of the dense FFN with the lowest loss, and its effect."""
        return min(self.dense.items(), key=lambda item: item[1].loss.value)

    @property
    def shown(self) -> tuple[Effect | None, Effect | None, str]:
        """Effects of permuted decisions and of `best_dense`, None where they were not measured, and its `how`."""
        how, dense = self.best_dense if self.dense else ("", None)
        return self.permuted, dense, how

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON knows them."""
        values = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self).items()}
        return {**values, "load": self.load.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerEvidence:
        """Return the evidence of these plain values, the inverse of `to_dict`."""
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
    """Evidence on every MoE layer of a model.

    Attributes:
        layers: evidence on each layer, in forward order.
        base: score of the unchanged model on all images.
        classes: names of the classes.
        images, overruled_images: number of images behind the numbers, and behind the interventions.
        draws: number of permutations, at most; `LayerEvidence.draws` is the number that was enough.
        class_order: (C,) one order for all layers, found on one half of the images; draw `LayerEvidence.drawn`.
        pairs: number of distinct (layer, expert) pairs that an image activates: mean, least and most.
        routes: number of distinct combinations of experts over depth that were taken, their effective number
            exp(entropy), and the number of possible ones, the routing degree: the product over layers of C(N, k); with
            pools of experts its sum over them, since a token stays in its pool (`expert_usage.possible_routes`).
        agreement: AMI between the images' favourite experts of each two layers: "value", "low", "high", each (L, L).
        sequences, overruled_sequences: number of videos behind the images, and behind the interventions; None if
            nothing says. With 5 or more of them intervals are over sequences, else over images.
        features: {"before": the first block that ran} if all is computed from cached features, which are rounded to
            float16; None if from images.
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
    features: dict[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of routing.json."""
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
            "features": self.features,
            "class_order": self.class_order.tolist(),
            "pairs": {"mean": asdict(mean), "low": low, "high": high},
            "routes": dict(zip(("used", "effective", "possible"), self.routes, strict=True)),
            "agreement": {key: matrix.tolist() for key, matrix in self.agreement.items()},
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evidence:
        """Return the evidence of these plain values, the inverse of `to_dict`."""
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

    def check_model(self, layers: Mapping[str, MoE]) -> None:
        """Raise VimoeError if these are not the MoE layers, by name, of the model that the evidence is of."""
        known = {e.name: (e.num_experts, e.top_k, e.routing) for e in self.layers}
        ours = {n: (m.config.num_experts, m.router.slots, m.config.routing) for n, m in layers.items()}
        if known != ours:
            odd = sorted(set(known.items()) ^ set(ours.items()))[0][0]
            raise VimoeError(
                f"the evidence is of another model: {odd} has (experts, top_k, routing) {known.get(odd, 'none')} in it "
                f"and {ours.get(odd, 'none')} in this model; run analyze on this model"
            )

    def plot_heatmap(self, layer: str, axis: Axes | None = None) -> Axes:
        """Draw P(expert | class) of a layer.

        Args:
            layer: module name.
            axis: axis of yours to draw on; by default a new one.

        Raises:
            ConfigError: if the model has no such MoE layer.
        """
        names = [each.name for each in self.layers]
        if layer not in names:
            raise ConfigError(f"layer={layer!r}: {choice(layer, names)}")
        return figures.heatmap(self.to_dict(), layer, axis)

    def plot_heatmaps(self) -> Figure:
        """Draw P(expert | class) of all layers, with one order of the classes."""
        return figures.heatmaps(self.to_dict())

    def plot_effects(self) -> Figure:
        """Draw the effects of the interventions, with intervals."""
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
            ami, (*effects, how) = e.adjusted_mutual_information, e.shown
            losses = [str(effect.loss) if effect else "" for effect in effects]
            rows.append((e.name, f"{ami.value:.3f}", f"{ami.p:.3f}", f"{e.effective_experts.value:.1f}", *losses, how))
            calibrated = [str(effect.calibrated) if effect and effect.calibrated else "" for effect in effects]
            if any(calibrated):
                rows.append(("  calibrated", "", "", "", *calibrated, ""))
        return rows

    def _notes(self) -> list[str]:
        mean, low, high = self.pairs
        used, effective, possible = self.routes
        what = over(self.overruled_sequences)
        other = "other " if self.overruled_images else ""
        source = f", from features before {self.features['before']}" if self.features else ""
        measured = (
            f"Changes of the loss in nats on {counted(self.overruled_images, 'image')}, with 95% intervals {what}."
        )
        return [
            f"The untouched model on validation: {self.base}{source}.",
            *([measured] if self.overruled_images else []),
            *self._about_calibration(),
            *([f"All {other}intervals are {over(self.sequences)}."] if self.sequences is not None else []),
            f"An image activates {mean.value:.1f} experts ({low} to {high}); {used} of {possible} routes are used, "
            f"effectively {effective:.1f}.",
            *(advantage_line(e.name, e.probe) for e in self.layers if e.probe),
        ]

    def _about_calibration(self) -> list[str]:
        """Return what the calibrated changes are, as a list of one; [] if there are none."""
        effects = (effect for layer in self.layers for effect in layer.shown[:2] if effect)
        found = next((effect.calibrated for effect in effects if effect.calibrated), None)
        if not found:
            return []
        return [
            f"Calibrated: the change if each model has the temperature that fits it best (the untouched one has "
            f"{found.temperature_before:.2f}); the rest is a scale of the logits."
        ]
