"""Memory of a real training step, measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def kept(model: nn.Module, forward: Callable[[], Tensor], *also: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once and no weight, and those of other tensors."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in also}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del result
    return sum(storage.nbytes() for place, storage in storages.items() if place not in weights)
