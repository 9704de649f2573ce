"""The router "superclass": images go to experts by groups of classes that the dense model confuses.

Axes: B images of a batch, I images to start from, C classes, N experts, D channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vimoe.config.moe import MoEConfig
from vimoe.errors import ConfigError
from vimoe.moe.confusions import confusions, groups_of, linear_classifier
from vimoe.moe.router import TokenLayout
from vimoe.moe.routers.softmax import SoftmaxRouter
from vimoe.moe.start import Calibration

logger = logging.getLogger(__name__)


class SuperclassRouter(SoftmaxRouter):
    """Softmax over the scores and the k best, with an expert for each super-class, as in Mobile V-MoE (2309.04354).

    The N super-classes are groups of classes that the dense model confuses with one another (`confusions`,
    `groups_of`). The rows start as a linear classifier of super-classes, so that images go to their expert from the
    first step on. In training the loss -sum_i m_i log softmax(scores)_i is added, with m_i the mass that the labels
    give to super-class i, as a mean over images and layers, times `train.route_loss`.

    The source has confusions of the trained model on training images, and learns the router from random rows. Here a
    fresh head has no confusions, so those of a linear classifier on the model's features stand for them.

    Attributes:
        superclass: (C,) int64, expert of each class; -1 for a class without one, which was in no image or whose expert
            was removed: its images go where the scores send them.
    """

    units = ("image",)
    needs_images = True
    supervised = True
    superclass: Tensor

    def __init__(self, dim: int, config: MoEConfig, layout: TokenLayout, like: Tensor) -> None:
        super().__init__(dim, config, layout, like)
        self.register_buffer("superclass", torch.zeros(0, dtype=torch.int64, device=like.device))

    @classmethod
    def check_classes(cls, config: MoEConfig, classes: int) -> None:
        if not 2 <= config.num_experts <= classes:
            raise ConfigError(
                f"num_experts={config.num_experts} with router='superclass' and images of {classes} classes: expected "
                f"2 experts or more, and a class for each; change num_experts"
            )

    @torch.no_grad()
    def calibrate(self, seen: Calibration) -> None:
        assert seen.labels is not None and seen.pooled is not None  # `vimoe.models.calibration` sees to it
        n, known = self.config.num_experts, seen.labels.unique()
        self.check_classes(self.config, len(known))
        if len(seen.labels) < 2 * len(known):
            raise ConfigError(
                f"{len(seen.labels)} calibration images of {len(known)} classes with router='superclass': expected 2 "
                f"or more of a class; raise moe.calibration_images, or use router='centroids'"
            )
        if missing := seen.num_classes - len(known):
            logger.warning(
                "router='superclass': %d of %d classes are in no calibration image and get no expert of their own; "
                "raise moe.calibration_images", missing, seen.num_classes,
            )  # fmt: skip
        expert_C = torch.full((seen.num_classes,), -1)
        place_I = torch.bucketize(seen.labels, known)
        expert_C[known] = groups_of(confusions(seen.pooled, place_I), n)
        self.superclass = expert_C.to(self.superclass.device)
        self.weight.copy_(linear_classifier(seen.features, expert_C[seen.labels]))

    def label_loss(self, logits_RN: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of the scores with the super-classes, a mean over images, in nats."""
        classes = len(self.superclass)
        mass_BC = (F.one_hot(targets, classes) if targets.ndim == 1 else targets).to(logits_RN.dtype)
        belongs_CN = self.superclass[:, None] == torch.arange(self.config.num_experts, device=self.superclass.device)
        return F.cross_entropy(logits_RN, mass_BC @ belongs_CN.to(mass_BC.dtype))

    def keep(self, kept: Sequence[int]) -> None:
        super().keep(kept)
        new_C = torch.full_like(self.superclass, -1)
        for number, expert in enumerate(kept):
            new_C[self.superclass == expert] = number
        self.superclass = new_C

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state.get(f"{prefix}superclass")
        if stored is not None:  # a new router does not know the number of classes
            self.superclass = torch.empty_like(stored, device=self.superclass.device)
        super()._load_from_state_dict(state, prefix, *args)
