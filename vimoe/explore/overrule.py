"""Other decisions for MoE layers while a model looks at one image: the switches of the explorer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from vimoe.analysis.interventions import Only
from vimoe.errors import ConfigError, choice
from vimoe.moe import MoE, Routing
from vimoe.moe.layer import moe_layers

ROUTED, SHARED, OTHERS, EXPERT = "as routed", "shared expert alone", "routes of others", "expert "
Other = Callable[[str, Routing], Routing]  # decisions of other images, for a layer's name


def switches(layer: MoE) -> list[str]:
    """Return the names of what a layer can be told to do, the first of which is to do what its router says."""
    if not layer.router.overrulable:
        return [ROUTED]
    shared = [] if layer.shared is None else [SHARED]
    return [ROUTED, *shared, OTHERS, *(f"{EXPERT}{e}" for e in range(layer.config.num_experts))]


@contextmanager
def overruled(model: nn.Module, asked: Mapping[str, str], others: Other) -> Iterator[None]:
    """Let layers do what is asked, inside of the block.

    Args:
        model: model with MoE layers.
        asked: one of `switches` by layer name; layers that are not named do what their router says.
        others: function that returns decisions of other images.

    Raises:
        ConfigError: if there is no such layer, or it cannot do that.
    """
    layers = moe_layers(model)
    with ExitStack() as stack:
        for name, what in asked.items():
            if name not in layers:
                raise ConfigError(f"layer {name!r}: {choice(name, list(layers))}")
            layer = layers[name]
            if what not in switches(layer):
                raise ConfigError(f"{name}: {what!r}: {choice(what, switches(layer))}")
            if what != ROUTED:
                hook = layer.router.register_forward_hook(partial(_decide, layer, name, what, others))
                stack.callback(hook.remove)
        yield


def _decide(layer: MoE, name: str, what: str, others: Other, _router: nn.Module, _: Any, routing: Routing) -> Routing:
    if what == SHARED:  # experts without weight: both ways to combine then give the shared expert
        return replace(routing, gates=torch.zeros_like(routing.gates))
    if what == OTHERS:
        return others(name, routing)
    return Only(int(what.removeprefix(EXPERT)))(layer, routing, torch.arange(routing.batch[0]))
