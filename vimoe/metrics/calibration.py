"""Calibration of a classifier: the error of its probabilities, and the one temperature that corrects them best.

The expected calibration error (Guo et al., arXiv 1706.04599, section 2) sorts images by their confidence, the
probability of the class that is named, into M = 15 bins B_m of equal width, ((m-1)/M, m/M]:

    ECE = sum_m |B_m|/n |accuracy(B_m) - confidence(B_m)| = 1/n sum_m |sum_{i in B_m} (right_i - confidence_i)|

so M sums decide it, and no logits are kept. A temperature T divides all logits: softmax(z / T). It is fitted by the
cross-entropy on validation (section 4.2). The order of the classes stays, and so does top-1.

Axes: B images of a batch, n all images.
"""

from __future__ import annotations

import copy
import math
from typing import Self

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from vimoe.errors import DataError, VimoeError
from vimoe.metrics.base import Counts, Metric, Score, check_range, check_shape
from vimoe.process import Alone, Process

BINS = 15
TEMPERATURES = (0.01, 100.0)  # `fit_temperature` gives none outside
_ROWS = 4096  # number of images whose logits are in float64 at a time


def calibration_gaps(confidence: Tensor, right: Tensor) -> Tensor:
    """Return (BINS,) sums of right - confidence over the images of each bin, in float64 on the CPU.

    Sums of several batches add up. The expected calibration error is the sum of their absolute values over n.

    Args:
        confidence: (B,) probability of the class that is named.
        right: (B,) True where that class is the label.
    """
    confidence, right = confidence.cpu().double(), right.cpu().double()
    inner = torch.arange(1, BINS, dtype=torch.float64) / BINS
    return torch.bincount(torch.bucketize(confidence, inner), right - confidence, minlength=BINS)


def fit_temperature(logits: Tensor, labels: Tensor, process: Process | None = None) -> float | None:
    """Return the temperature T with the lowest mean cross-entropy of softmax(logits / T), computed in float64.

    The cross-entropy is convex in 1 / T, so there is one minimum; it is sought within TEMPERATURES. If all images are
    right there is none, because the loss falls as T goes to 0; then it is None.

    Args:
        logits: (n, classes), of images that may decide; never those of test.
        labels: (n,) int64.
        process: this one of the processes that have shares of the images; all of them fit the same temperature.

    Raises:
        DataError: if there are no images, or a label is no class.
        VimoeError: if the loss of the logits is not finite.
    """
    process = process or Alone()
    if not (images := int(process.sum(torch.tensor(len(logits))))):
        raise DataError("0 images to fit a temperature on: expected at least one; give validation images")
    check_shape(labels, len(logits), f"({len(logits)},)", axes=1)
    check_range(labels, logits.shape[1])

    def loss(log_temperature: float) -> float:
        rows, scale = zip(logits.split(_ROWS), labels.split(_ROWS), strict=True), math.exp(-log_temperature)
        own = sum(float(F.cross_entropy(z.double() * scale, y, reduction="sum")) for z, y in rows)
        return float(process.sum(torch.tensor(own, dtype=torch.float64))) / images

    if not math.isfinite(found := loss(0.0)):
        raise VimoeError(f"the loss on validation is {found}: expected a model whose outputs are finite")
    if not int(process.sum((logits.argmax(dim=1) != labels).sum())):
        return None
    bounds = [math.log(each) for each in TEMPERATURES]
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


class KeptLogits(Counts):
    """Counts of a metric that keep the logits too, in float32 on the CPU, to fit and to try temperatures on.

    Args:
        metric: metric that `calibrates`.
        process: this one of the processes that have shares of the images; each keeps the logits of its own.
    """

    def __init__(self, metric: Metric, process: Process | None = None) -> None:
        self.metric, self.counts, self.batches = metric, metric.counts(), list[tuple[Tensor, Tensor]]()
        self.process = process or Alone()

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        self.counts.add(outputs, labels)
        self.batches.append((outputs.float().cpu(), labels.cpu()))

    def over(self, process: Process) -> Self:
        counts = copy.copy(self)
        counts.counts = self.counts.over(process)
        return counts

    def score(self) -> Score:
        return self.counts.score()

    def temperature(self) -> float | None:
        """Return the temperature that fits these images best, None if all are right. Raises as `fit_temperature`."""
        none = torch.empty(0, 1), torch.empty(0, dtype=torch.int64)
        logits, labels = zip(*self.batches, strict=True) if self.batches else ([each] for each in none)
        return fit_temperature(torch.cat(logits), torch.cat(labels), self.process)

    def at(self, temperature: float) -> dict[str, float]:
        """Return a temperature, and loss in nats and calibration error of these images with it, as JSON names them."""
        counts = self.metric.counts()
        for logits, labels in self.batches:
            counts.add(logits / temperature, labels)
        found = counts.over(self.process).score().columns
        return {"temperature": temperature, **{f"{name}_at_temperature": found[name] for name in ("loss", "ece")}}
