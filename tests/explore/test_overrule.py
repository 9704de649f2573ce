"""What the switches do to a layer, against the layer computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.tiny import randomise
from timm.layers import Mlp
from torch import nn

import vimoe
from vimoe.errors import ConfigError
from vimoe.explore.overrule import OTHERS, ROUTED, SHARED, overruled, switches
from vimoe.moe import Routing
from vimoe.moe.router import TokenLayout


def model(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = vimoe.MoEConfig(**{"num_experts": 3, "routing": "token", **settings})
    return randomise(nn.Sequential(vimoe.MoE(Mlp(8, 16), config, TokenLayout(1, class_token=True)))).eval()


def nothing(name: str, routing: Routing) -> Routing:
    raise AssertionError


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("combine", ["mix", "sum"])
@pytest.mark.parametrize("routing", ["image", "token"])
def test_the_shared_expert_alone(combine: str, routing: str) -> None:
    layer = model(combine=combine, routing=routing)
    with torch.no_grad(), overruled(layer, {"0": SHARED}, nothing):
        torch.testing.assert_close(layer(X), layer[0].shared(X))


def test_one_expert_gets_all_with_the_gates_that_were_there() -> None:
    layer = model()
    with torch.no_grad(), vimoe.record(layer) as before:
        plain = layer(X)
    with torch.no_grad(), overruled(layer, {"0": "expert 2"}, nothing), vimoe.record(layer) as after:
        changed = layer(X)
    assert (after[0].experts[:, 0] == 2).all()
    torch.testing.assert_close(after[0].gates[:, 0], before[0].gates.sum(dim=1))
    stays = before[0].experts[:, 0] == 2
    same = torch.isclose(plain, changed, atol=1e-6).all(dim=-1).flatten()
    assert same[stays].all() and not same[~stays].any()


def test_the_decisions_of_others_are_taken_and_hooks_go() -> None:
    layer = model()
    with torch.no_grad():
        plain = layer(X)
        with overruled(layer, {"0": OTHERS}, lambda name, own: replace(own, gates=torch.zeros_like(own.gates))):
            torch.testing.assert_close(layer(X), layer[0].shared(X))
        assert torch.equal(layer(X), plain)
        with overruled(layer, {"0": ROUTED}, nothing):
            assert torch.equal(layer(X), plain)


def test_a_layer_offers_what_it_can_do() -> None:
    assert switches(model()[0]) == [ROUTED, SHARED, OTHERS, "expert 0", "expert 1", "expert 2"]
    assert SHARED not in switches(model(num_shared_experts=0, top_k=2)[0])
    assert switches(model(router="soft")[0]) == [ROUTED]


@pytest.mark.parametrize(
    ("asked", "message"), [({"1": SHARED}, "layer '1'"), ({"0": "expert 3"}, "0: 'expert 3': .*did you mean 'expert")]
)
def test_what_is_not_there_is_refused(asked: dict[str, str], message: str) -> None:
    layer = model()
    with pytest.raises(ConfigError, match=message), overruled(layer, asked, nothing):
        pass
    assert not layer[0].router._forward_hooks
