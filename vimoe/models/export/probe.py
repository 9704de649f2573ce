"""Images to compare an exported model on: between them they reach every expert, and rounding changes no route.

Axes: M images, N experts, R rows that are routed (images or tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vimoe.models.export.program import image_size
from vimoe.models.interface import logits_of
from vimoe.moe.layer import moe_layers
from vimoe.moe.routing import Routing, record

RANDOM = 8  # random images beside those that are given
STEPS, RATE = 40, 0.1  # of the ascent to an expert that no image has reached, in units of normalised images
AT_ONCE = 4  # images of an ascent
ROUNDING = 1e-5  # change of a score by the rounding of another runtime, with room to spare

Missing = list[tuple[str, int]]


@dataclass(frozen=True)
class Probe:
    """Images to compare on.

    Attributes:
        images: (M, channels, height, width).
        unreached: experts that none of them reached, by layer.
    """

    images: Tensor
    unreached: dict[str, list[int]]


def probe(model: nn.Module, images: Tensor | None = None) -> Probe:
    """Return images that reach as many experts as can be found.

    They are the given images and random ones. For each expert that gets none of their rows, an image is sought by
    gradient ascent on the margin of the expert's score. Images whose routes change if scores change by rounding are
    left out.

    Args:
        model: model as `to_export` gives it.
        images: (M, channels, height, width) normalised images, best of those that the model is for.
    """
    draw = torch.Generator().manual_seed(0)
    size = image_size(model)
    found = torch.randn(RANDOM, *size, generator=draw)
    if images is not None:
        found = torch.cat([images.cpu().float(), found])
    found, missing = sure_images(model, found)
    for some in [missing[at : at + AT_ONCE] for at in range(0, len(missing), AT_ONCE)]:
        sought = _ascend(model, some, torch.randn(len(some), *size, generator=draw))
        found = torch.cat([found, sought])
    found, missing = sure_images(model, found) if missing else (found, missing)
    unreached: dict[str, list[int]] = {}
    for name, expert in missing:
        unreached.setdefault(name, []).append(expert)
    return Probe(found, unreached)


def sure_images(model: nn.Module, images: Tensor) -> tuple[Tensor, Missing]:
    """Return the images whose routes rounding does not change (all, if it changes all), and what they do not reach."""
    layers, sure = moe_layers(model), torch.ones(len(images), dtype=torch.bool)
    with torch.no_grad(), record(model) as routings:
        logits_of(model, images)
        for routing in routings:
            for sign in (-1, 1):
                noise_RN = (
                    sign * ROUNDING * torch.rand(routing.logits.shape, generator=torch.Generator().manual_seed(0))
                )
                again = layers[routing.layer].router.route(routing.logits + noise_RN, routing.batch)
                changed_R = (again.chosen != routing.chosen).any(dim=1)
                sure[routing.image[changed_R]] = False
    if not sure.any():
        sure[:] = True
    rows = [(routing, sure[routing.image]) for routing in routings]
    idle = {routing.layer: ~routing.chosen[rows_R].any(dim=0) for routing, rows_R in rows}
    return images[sure], [(name, int(e)) for name, idle_N in idle.items() for e in idle_N.nonzero().flatten()]


@torch.enable_grad()
def _ascend(model: nn.Module, targets: Missing, start: Tensor) -> Tensor:
    """Return an image for each (layer, expert), moved until the expert gets a row of it, or for so many steps."""
    images = start.requires_grad_()
    optimizer = torch.optim.Adam([images], lr=RATE)
    for _ in range(STEPS):
        with record(model) as routings:
            logits_of(model, images)
        by_layer = {routing.layer: routing for routing in routings}
        margins = [_margin(by_layer[name], expert, i) for i, (name, expert) in enumerate(targets)]
        reached = [by_layer[name].usage[i, expert] > 0 for i, (name, expert) in enumerate(targets)]
        objective = torch.stack(margins).sum()
        if all(reached) or not objective.requires_grad:
            break
        optimizer.zero_grad()
        (-objective).backward()
        optimizer.step()
    return images.detach()


def _margin(routing: Routing, expert: int, image: int) -> Tensor:
    """Return the largest margin, over an image's rows, of an expert's score over the best of the others."""
    own_RN = routing.logits[routing.image == image]
    others_RN = own_RN.clone()
    others_RN[:, expert] = -torch.inf
    return (own_RN[:, expert] - others_RN.amax(dim=1)).clamp(max=1.0).amax()
