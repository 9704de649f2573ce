"""vimoe's operators in torch's own: the same results, and programs of all kinds of layers without the former."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.layers import EXPERTS, make, tokens
from helpers.slow import one_in
from torch import Tensor

import vimoe
from vimoe.config import moe
from vimoe.models.export.operators import PLAIN
from vimoe.models.export.program import program_of

VIMOE = torch.ops.vimoe


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("load", [[1, 0, 3, 2], [0, 0, 6, 0], [0, 0, 0, 1]])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_experts_are_the_same(load: list[int], bias: bool) -> None:
    slots, weight = sum(load), drawn(4, 7, 5)
    for x, source in ((drawn(slots, 3, 5), None), (drawn(4, 3, 5), torch.arange(slots) % 4)):
        args = (x, weight, drawn(4, 7) if bias else None, source, torch.tensor(load), "loop")
        torch.testing.assert_close(PLAIN[VIMOE.grouped_linear.default](*args), VIMOE.grouped_linear(*args))
    low = (drawn(slots, 3, 5), drawn(7, 5), drawn(7) if bias else None, drawn(4, 2, 5), drawn(4, 7, 2))
    args = (*low, torch.tensor(load), "loop")
    torch.testing.assert_close(PLAIN[VIMOE.low_rank_linear.default](*args), VIMOE.low_rank_linear(*args))


@pytest.mark.parametrize(("shared", "mix"), [(False, False), (True, False), (True, True)])
def test_combining_is_the_same(shared: bool, mix: bool) -> None:
    position = torch.tensor([[3, 0], [1, 5], [4, 2]])
    args = (drawn(6, 2, 5), drawn(3, 2).softmax(1), position, drawn(3, 2, 5, seed=1) if shared else None, mix, False)
    torch.testing.assert_close(PLAIN[VIMOE.combine.default](*args), VIMOE.combine(*args))


def test_scores_are_the_same() -> None:
    args = drawn(6, 5).to(torch.bfloat16), drawn(4, 5)
    torch.testing.assert_close(PLAIN[VIMOE.scores.default](*args), VIMOE.scores(*args))


def check_program(layer: vimoe.MoE) -> None:
    """A program of torch's operators alone, which computes what the layer does for 1 and 7 images."""
    layer, x = layer.eval().requires_grad_(False), tokens(7)
    program = program_of(layer, x[:2])
    assert not [node for node in program.graph.nodes if str(node.target).startswith("vimoe")]
    for batch in (1, 7):
        torch.testing.assert_close(program.module()(x[:batch]), layer(x[:batch]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", one_in(3, sorted(moe._BUILT_IN["router"])))
def test_every_router_makes_a_program(router: str) -> None:
    units = moe.ROUTERS.find(router).units
    layout = "token" if "token" in units else "image by class token"
    check_program(make(layout=layout, router=router, k=1 if router == "smear" else 2))


@pytest.mark.parametrize("experts", one_in(3, sorted(moe._BUILT_IN["experts"])))
def test_every_kind_of_experts_makes_a_program(experts: str) -> None:
    layer = make(layout="image by class token", experts=experts, k=1)
    assert layer.config.num_experts == EXPERTS
    check_program(layer)


@pytest.mark.parametrize("settings", [{"ffn": "swiglu, norm", "shared": 0}, {"gate": "sigmoid", "shared": 2}])
def test_other_layers_make_programs(settings: dict) -> None:
    check_program(make(**settings))


@pytest.mark.parametrize(
    ("layout", "orthogonal"),
    one_in(3, itertools.product(["image by class token", "token"], ["outputs", "normalized"])),
)
def test_layers_with_orthogonal_outputs_make_programs(layout: str, orthogonal: str) -> None:
    check_program(make(layout=layout, experts="lora", k=3, orthogonal=orthogonal))
