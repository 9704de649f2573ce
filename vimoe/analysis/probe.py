"""Probe of single experts: each one alone, on the classes that it serves and on those that others serve.

MoDE (arXiv 2402.00893) probes experts so, each on the data of its own sub-task, according to its abstract. Here an
expert serves the classes whose images chose it most often. "Alone" means that every image or token gets this expert,
with the sum of the gates that the router gave it (`Only`): the rest of the network has been trained with that weight.

Axes: I images, C classes, N experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vimoe.analysis.intervals import Interval, mean_intervals
from vimoe.analysis.interventions import Only, Subjects, measure
from vimoe.errors import VimoeError
from vimoe.moe import MoE


@dataclass(frozen=True)
class Probe:
    """Figures of a layer with each expert alone. Group j is the images of the classes that expert j serves.

    Attributes:
        serves: (C,) number of the expert that serves each class; -1 for a class without images.
        images: (N,) number of images of each group.
        right, loss: (N, N) share right, and loss in nats, with expert i alone, of group j; None for an empty group.
        mixture_right, mixture_loss: (N,) those of the untouched model.
        advantage, advantage_loss: mean over images of the share right with the expert that serves the class alone,
            minus the mean of that over all other experts; and the same of the loss, with the sign that makes more
            better.
    """

    serves: tuple[int, ...]
    images: tuple[int, ...]
    right: tuple[tuple[float | None, ...], ...]
    loss: tuple[tuple[float | None, ...], ...]
    mixture_right: tuple[float | None, ...]
    mixture_loss: tuple[float | None, ...]
    advantage: Interval
    advantage_loss: Interval

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON knows them."""
        return asdict(self)


def check_probed(layers: Mapping[str, MoE], by_patch: bool, overrule: int | None) -> None:
    """Raise VimoeError for a model, labels, or a number of images that experts cannot be probed with."""
    if overrule == 0:
        raise VimoeError("probe=True with overrule=0: expected at least 2 images to measure on, or None for all")
    if by_patch:
        raise VimoeError(
            "probe=True on masks: expected labels of whole images, since patches have classes of their own"
        )
    for name, layer in layers.items():
        if not layer.router.overrulable or layer.config.num_experts < 2:
            what = f"moe.router={layer.config.router!r} and {layer.config.num_experts} experts"
            raise VimoeError(f"probe=True, but {name} has {what}: expected at least 2 that images can be sent to")


def probe(
    subjects: Subjects, layers: Mapping[str, MoE], tables: Mapping[str, np.ndarray], labels: np.ndarray,
    seed: int = 0, sequences: np.ndarray | None = None, task: str = "",
) -> dict[str, Probe]:  # fmt: skip
    """Return the probe of each layer. The others stay as they are.

    Args:
        subjects: the model, and the images to measure on.
        layers: MoE layers by name.
        tables: (C, N) how often images of each class chose each expert, by layer.
        labels: (I,) class of each of these images; below 0 for none.
        seed: draws resamples.
        sequences: sequences that are resampled for the intervals.
        task: name of the progress bar; none is shown without it.
    """
    plan = {name: [Only(expert) for expert in range(layer.config.num_experts)] for name, layer in layers.items()}
    found = {}
    for name, changes in measure(subjects, plan, task).items():
        before = changes.base.T
        alone = np.stack([before[0, :, None] + changes.loss, before[1, :, None] + changes.right])
        found[name] = _probe(alone, before, tables[name], labels, seed, sequences)
    return found


def _probe(
    alone: np.ndarray,
    before: np.ndarray,
    table: np.ndarray,
    labels: np.ndarray,
    seed: int,
    sequences: np.ndarray | None,
) -> Probe:
    """Return the probe from loss and share right: (2, I, N) of each expert alone, and (2, I) of the mixture."""
    number = table.shape[1]
    serves = np.where(table.any(axis=1), table.argmax(axis=1), -1)
    rows = np.flatnonzero(np.where(labels >= 0, serves[labels], -1) >= 0)
    group = serves[labels[rows]]
    images = np.bincount(group, minlength=number)

    def by_group(values: np.ndarray) -> tuple[float | None, ...]:
        sums = np.bincount(group, values[rows], number)
        return tuple(float(s / i) if i else None for s, i in zip(sums, images, strict=True))

    own = alone[:, rows, group]
    others = (alone[:, rows].sum(axis=2) - own) / (number - 1)
    better = np.stack([others[0] - own[0], own[1] - others[1]], axis=1)
    units = None if sequences is None else np.unique(sequences[rows], return_inverse=True)[1]
    advantage_loss, advantage = mean_intervals(better, seed, units)
    loss, right = (tuple(by_group(each[:, e]) for e in range(number)) for each in alone)
    return Probe(
        tuple(serves.tolist()), tuple(images.tolist()), right, loss, by_group(before[1]), by_group(before[0]),
        advantage, advantage_loss,
    )  # fmt: skip
