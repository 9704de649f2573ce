"""The oracle's lessons: which expert would have lost least, on images that no expert was trained on.

Axes: B images of a batch, H of them that teach, N experts, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.moe import MoE, Routing
from vimoe.moe.layer import moe_layers


def teaching(places: Sequence[int]) -> Tensor:
    """Return (B,) True for the images that teach routers and train nothing else: every second one of the data set."""
    return torch.tensor(places) % 2 == 1


class Oracle:
    """Teacher of routers by the losses that each expert alone would have, soft instead of cloned.

        oracle_loss = mean over layers and images of  -sum_e q_e log softmax(s)_e,   q = softmax(-l / tau)

    l_e is the cross-entropy of the image if expert e alone gets it, with the sum of the gates that it has
    (`Routing.only`), while all other layers decide as they do; s are the router's scores of it. l has no gradient, and
    s has one to the router alone, so labels of the images that teach reach nothing else. It is computed in eval mode.

    After the soft expert distillation of SERL (arXiv 2007.10835), whose equations were not at hand: there "experts" are
    demonstrators of a navigation, here the demonstration is the best expert of an image.

    Args:
        model: model with MoE layers.
        forward: function of the model and inputs that returns logits (B, classes).
        temperature: tau, in nats.
    """

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor], temperature: float) -> None:
        self.model, self.forward, self.temperature = model, forward, temperature

    def loss(self, images: Tensor, labels: Tensor, layers: Collection[str]) -> Tensor:
        """Return the loss of the routers of some layers, by name, on images that teach: a scalar, 0 without images."""
        lessons = []
        for name in layers if len(images) else ():
            router = self._layer(name).router
            x_HTD, losses_HN = self.tried(name, images, labels)
            scores_HN = router.score(router.feature(x_HTD))
            lessons.append(
                F.cross_entropy(scores_HN, (-losses_HN / self.temperature).softmax(dim=1).to(scores_HN.dtype))
            )
        return torch.stack(lessons).mean() if lessons else torch.zeros((), device=images.device)

    @torch.no_grad()
    def tried(self, name: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a layer gets for images (H, T, D), and the loss (H, N) of each image with each expert alone."""
        layer, inputs, losses = self._layer(name), list[Tensor](), list[Tensor]()
        training = self.model.training
        self.model.eval()
        try:
            with layer.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
                for expert in range(layer.config.num_experts):
                    with sent_to(layer, expert):
                        logits = self.forward(self.model, images)
                    losses.append(F.cross_entropy(logits.float(), labels, reduction="none"))
        finally:
            self.model.train(training)
        return inputs[0], torch.stack(losses, dim=1)

    def _layer(self, name: str) -> MoE:
        return moe_layers(self.model)[name]


@contextmanager
def sent_to(layer: MoE, expert: int) -> Iterator[None]:
    """Let a layer send every image (or token) to one expert alone inside the block, as `Routing.only`.

    Copy a model before the block: a copy that is made inside would ask the original's router for good.
    """
    router = layer.router
    route = router.route

    def only(logits_RN: Tensor, batch: tuple[int, int]) -> Routing:
        return route(logits_RN, batch).only(expert)

    router.route = only  # type: ignore[method-assign]
    try:
        yield
    finally:
        del router.route
