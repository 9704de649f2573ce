"""Scores of how far to trust a prediction: familiarity of the image, and how likely the named class is right.

Both read what the classifier of the model reads, the features, so they cost no further forward pass.

Axes: B images, D features, n images of a role.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from scipy.stats import rankdata
from torch import Tensor, nn

from vimoe.analysis.correctness import FOLDS, Correctness
from vimoe.analysis.familiarity import Familiarity
from vimoe.errors import FolderError
from vimoe.files import written_whole
from vimoe.metrics.base import Batches, batches, metric_of
from vimoe.metrics.calibration import calibration_gaps
from vimoe.models.interface import find_backbone, logits_of

RESAMPLES = 1000  # of the judged images, for the interval of a difference


class Seen(NamedTuple):
    """Logits (n, classes), features (n, D) and labels (n,) of images, on the CPU."""

    logits: Tensor
    features: Tensor
    labels: Tensor

    @property
    def right(self) -> Tensor:
        """(n,) True where the class of the largest logit is the label."""
        return self.logits.argmax(dim=1) == self.labels

    def part(self, start: int) -> Seen:
        """Return every second image, from a place on."""
        return Seen(*(each[start::2] for each in self))


def observed(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (B, classes), and the features (B, D) that the first classifier reads; float32, on the CPU.

    Raises:
        SurgeryError: if the model belongs to no family, so that its classifier is not known.
    """
    read: list[Tensor] = []
    classifier = find_backbone(model).classifiers[0]
    with torch.no_grad(), classifier.register_forward_pre_hook(lambda _, args: read.append(args[0])):
        logits = logits_of(model, x)
    return logits.float().cpu(), read[0].float().cpu()


def see(model: nn.Module, loader: Batches, bar: str = "", metric: str | None = None) -> Seen:
    """Return what a model gives for all images of a loader; arguments as of `vimoe.metrics.base.evaluate`."""
    found = []
    for start, labels in batches(metric_of(model, metric), loader, bar):
        with start.resumed(model) as x:
            found.append(Seen(*observed(model, x), labels.cpu()))
    return Seen(*(torch.cat(each) for each in zip(*found, strict=True)))


