"""The start "drop" against its formula, written for one expert after the other."""

from __future__ import annotations

import copy

import helpers.kinds  # noqa: F401  it registers kinds of experts
import pytest
import torch
from helpers.layers import FFNS
from helpers.tiny import config, images, layers, upcycle, vit
from timm.layers import Mlp
from torch import Tensor

import vimoe
from vimoe.moe import ffn
from vimoe.moe.router import TokenLayout


def started(dense: torch.nn.Module, **settings: object) -> vimoe.MoE:
    torch.manual_seed(0)
    layer = vimoe.MoE(dense, config(routing="token", init="drop", **settings), TokenLayout(0, False))
    torch.manual_seed(1)
    layer.start()
    return layer


def dropped(weights: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """The reference: one expert, with the random numbers that come next."""
    hidden = weights["fc2.weight"].shape[1]
    units = torch.randperm(hidden)[: round(ratio * hidden)]
    new = {name: w.clone() for name, w in weights.items()}
    for name in sorted(set(new) - {"fc2.bias"}):
        matrix = new[name].T if name == "fc2.weight" else new[name]
        for start in range(0, len(matrix), hidden):  # both halves of a gated FFN
            old = matrix[start + units]
            std = (old - old.mean()).square().mean().sqrt()
            matrix[start + units] = old.mean() + std * torch.randn_like(old)
    return new


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("dense", FFNS)
def test_each_expert_is_that_of_the_reference(dense: str, ratio: float) -> None:
    torch.manual_seed(2)
    parent = FFNS[dense]().double()
    weights = {name: w.detach().clone() for name, w in ffn.read(parent).items()}
    layer = started(parent, drop_ratio=ratio)
    torch.manual_seed(1)
    for e in range(4):
        expected = dropped(weights, ratio)
        assert layer.experts.weights(e).keys() == expected.keys()
        for name, w in layer.experts.weights(e).items():
            torch.testing.assert_close(w, expected[name], rtol=1e-12, atol=1e-12)


def test_the_same_units_are_drawn_anew_in_all_matrices_and_others_in_each_expert() -> None:
    parent = Mlp(64, 400)
    weights = {name: w.detach().clone() for name, w in ffn.read(parent).items()}
    layer = started(parent, drop_ratio=0.3)
    sets = []
    for e in range(4):
        own = layer.experts.weights(e)
        columns = (own["fc2.weight"] != weights["fc2.weight"]).all(0)
        assert columns.sum() == 120
        assert torch.equal((own["fc1.weight"] != weights["fc1.weight"]).all(1), columns)
        assert torch.equal(own["fc1.bias"] != weights["fc1.bias"], columns)
        assert torch.equal(own["fc1.weight"][~columns], weights["fc1.weight"][~columns])
        assert torch.equal(own["fc2.weight"][:, ~columns], weights["fc2.weight"][:, ~columns])
        assert torch.equal(own["fc2.bias"], weights["fc2.bias"])
        sets.append(columns)
    assert not any(torch.equal(sets[i], sets[j]) for i in range(4) for j in range(i))


def test_a_ratio_of_0_is_copy_bit_for_bit_and_another_changes_the_model() -> None:
    parent = vit()
    nothing, copied, some = (
        upcycle(copy.deepcopy(parent), config(**settings))
        for settings in ({"init": "drop", "drop_ratio": 0.0}, {}, {"init": "drop", "drop_ratio": 0.1})
    )
    for name, w in copied.state_dict().items():
        assert torch.equal(nothing.state_dict()[name], w)
    x = images(copied)
    with torch.no_grad():
        assert torch.equal(nothing(x), copied(x)) and not torch.allclose(some(x), copied(x), atol=1e-3)
    assert torch.equal(layers(some)[0].shared.fc1.weight, layers(copied)[0].shared.fc1.weight)


def test_only_experts_with_weights_of_their_own_are_drawn_anew() -> None:
    with pytest.raises(vimoe.VimoeError, match="init='drop' with experts='low_rank'.*use init='copy'"):
        vimoe.upcycle(vit(), config(init="drop", experts="low_rank"))
