"""The contract of a start (`moe.init`): how experts begin to differ from the dense FFN; and the images it may need.

Axes: I images, B images of a batch, T tokens of an image, D channels, R rows that are routed (images or tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from vimoe.config.moe import EXPERTS, MoEConfig
from vimoe.errors import ConfigError
from vimoe.moe.experts import Experts
from vimoe.moe.router import Router


@dataclass(frozen=True)
class Calibration:
    """What the dense model computes for some training images, as one of its FFNs sees it.

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
        keeps_function: True if each expert still computes what the dense FFN does.
        sets_weights: True if it calls `Experts.set_weights`.

    Args:
        config: settings of the layer.

    Raises:
        ConfigError: if the settings contradict this start.
    """

    needs_images = False
    keeps_function = True
    sets_weights = False

    def __init__(self, config: MoEConfig) -> None:
        self.config = config
        if self.sets_weights and not EXPERTS.find(config.experts).separate:
            raise ConfigError(
                f"init={config.init!r} with experts={config.experts!r}: expected experts with weights of their own, "
                f"such as 'ffn'; use init='copy'"
            )

    def __call__(self, experts: Experts, router: Router, seen: Calibration | None) -> None:
        """Change the experts, and where it belongs to the start the router, in place.

        Args:
            experts: experts of a new layer, all equal to the dense FFN (or to parts of it, with `expert_width`).
            router: its router.
            seen: what the dense model computes at this layer; None unless `needs_images`.
        """
