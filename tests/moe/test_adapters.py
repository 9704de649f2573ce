"""Adapter experts: the formula, their width, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers.changed import CASES, activated, assert_layer_agrees, ffn
from helpers.layers import make
from helpers.tiny import config, layers, upcycle, vit
from torch import Tensor

import vimoe


def adapter(own: dict[str, Tensor], base: dict[str, Tensor], x: Tensor, e: int, layer: vimoe.MoE) -> Tensor:
    """FFN(x) + up(act(down(x))), gated where the FFN is."""
    first = x @ own["down.weight"][e].T + (own["down.bias"][e] if "down.bias" in own else 0)
    return ffn(base, x, layer) + activated(first, layer) @ own["up.weight"][e].T


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize(("dense", "layout"), CASES)
def test_it_is_the_formula(dense: str, layout: str, shared: int) -> None:
    assert_layer_agrees("adapter", dense, layout, shared, adapter, rank=2)


@pytest.mark.parametrize("dense", ["mlp", "mlp, no biases", "swiglu", "glu, gate last"])
@torch.no_grad()
def test_each_expert_is_an_ffn_of_more_hidden_units(dense: str) -> None:
    experts = make(dense, experts="adapter", rank=2).double().experts
    x, load = torch.randn(8, 1, 8, dtype=torch.float64), torch.tensor([2, 0, 5, 1])
    torch.testing.assert_close(experts(x, None, load), super(type(experts), experts).forward(x, None, load))
    assert experts.weights(0)["fc2.weight"].shape == (8, experts.width) == (8, 14)
    assert experts.macs == experts.weights(0)["fc1.weight"].numel() + experts.weights(0)["fc2.weight"].numel()


def test_dropout_is_on_the_hidden_units_of_the_ffn_and_of_the_adapter() -> None:
    experts = make(experts="adapter", rank=2, expert_dropout=0.5).experts
    dropped: dict[int, float] = {}
    experts.drop1.register_forward_hook(lambda _, args, y: dropped.update({y.shape[-1]: (y == 0).float().mean()}))
    experts(torch.randn(400, 1, 8), None, torch.tensor([400, 0, 0, 0]))
    assert {width: pytest.approx(0.5, abs=0.1) for width in (12, 2)} == dropped


def test_up_starts_at_zero_and_down_as_a_linear_map() -> None:
    layer = layers(upcycle(vit(embed_dim=64), config(experts="adapter", rank=32)))[0]
    assert not layer.experts.up.weight.any() and not layer.experts.down.bias.any()
    reference = torch.nn.Linear(64, 32).weight
    assert layer.experts.down.weight.std().item() == pytest.approx(reference.std().item(), rel=0.1)
    assert layer.experts.down.weight.abs().max() <= 64**-0.5
    assert not torch.equal(layer.experts.down.weight[0], layer.experts.down.weight[1])


def test_a_norm_between_the_matrices_is_refused_and_nothing_changes() -> None:
    model = vit("inner norm")
    with pytest.raises(vimoe.VimoeError, match="a norm between its matrices: .*use 'lora' or 'delta'") as error:
        vimoe.upcycle(model, config(experts="adapter"))
    assert "\n" not in str(error.value) and not layers(model)


@pytest.mark.parametrize("how", ["merge", "matched"])
def test_means_are_refused_because_the_experts_are_wider(how: str) -> None:
    model = upcycle(vit(), config(experts="adapter", rank=2))
    assert layers(model)[0].densify_methods == ("shared",)
    message = rf"experts of the kind 'adapter' with 98 hidden units: expected the FFN's 96 for how='{how}'; use how='s"
    with pytest.raises(vimoe.VimoeError, match=message):
        vimoe.densify(model, how=how)
    assert len(layers(model)) == 2 and not layers(vimoe.densify(model))