class Trust(nn.Module):
    """The two scores of a prediction, fitted to one model.

    Attributes:
        familiarity: score of the image.
        correctness: score of the named class; None if validation had too few right or wrong images to fit it.
    """

    def __init__(self, familiarity: Familiarity, correctness: Correctness | None) -> None:
        super().__init__()
        self.familiarity, self.correctness = familiarity, correctness

    @torch.no_grad()
    def of(self, logits: Tensor, features: Tensor) -> list[dict[str, float]]:
        """Return {"familiarity", "correct"} of each image, in 0..1, given what `observed` returns of them."""
        scores = {"familiarity": self.familiarity(features)}
        if self.correctness is not None:
            scores["correct"] = self.correctness(logits, features)
        return [dict(zip(scores, row, strict=True)) for row in torch.stack(list(scores.values()), dim=1).tolist()]

    def save(self, path: Path) -> None:
        """Write the weights of both as safetensors."""
        with written_whole(path) as out:
            out.write(safetensors.torch.save(self.state_dict()))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises FolderError for another file."""
        try:
            state = safetensors.torch.load_file(path)
            dim, known = state["familiarity.mean"].shape[0], state["familiarity.known"].shape[0]
            trust = cls(Familiarity(dim, known), Correctness(dim) if "correctness.mean" in state else None)
            trust.load_state_dict(state)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise FolderError(
                f"{path} cannot be read ({error}): expected what vimoe trust wrote; run it again"
            ) from error
        return trust


def fit_trust(train: Tensor, validation: Seen, seed: int = 0) -> tuple[Trust, dict[str, Any]]:
    """Fit both scores, and judge the second on images that it was not fitted on.

    Familiarity is fitted on the training images, without labels, and calibrated on validation. Correctness is fitted on
    every second image of validation and judged on the others, beside the maximum softmax probability of the same.

    Args:
        train: (n, D) features of training images.
        validation: images that the model was not trained on, in the order of their classes or at random.
        seed: seed of the networks and resamples.

    Returns:
        The scores, and {"train_images", "validation_images", "fitted_on", "judged_on", "right": share that is right of
        those judged, "correct", "max_probability": {"auroc", "ece"} each, "auroc_difference": {"value", "low", "high"}
        of the first minus the second}; without correctness the last six are missing. The AUROC is the probability that
        an image with the right class has a larger score than one with a wrong class; the interval is the 95% percentile
        interval over resampled images.
    """
    familiarity = Familiarity(train.shape[1], len(validation.labels), seed).fit(train, validation.features)
    facts: dict[str, Any] = {"train_images": len(train), "validation_images": len(validation.labels)}
    fitted, judged = validation.part(0), validation.part(1)
    if min(_fewest(each.right) / least for each, least in ((fitted, FOLDS), (judged, 1))) < 1:
        return Trust(familiarity, None), facts
    correctness = Correctness(train.shape[1]).fit(fitted.logits, fitted.features, fitted.right)
    right = judged.right.numpy()
    scores = {
        "correct": correctness(judged.logits, judged.features),
        "max_probability": judged.logits.softmax(dim=1).amax(dim=1),
    }
    facts |= {"fitted_on": len(fitted.right), "judged_on": len(right), "right": float(right.mean())}
    for name, score in scores.items():
        ece = float(calibration_gaps(score, judged.right).abs().sum()) / len(right)
        facts[name] = {"auroc": auroc(score.numpy(), right), "ece": ece}
    facts["auroc_difference"] = _difference(scores["correct"].numpy(), scores["max_probability"].numpy(), right, seed)
    return Trust(familiarity, correctness), facts


def in_words(facts: dict[str, Any]) -> str:
    """Return the facts of `fit_trust` as lines for a person."""
    familiarity = (
        f"familiarity: the share of {facts['validation_images']} validation images that are no more familiar than an "
        f"image to a network fitted on {facts['train_images']} training images"
    )
    if "correct" not in facts:
        return (
            f"{familiarity}\nno score of how likely a class is right: validation has too few images that the model "
            f"gets right, or too few that it gets wrong"
        )
    ours, plain, gap = facts["correct"], facts["max_probability"], facts["auroc_difference"]
    more = "tells more" if gap["low"] > 0 else "tells less" if gap["high"] < 0 else "is not shown to tell more or less"
    return (
        f"{familiarity}\nchance to be right: fitted on {facts['fitted_on']} validation images, judged on "
        f"{facts['judged_on']} others: AUROC {ours['auroc']:.3f}, calibration error {ours['ece']:.1%}; the maximum "
        f"probability has {plain['auroc']:.3f} and {plain['ece']:.1%}\nit {more} than the maximum probability "
        f"about which predictions are right: difference of AUROC {gap['value']:+.3f} "
        f"[{gap['low']:+.3f}, {gap['high']:+.3f}]"
    )


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the area under the ROC curve: P(a positive scores higher than a negative), ties counted half.

    It is scikit-learn's `roc_auc_score`, which takes 3 to 24 times as long (of 25,000 scores and of 500), too long for
    the thousands of resamples of an interval.

    Args:
        scores: (n,).
        positive: (n,) bool, with both values.
    """
    p, n = positive.sum(), (~positive).sum()
    return float((rankdata(scores)[positive].sum() - p * (p + 1) / 2) / (p * n))


def _fewest(right: Tensor) -> int:
    """Return the number of right images, or of wrong ones where these are fewer."""
    return min(int(right.sum()), int((~right).sum()))


def _difference(ours: np.ndarray, theirs: np.ndarray, right: np.ndarray, seed: int) -> dict[str, float]:
    """Return the difference of two AUROC on the same images, with its interval."""
    random = np.random.default_rng(seed)
    kinds = np.flatnonzero(right), np.flatnonzero(~right)  # resampled each for itself, so that none is ever missing
    drawn = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([random.choice(kind, len(kind)) for kind in kinds])
        drawn.append(auroc(ours[rows], right[rows]) - auroc(theirs[rows], right[rows]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": auroc(ours, right) - auroc(theirs, right), "low": float(low), "high": float(high)}
