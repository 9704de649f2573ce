"""The locality loss: images go to experts that have moved little since the task began.

Axes: L layers, N experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vimoe.moe import MoE, Routing


class Locality:
    """Weights of the experts as a task found them, and the loss of routers by the distance from there.

        L_loc = 1/L sum over layers of  sum_m P_m |w^m - w_0^m|

    P_m is the mean probability of expert m over the rows of the batch, w^m are its weights, w_0^m those at the
    beginning of the task (without tasks, of the training). The Euclidean norm |.| has no gradient here. So the loss
    trains routers, and the blocks before them, as every loss of scores does, and no expert by its distance. An expert
    that knows similar images already has to move less for them.

    Source: Li et al., arXiv 2406.16437, sum_m pi_m |w_t^m - w_(t-1)^m| with a round t for each task; the formula is
    from memory. There one expert is moved in a round, by a closed form; here all that get images, step by step.

    Args:
        layers: MoE layers by name, as the task begins.
    """

    def __init__(self, layers: Mapping[str, MoE]) -> None:
        self.layers = layers
        self.began = {name: [p.detach().clone() for p in _of_each(layer)] for name, layer in layers.items()}

    @torch.no_grad()
    def distances(self, name: str) -> Tensor:
        """Return (N,) the distance of each expert of a layer from where it began."""
        pairs = zip(_of_each(self.layers[name]), self.began[name], strict=True)
        return torch.stack([(now - was).flatten(1).square().sum(dim=1) for now, was in pairs]).sum(dim=0).sqrt()

    def loss(self, routings: Sequence[Routing]) -> Tensor:
        """Return the loss of the decisions of a step, a scalar."""
        losses = [routing.probabilities.mean(dim=0) @ self.distances(routing.layer) for routing in routings]
        return torch.stack(losses).mean()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights at the beginning, for a checkpoint."""
        return dict(self.began)

    def load_state_dict(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Take the weights at the beginning from a checkpoint."""
        for name, kept in state.items():
            for mine, stored in zip(self.began[name], kept, strict=True):
                mine.copy_(stored)


def _of_each(layer: MoE) -> list[Tensor]:
    """Return the parameters that each expert has for itself, (N, ...)."""
    roles = layer.experts.roles
    return [p for name, p in layer.experts.named_parameters() if roles[name].per_expert]
