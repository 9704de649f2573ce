"""What tests of the last block share: the same outputs and gradients, with less work."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vimoe
from vimoe.models.interface import find_backbone, logits_of

IN_FLOAT64 = {"rtol": 0, "atol": 1e-12}


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model in float64 that computes everything, and a copy that computes what is read."""
    whole = vimoe.set_reading(model.double(), "all")
    return whole, vimoe.set_reading(copy.deepcopy(whole))


def inputs(model: nn.Module, batch: int = 3) -> Tensor:
    size = find_backbone(model).input_size
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def descend(model: nn.Module, x: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of the cross-entropy."""
    torch.manual_seed(seed)
    model.zero_grad()
    logits = logits_of(model, x)
    F.cross_entropy(logits, torch.arange(len(x)) % logits.shape[-1]).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(whole: nn.Module, narrow: nn.Module, x: Tensor) -> None:
    """Outputs and all gradients are equal, and so is which parameters have one."""
    (logits, gradients), (ours, found) = descend(whole, x), descend(narrow, x)
    torch.testing.assert_close(ours, logits, **IN_FLOAT64)
    assert gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(
                found[name], gradient, **IN_FLOAT64, msg=lambda text, name=name: f"{name}: {text}"
            )
