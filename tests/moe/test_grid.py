"""Tokens on a grid, and FFNs of 1x1 convolutions: the same numbers as for tokens in a row, at their places."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.layers import DIM, IMAGES, TOKENS, make, tokens
from helpers.tiny import config, perturb_experts, randomise
from timm.layers import ConvMlp, GluMlp, LayerNorm2d, Mlp
from torch import Tensor, nn

import vimoe
from vimoe.errors import SurgeryError
from vimoe.moe import ffn
from vimoe.moe.grid import Grid
from vimoe.moe.router import TokenLayout

ROWS, COLUMNS = 2, 3
CONVOLUTIONS = {
    "mlp": lambda: Mlp(DIM, 12, use_conv=True),
    "mlp with a norm": lambda: Mlp(DIM, 12, use_conv=True, norm_layer=LayerNorm2d),
    "gated": lambda: GluMlp(DIM, 24, use_conv=True, bias=(True, False)),
    "conv mlp": lambda: ConvMlp(DIM, 12, drop=0.25),
}


def maps(seed: int = 0) -> Tensor:
    return torch.randn(IMAGES, DIM, ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", ["image by mean", "token"])
def test_a_grid_of_tokens_is_a_row_of_tokens(layout: str) -> None:
    layer, x = make(layout=layout), tokens()
    assert TOKENS == ROWS * COLUMNS
    grid = x.unflatten(1, (ROWS, COLUMNS))
    with vimoe.record(layer) as routings:
        y = layer(grid)
    assert routings[0].batch == (IMAGES, TOKENS)
    assert torch.equal(y.flatten(1, 2), layer(x)) and y.shape == grid.shape


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_become_linear_maps_and_come_back_bit_for_bit(name: str) -> None:
    dense = randomise(CONVOLUTIONS[name]()).eval()
    dense.fc1.weight.requires_grad_(False)
    linear, x = ffn.as_linear(dense), maps()
    assert type(linear) is type(dense) and type(linear.fc1) is nn.Linear and not linear.fc1.weight.requires_grad
    torch.testing.assert_close(linear(x.movedim(1, -1)).movedim(-1, 1), dense(x))
    back = ffn.build(dense, ffn.read(linear))
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in dense.state_dict().items())
    assert torch.equal(back(x), dense(x))


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_mixture_in_the_place_of_convolutions(name: str, routing: str) -> None:
    """Right after surgery it computes what they do; then what it computes for the same tokens in a row."""
    dense, x = randomise(CONVOLUTIONS[name]()).eval(), maps()
    layer = vimoe.MoE(copy.deepcopy(dense), config(routing=routing), TokenLayout(0, False)).eval()
    torch.testing.assert_close(layer(x), dense(x))
    perturb_experts(nn.Sequential(layer))
    assert not torch.allclose(layer(x), dense(x), atol=1e-2)
    in_a_row = layer._mixed(x.movedim(1, -1).flatten(1, 2))
    assert torch.equal(layer(x), in_a_row.mT.unflatten(2, (ROWS, COLUMNS)))
    back = layer.without_experts()
    assert type(back.fc1) is nn.Conv2d and torch.equal(back(x), dense(x))
    merged = layer.dense("merge", torch.full((4,), 0.25))
    assert type(merged.fc1) is nn.Conv2d and merged(x).shape == x.shape


def test_a_widened_ffn_of_convolutions_computes_what_it_did() -> None:
    dense, x = randomise(CONVOLUTIONS["conv mlp"]()).eval(), maps()
    wide = ffn.widen(dense, 2)
    assert wide.fc1.out_channels == wide.fc2.in_channels == 24
    torch.testing.assert_close(wide(x), dense(x))
    assert torch.equal(ffn.narrow(wide, 2)(x), dense(x))


@pytest.mark.parametrize("part", [nn.Conv2d(DIM, 12, 3, padding=1), nn.Conv2d(DIM, 12, 1, groups=2)])
def test_other_convolutions_are_refused(part: nn.Module) -> None:
    dense = CONVOLUTIONS["conv mlp"]()
    dense.fc1 = part
    with pytest.raises(SurgeryError, match="fc1 is a Conv2d: expected a plain nn.Linear, or 1x1 convolutions alone"):
        ffn.describe(dense)


def test_a_batch_norm_between_convolutions_is_refused() -> None:
    with pytest.raises(SurgeryError, match="it has the parameter norm.bias"):
        ffn.describe(ConvMlp(DIM, 12, norm_layer=nn.BatchNorm2d))


def test_tokens_are_placed_by_the_positions_of_a_shape_and_not_by_its_images() -> None:
    x = maps()
    grid = Grid(1)
    assert torch.equal(grid.placed(grid.tokens(x)[:1], x.shape), x[:1])
    assert torch.equal(Grid(-1).placed(tokens(), (7, TOKENS, DIM)), tokens())
