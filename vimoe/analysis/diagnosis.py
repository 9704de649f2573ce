"""The diagnosis of the MoE layers of a model: figures of each layer, findings with remedies, as JSON and as text.

Axes: N experts, U routed units (images or tokens).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vimoe.analysis.evidence import Effect
from vimoe.analysis.expert_similarity import Distance
from vimoe.analysis.intervals import CONFIDENCE, Interval, over
from vimoe.metrics.base import Score

MOST = 3  # findings in the text; `Diagnosis.findings` has all of them


@dataclass(frozen=True)
class Gates:
    """Mean and quantiles (5%, 50%, 95%) over units of the weight of the chosen experts together."""

    mean: float
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Oracle:
    """Effects of the best single expert in the place of the model's own routes; below 0 better routes exist.

    Each image goes to one expert alone, with the sum of the gates that the router gave it. So with k > 1 one expert is
    compared with several.

    Attributes:
        by_prediction: effect of the expert with the lowest mean loss for the class that the untouched model predicts.
            It is chosen on one half of the images and measured on the other, in both directions; a prediction that the
            other half does not have gets the expert of `for_all`. A router could know it, so this is a gain to be had.
        for_all: effect of one expert for all images, chosen and measured likewise. Where it is as good, the classes
            need no experts of their own.
        by_class: effect of the expert with the lowest mean loss for the image's true class, chosen and measured
            likewise. It reads the label of the image that is scored: an expert that raises the logit of a class is best
            for this class, whatever it knows. So this is an upper bound, and never a score.
        by_image: effect of the expert with the lowest loss for the image itself, a higher bound of the same kind.
        images: number of images of classes with images in both halves.
    """

    by_prediction: Effect
    for_all: Effect
    by_class: Effect
    by_image: Effect
    images: int


@dataclass(frozen=True)
class LayerDiagnosis:
    """Figures of one MoE layer.

    Gates, confidence and load are of the tokens that something reads: with token routing in the last block of a ViT
    that is classified by its class token, that is the class token alone.

    Attributes:
        name: module name of the layer.
        num_experts: N.
        images: number of images that the figures are of.
        from_shared: distance of the experts from the shared expert, which descends from the parent's FFN as they do;
            None without one.
        from_mean: distance of the experts from their mean.
        gates: weight of the chosen experts together.
        router_confidence: mean over units of the router's largest weight of an expert (`Router.probabilities`).
        learns: True if the router can be trained: its gates are not constant, and it is not frozen.
        experts_per_unit: mean number of experts of a unit.
        load: (N,) share of all decisions by expert.
        effective_experts: exp(entropy of the load), 1 to N.
        permuted: effect of decisions that images exchange, as in `LayerEvidence`.
        dense: effect of a dense FFN in the layer's place, by method, as in `LayerEvidence`.
        oracle: effects of the best expert; None where images have no classes, or too few images.
    """

    name: str
    num_experts: int
    images: int
    from_shared: Distance | None
    from_mean: Distance
    gates: Gates
    router_confidence: float
    learns: bool
    experts_per_unit: float
    load: tuple[float, ...]
    effective_experts: Interval
    permuted: Effect
    dense: dict[str, Effect]
    oracle: Oracle | None


@dataclass(frozen=True)
class Finding:
    """A finding about some layers, and settings to try.

    Attributes:
        name: name of its rule in `vimoe.analysis.remedies.RULES`.
        layers: names of the layers, each with the figure that decided.
        says: finding in words.
        remedies: settings to try, the first one first; none where there is nothing to mend.
        because: reason for the remedies, with its source.
    """

    name: str
    layers: dict[str, str]
    says: str
    remedies: tuple[str, ...]
    because: str

    def __str__(self) -> str:
        where = ", ".join(f"{layer} ({figure})" for layer, figure in self.layers.items())
        advice = f"Try {', or '.join(self.remedies)}." if self.remedies else "Nothing to mend."
        return f"{self.name}: {self.says}: {where}.\n   {advice}"


@dataclass(frozen=True)
class Diagnosis:
    """Result of `vimoe.diagnose`.

    Attributes:
        base: score of the unchanged model on all validation images.
        images: number of images that gates, experts and oracle were measured on.
        sequences: number of videos that these are frames of; None if nothing says. Intervals are over these
            (`vimoe.analysis.intervals.over`).
        layers: figures of each layer, in forward order.
        findings: findings over all layers, the most urgent first; each layer is in at least one.
        without_oracle: reason, in words, for an oracle that was left out; "" otherwise.
        features: {"before": the first block that ran} if gates, experts and oracle were measured on cached features,
            as in `Evidence`; None if on images.
    """

    base: Score
    images: int
    sequences: int | None
    layers: tuple[LayerDiagnosis, ...]
    findings: tuple[Finding, ...]
    without_oracle: str = ""
    features: dict[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of diagnosis.json."""
        return {**asdict(self), "base": self.base.to_dict(), "confidence": CONFIDENCE}

    def __str__(self) -> str:
        widths = (-18, 12, 6, 8, 18, 5, 9, 27, 27)
        head = ("layer", "from shared", "apart", "cosine", "gate (5%-95%)", "sure", "in use", "permuted", "oracle")
        table = [
            " ".join(f"{cell:<{-w}}" if w < 0 else f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in (head, *map(_row, self.layers))
        ]
        source = f", from features before {self.features['before']}" if self.features else ""
        return "\n".join([
            f"The untouched model on validation: {self.base}{source}. Changes of the loss in nats have 95% intervals "
            f"{over(self.sequences)}.",
            *table,
            self._about_the_oracle(),
            *(f"{number}. {finding}" for number, finding in enumerate(self.findings[:MOST], 1)),
        ])  # fmt: skip

    def _about_the_oracle(self) -> str:
        if self.without_oracle:
            return f"No oracle: {self.without_oracle}."
        bounds = ", ".join(
            f"{each.oracle.by_class.loss.value:+.4f} and {each.oracle.by_image.loss.value:+.4f}"
            for each in self.layers
            if each.oracle
        )
        return (
            f"Oracle: the best expert of each predicted class, chosen on one half of {self.images} images and measured "
            f"on the other.\nBest expert of each true class and of each image, bounds that read the label and no "
            f"scores: {bounds}."
        )


def _row(layer: LayerDiagnosis) -> tuple[str, ...]:
    shared, gates = layer.from_shared, layer.gates
    cosine = (shared or layer.from_mean).cosine
    return (
        layer.name,
        "-" if shared is None else f"{shared.outputs:.2%}",
        f"{layer.from_mean.outputs:.2%}",
        "-" if cosine is None else f"{cosine:.5f}",
        f"{gates.mean:.2f} ({gates.low:.2f}-{gates.high:.2f})",
        f"{layer.router_confidence:.2f}",
        f"{layer.effective_experts.value:.1f} of {layer.num_experts}",
        str(layer.permuted.loss),
        "-" if layer.oracle is None else str(layer.oracle.by_prediction.loss),
    )
