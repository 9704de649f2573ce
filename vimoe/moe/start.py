"""The contract of a start (`moe.init`): how experts begin to differ from the dense FFN; and the images it may need.

Axes: I images, B images of a batch, T tokens of an image, D channels, R rows that are routed (images or tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from vimoe.config.moe import EXPERTS, MoEConfig
from vimoe.errors import ConfigError, SurgeryError
from vimoe.moe.experts import Experts
from vimoe.moe.router import Router


@dataclass(frozen=True)
class Calibration:
    """Training images as one FFN of the dense model sees them, and what its router and classifier would read of them.

    Attributes:
        features: (R, D) float32, what a router of this layer would read: of each image, or of some of its tokens.
        image: (R,) int64, number of the image of each row.
        labels: (I,) int64, class of each image; None where labels are no classes of images.
        pooled: (I, E) float32, what the dense model's classifier reads; None where it reads nothing.
        num_classes: number of classes of the model; labels are below it, unless it is 0.
        inputs: function that runs the dense model again; it yields the FFN's input (B, T, D) batch by batch.
    """

    features: Tensor
    image: Tensor
    labels: Tensor | None
    pooled: Tensor | None
    num_classes: int
    inputs: Callable[[], Iterator[Tensor]]


class Start:
    """The start "copy", and the base of the others: experts stay what their constructor made them, the dense FFN.

    A start is a subclass, and an entry in `vimoe.config.moe.STARTS`. It changes experts, and may set the rows of a
    router, before the layer enters the model. The shared expert always starts as the dense FFN.

    Attributes:
        needs_images: True if it reads a `Calibration`.
        keeps_function: True if each expert still computes what the dense FFN does; else `vimoe.plan` measures the
            change.
        sets_weights: True if it calls `Experts.set_weights`.
        sets_rows: True if it sets the rows of the router's `weight`.
        pieces: True if the experts, each times 1 / top_k, add up to one FFN (`vimoe.densify` with how="whole").

    Args:
        config: settings of the layer.

    Raises:
        ConfigError: if the settings contradict this start.
    """

    needs_images = False
    keeps_function = True
    sets_weights = False
    sets_rows = False
    pieces = False

    def __init__(self, config: MoEConfig) -> None:
        self.config = config
        if config.groups is not None and self.sets_rows:
            raise ConfigError(
                f"groups={list(config.groups)} with init={config.init!r}, which parts the FFN or its inputs among all "
                f"experts: expected experts that each begin as the whole FFN; use init='copy'"
            )
        if EXPERTS.find(config.experts).separate:
            return
        for wrong, name, remedy in (
            (self.sets_weights, f"init={config.init!r}", "use init='copy'"),
            (config.expert_width is not None, f"expert_width={config.expert_width}", "leave it out"),
        ):
            if wrong:
                raise ConfigError(
                    f"{name} with experts={config.experts!r}: expected experts with weights of their own, such as "
                    f"'ffn'; {remedy}"
                )

    def width(self, hidden: int) -> int:
        """Return the number of hidden units of an expert, for an FFN with `hidden` of them.

        It follows from the settings alone, because a model folder is rebuilt from these. A layer notes it in
        `expert_width` of its own settings.
        """
        return self.config.expert_width or hidden

    def check(self, experts: Experts, router: Router, hidden: int) -> None:
        """Raise SurgeryError if a new layer cannot start so. A pruned layer, rebuilt from a folder, is not checked.

        Args:
            experts: experts of the new layer.
            router: its router.
            hidden: number of hidden units of the dense FFN.
        """
        parts = hidden // experts.kind.hidden
        pools = self.config.pools
        if any(size % parts for size in pools):
            whole = [parts * math.ceil(size / parts) for size in pools]
            name, found, remedy = (
                ("num_experts", pools[0], whole[0]) if self.config.groups is None else ("groups", list(pools), whole)
            )
            raise SurgeryError(
                f"{name}={found} with experts of {experts.kind.hidden} of {hidden} hidden units: expected a multiple "
                f"of {parts}, so that all parts of the FFN have as many experts; use {name}={remedy}"
            )
        if parts > 1 and router.reads_weights:
            raise SurgeryError(
                f"router={self.config.router!r} with experts of {experts.kind.hidden} of {hidden} hidden units: "
                f"expected experts of all of them, since it takes means of weights; leave out expert_width, or "
                f"init='split'"
            )
        learnt = dict(router.named_parameters(recurse=False)).get("weight")
        has_rows = learnt is not None and learnt.shape == (experts.num_experts, experts.kind.dim)
        if self.sets_rows and (router.needs_images or not has_rows):
            raise SurgeryError(
                f"init={self.config.init!r} with router={self.config.router!r}: expected a router that learns a row "
                f"of D weights for each expert, which this start sets; use router='softmax'"
            )

    def __call__(self, experts: Experts, router: Router, seen: Calibration | None) -> None:
        """Change the experts, and where it belongs to the start the router, in place.

        Args:
            experts: experts of a new layer, all equal to the dense FFN (or to parts of it, with `expert_width`).
            router: its router.
            seen: what the dense model computes at this layer; None unless `needs_images`.
        """
