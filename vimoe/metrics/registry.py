"""Kinds of scores: the metric that measures each, and the names that its figures are shown under. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vimoe.config.registry import Registry
from vimoe.errors import ConfigError


@dataclass(frozen=True)
class Shown:
    """Names for the figures of a score, by their keys in JSON and in metrics.csv.

    Attributes:
        shares: name of each share or error in 0..1; by the first one, the judge, the best epoch is chosen.
        right: key of the share that interventions change (`Metric.of_each_image`).
        counts_images: True if the first share counts independent images, so that their number gives its 95% margin.
        by_class: key of the shares of single classes, and their name; None where a score has none.
        limits: sentence about each limit of `Task.limits`, with {} in the place of its percentage.
    """

    shares: Mapping[str, str]
    right: str
    counts_images: bool = False
    by_class: tuple[str, str] | None = None
    limits: Mapping[str, str] = field(default_factory=dict)

    @property
    def judge(self) -> str:
        """Key of the share by which the best epoch is chosen."""
        return next(iter(self.shares))

    @property
    def judge_name(self) -> str:
        """Name of that share."""
        return self.shares[self.judge]

    @property
    def right_name(self) -> str:
        """Name of the share that interventions change."""
        return self.shares[self.right]


METRICS = Registry(
    "metric",
    {
        "classification": "vimoe.metrics.classification:ClassificationMetric",
        "segmentation": "vimoe.metrics.segmentation:SegmentationMetric",
    },
)
SCORES = Registry(
    "kind of score",
    {
        "classification": Shown(
            {"top1": "top-1", "top5": "top-5", "ece": "calibration error"}, "top1", counts_images=True
        ),
        "segmentation": Shown(
            {"miou": "mean IoU", "pixel_accuracy": "pixel accuracy"},
            "pixel_accuracy",
            by_class=("per_class_iou", "IoU"),
            limits={"patch_ceiling": "With one correct label for each patch, mean IoU on validation would be {}%."},
        ),
    },
)


def kind_of(figures: Mapping[str, Any]) -> str:
    """Return the kind of a score in JSON, or of a row of metrics.csv, which neither names it.

    The key of the judge tells the kind, so no two kinds may have the same.

    Args:
        figures: figures of the score by key, and whatever stands beside them.

    Raises:
        KeyError: if they are the figures of no kind, or of several.
    """
    kinds = [kind for kind, names in SCORES.items() if names.judge in figures]
    if len(kinds) != 1:
        judges = ", ".join(names.judge for names in SCORES.values())
        raise KeyError(f"expected one of the scores {judges} among {', '.join(figures)}")
    return kinds[0]


def check_shown(metric: str) -> None:
    """Raise ConfigError for a metric that no figures could be read back of.

    Args:
        metric: name that needs an entry in METRICS and in SCORES, with a judge that no other kind shows.
    """
    METRICS.check(metric)
    SCORES.check(metric)
    names = SCORES[metric]
    for kind, other in SCORES.items():
        if kind != metric and (names.judge in other.shares or other.judge in names.shares):
            key = names.judge if names.judge in other.shares else other.judge
            raise ConfigError(
                f"the scores {metric!r} and {kind!r} both show {key!r}, which one of them is recognised by: expected "
                f"another name; rename it in SCORES"
            )


def shown(figures: Mapping[str, Any]) -> Shown:
    """Return the names for the figures of a score. Raises KeyError as `kind_of`."""
    names: Shown = SCORES[kind_of(figures)]
    return names
