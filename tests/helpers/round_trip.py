"""What tests of every library's models begin with: dense to MoE, to a folder, back from it, and dense again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from helpers.tiny import config, layers, perturb_experts
from torch import Tensor, nn

import vimoe


def round_trip(parent: nn.Module, x: Tensor, routing: str, folder: Path, **saved: Any) -> tuple[nn.Module, list[str]]:
    """Check that an upcycled model computes what its parent does, learns, is brought back, and becomes its parent.

    Args:
        parent: dense model in eval mode.
        x: images.
        routing: "image" or "token".
        folder: folder to save it in.
        saved: arguments of `vimoe.save`.

    Returns:
        The model that was loaded, and the names of its MoE layers.
    """
    model = vimoe.upcycle(copy.deepcopy(parent), config(routing=routing))
    names = [name for name, module in model.named_modules() if isinstance(module, vimoe.MoE)]
    assert vimoe.count(model).moe_layers == tuple(names)
    with vimoe.record(model) as routings:
        torch.testing.assert_close(model(x), parent(x), rtol=1e-4, atol=1e-4)
    assert all(each.batch[0] == len(x) for each in routings)
    perturb_experts(model)
    assert (model(x) - parent(x)).abs().max() > 1e-2 * parent(x).abs().max()
    model(x).square().sum().backward()
    assert all(each.router.weight.grad.any() for each in layers(model))
    with torch.no_grad():
        again = vimoe.load(vimoe.save(model, folder, **saved))
        torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-6)
    state = vimoe.densify(model).state_dict()
    assert list(state) == list(parent.state_dict())
    assert all(torch.equal(state[key], value) for key, value in parent.state_dict().items())
    return again, names
