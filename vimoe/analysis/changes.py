"""Changes of the loss and of the share right by interventions on a layer, image by image; pure arrays.

A change of the loss can be calibration alone: outputs that are more sure or less sure of the same answers. With

    L*(z) = min_T mean_i cross-entropy(softmax(z_i / T), label_i)        (temperature T, one for all images)

and logits z of the untouched model and z' of the overruled one, the change that is more than a scale is
L*(z') - L*(z). It is 0 if z' = c z for any c > 0, where the loss itself changes, as long as both temperatures lie
inside of `vimoe.analysis.temperatures.GRID`. So each model has a temperature of its own (as Guo et al. fit it, arXiv
1706.04599). L* estimates the refinement loss of Berta et al. (arXiv 2501.19195), and the rest of a loss is its
calibration.

Axes: I images, V interventions on a layer, M temperatures of `vimoe.analysis.temperatures.GRID`; 0 of them if the
metric has no temperature (`Metric.calibrates`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vimoe.analysis.temperatures import fit_on_grid


class Fit(NamedTuple):
    """Changes of the loss in nats if each model has the temperature that fits it best.

    Attributes:
        change: (I, V) changes of each image by each intervention.
        before, after: temperatures of the untouched and of the overruled model.
    """

    change: np.ndarray
    before: float
    after: float


@dataclass(frozen=True)
class Changes:
    """Changes of each image by each intervention on a layer.

    Attributes:
        loss, right: (I, V) changes of the loss in nats, and of the share right.
        curves: (I, V, M) losses of the overruled model by temperature.
        untouched: (I, M) losses of the untouched model by temperature.
        base: (I, 2) loss and share right of the untouched model.
    """

    loss: np.ndarray
    right: np.ndarray
    curves: np.ndarray
    untouched: np.ndarray
    base: np.ndarray

    def columns(self, some: slice) -> Changes:
        """Return the changes by some of the interventions."""
        return Changes(self.loss[:, some], self.right[:, some], self.curves[:, some], self.untouched, self.base)

    def beside(self, more: Changes) -> Changes:
        """Return the changes by these interventions and by more of them, of the same untouched model."""
        loss, right, curves = (
            np.concatenate(pair, axis=1)
            for pair in ((self.loss, more.loss), (self.right, more.right), (self.curves, more.curves))
        )
        return Changes(loss, right, curves, self.untouched, self.base)

    def then(self, later: Changes) -> Changes:
        """Return the changes by these interventions and later ones, measured on the model that these gave."""
        return Changes(self.loss + later.loss, self.right + later.right, later.curves, self.untouched, self.base)

    def chosen(self, images: np.ndarray, columns: np.ndarray) -> Changes:
        """Return changes that are composed of those by several interventions, image by image.

        Args:
            images: (J,) numbers of the images that stay.
            columns: (J, Q) number of the intervention that each of them gets, for Q compositions.
        """
        rows = images[:, None]
        loss, right, curves = (each[rows, columns] for each in (self.loss, self.right, self.curves))
        return Changes(loss, right, curves, self.untouched[images], self.base[images])

    @property
    def calibrates(self) -> bool:
        """True if there are losses by temperature."""
        return self.untouched.shape[1] > 0

    def fit(self) -> Fit:
        """Return the changes at the temperatures that fit best; the overruled model has one for all interventions."""
        (before, untouched), (after, overruled) = fit_on_grid(self.untouched), fit_on_grid(self.curves)
        return Fit(overruled - untouched[:, None], before, after)
