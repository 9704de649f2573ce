"""How a model's MoE layers are computed; never what they compute."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from vimoe.errors import ConfigError, nearest
from vimoe.moe.grouped import BACKENDS, Backend
from vimoe.upcycling import moe_layers

Model = TypeVar("Model", bound=nn.Module)


def set_backend(model: Model, backend: Backend) -> Model:
    """Chooses how the products of experts are computed, in place; returns the model. It is not saved with it.

    Args:
        model: with MoE layers, or one.
        backend: "auto" (what is fastest for the device and the type, `vimoe.moe.grouped.choose`), "loop", "grouped_mm"
            or "bmm" (padded to the largest load). `vimoe bench layer` shows what each costs.

    Raises:
        ConfigError: for another name.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r}: {nearest(backend, BACKENDS)}")
    for layer in moe_layers(model).values():
        layer.experts.backend = backend
    return model
