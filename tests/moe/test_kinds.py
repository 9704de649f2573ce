"""Kinds of tokens that the caller says: a model of two kinds of tokens, in any places."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.layers import DIM, HIDDEN, tokens
from helpers.tiny import config, layers, randomise
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vimoe

SETTINGS = {"layers": ["1"], "num_experts": 5, "groups": [2, 3], "routing": "token"}


def fused() -> nn.Module:
    """A model of no family, whose second FFN has pools of two and three experts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), Mlp(DIM, HIDDEN))
    model = randomise(vimoe.upcycle(model, vimoe.MoEConfig(**SETTINGS)))
    nn.init.normal_(model[1].router.weight)
    return model


def expected_pool(routing: vimoe.Routing) -> Tensor:
    return (routing.experts[:, 0] >= 2).long()


@pytest.mark.parametrize("kinds", [torch.tensor([1, 0, 0, 1, 1, 0]), torch.randint(0, 2, (7, 6))], ids=["T", "BT"])
def test_tokens_go_to_the_pool_of_their_kind(kinds: Tensor) -> None:
    model, x = fused(), tokens(7)
    with vimoe.token_kinds(model, kinds), vimoe.record(model) as routings:
        y = model(x)
    assert torch.equal(expected_pool(routings[0]), kinds.expand(7, 6).flatten())
    assert torch.equal(routings[0].kinds, kinds.expand(7, 6).flatten())
    with vimoe.token_kinds(model, 1 - kinds):
        assert not torch.allclose(model(x), y)


def test_outside_of_the_block_kinds_are_not_known() -> None:
    model, x = fused(), tokens(2)
    for _ in range(2):
        with pytest.raises(vimoe.VimoeError, match=r"groups=\[2, 3\] and tokens whose kinds are not known: expected a"):
            model(x)
        with vimoe.token_kinds(model, torch.zeros(6, dtype=torch.long)):
            model(x)


def test_blocks_nest_and_end_after_an_error() -> None:
    model, zeros, ones = fused(), torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.long)
    with vimoe.token_kinds(model, zeros), vimoe.record(model) as routings:
        with pytest.raises(RuntimeError, match="inner"), vimoe.token_kinds(model, ones):
            model(tokens())
            raise RuntimeError("inner")
        model(tokens())
    assert [int(expected_pool(each).sum()) for each in routings] == [18, 0]
    assert layers(model)[0].router.kinds is None


def test_in_a_vit_they_hold_in_place_of_prefix_and_patches() -> None:
    from vimoe.moe.router import TokenLayout

    layer = vimoe.MoE(Mlp(DIM, HIDDEN), config(groups=[1, 3], routing="token"), TokenLayout(1, True))
    assert (layer.router(tokens(1)).experts[:, 0] == 0).tolist() == [True, *[False] * 5]
    with vimoe.token_kinds(layer, torch.tensor([1, 1, 1, 1, 1, 0])):
        assert (layer.router(tokens(1)).experts[:, 0] == 0).tolist() == [*[False] * 5, True]


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (torch.tensor([0, 1, 2, 0, 0, 0]), "expected integers from 0 to 1"),
        (torch.tensor([0, -1, 0, 0, 0, 0]), "expected integers from 0 to 1"),
        (torch.zeros(6), "expected integers from 0 to 1"),
        (torch.zeros(0, dtype=torch.long), "expected integers from 0 to 1"),
        (
            torch.zeros(5, dtype=torch.long),
            r"kinds of tokens \(5,\) for 3 images of 6 tokens: expected \(6,\) or \(3, 6\)",
        ),
        (torch.zeros(2, 6, dtype=torch.long), r"expected \(6,\) or \(3, 6\)"),
    ],
    ids=str,
)
def test_wrong_kinds_are_refused_in_one_line(kinds: Tensor, message: str) -> None:
    model = fused()
    with pytest.raises(vimoe.VimoeError, match=message), vimoe.token_kinds(model, kinds):
        model(tokens())
    assert layers(model)[0].router.kinds is None


def test_a_model_without_pools_is_refused() -> None:
    plain = vimoe.upcycle(nn.Sequential(Mlp(DIM, HIDDEN)), vimoe.MoEConfig(layers=["0"], routing="token"))
    with (
        pytest.raises(vimoe.VimoeError, match="a model without pools of experts: expected MoE layers with moe.groups"),
        vimoe.token_kinds(plain, torch.zeros(6, dtype=torch.long)),
    ):
        pass


def test_checkpointing_computes_the_same_if_the_backward_pass_is_in_the_block() -> None:
    model, kinds = fused(), torch.tensor([0, 0, 1, 1, 1, 0])
    again, x = copy.deepcopy(model), tokens()
    with vimoe.token_kinds(model, kinds):
        model(x).square().sum().backward()
    with vimoe.token_kinds(again, kinds):
        checkpoint(again, x, use_reentrant=False).square().sum().backward()
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    with vimoe.token_kinds(again, kinds):
        y = checkpoint(again, x, use_reentrant=False)
    with pytest.raises(vimoe.VimoeError, match="kinds are not known"):
        y.sum().backward()


def test_it_compiles() -> None:
    model, kinds = fused().eval(), torch.tensor([0, 0, 1, 1, 1, 0])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for given in (kinds, 1 - kinds):
        with vimoe.token_kinds(model, given):
            torch.testing.assert_close(compiled(tokens()), model(tokens()))
