"""The router "random": the softmax router, with rows that stay as they were drawn."""

from __future__ import annotations

from vimoe.moe.routers.softmax import SoftmaxRouter


class RandomRouter(SoftmaxRouter):
    """The softmax router with random rows that nothing trains: the control of what learning to route is worth.

    CLEAR-MoE (arXiv 2606.28516) found random and learnt routers of a frozen ViT within .06 points of one another. Rows
    are drawn as those of "softmax" are. Only they are fixed: a token goes elsewhere where the blocks before change its
    features, and a gradient of the scores reaches those blocks.

    Attributes:
        weight: (N, D), a buffer.
    """

    fixed = True
