"""Low-rank experts: the formula, the start, and the mean of their full weights."""

from __future__ import annotations

import pytest
import torch
from helpers.changed import CASES, assert_layer_agrees, ffn
from helpers.flops import macs
from helpers.layers import make
from timm.layers import Mlp
from torch import Tensor

import vimoe
from vimoe.moe.ffn import read


def lora(own: dict[str, Tensor], base: dict[str, Tensor], x: Tensor, e: int, layer: vimoe.MoE) -> Tensor:
    """The FFN with the matrices W1 + B1 A1 and W2 + B2 A2."""
    changes = (own[f"{name}.b"][e] @ own[f"{name}.a"][e] for name in ("fc1", "fc2"))
    return ffn(base, x, layer, *changes)


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize(("dense", "layout"), [*CASES, ("mlp, norm", "token")])
def test_it_is_the_formula(dense: str, layout: str, shared: int) -> None:
    assert_layer_agrees("lora", dense, layout, shared, lora, rank=2)


def test_a_starts_as_in_peft_and_b_at_zero() -> None:
    torch.manual_seed(0)
    config = vimoe.MoEConfig(num_experts=3, experts="lora", rank=20)
    experts = vimoe.MoE(Mlp(64, 256), config, make().router.layout).experts
    for change, inputs, outputs in ((experts.fc1, 64, 256), (experts.fc2, 256, 64)):
        assert change.a.shape == (3, 20, inputs) and change.b.shape == (3, outputs, 20)
        reference = torch.nn.Linear(inputs, 20).weight  # kaiming_uniform_ with a = sqrt(5)
        assert change.a.abs().max() <= inputs**-0.5 and not change.b.any()
        assert change.a.std().item() == pytest.approx(reference.std().item(), rel=0.05)


@pytest.mark.parametrize("shared", [0, 1])
@torch.no_grad()
def test_merging_gives_the_mean_of_the_full_weights(shared: int) -> None:
    layer = make(experts="lora", shared=shared, rank=2).double()
    mass = torch.tensor([0.1, 0.4, 0.0, 0.5 - 0.2 * shared])
    base = dict(layer.experts.base.named_parameters())
    merged = read(layer.merged(mass))
    for name in ("fc1", "fc2"):
        change = getattr(layer.experts, name)
        mean = torch.einsum("n,nor,nri->oi", mass.double(), change.b, change.a)
        torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + mean)
        torch.testing.assert_close(merged[f"{name}.bias"], base[f"{name}.bias"])


@torch.no_grad()
def test_it_takes_no_matrices_of_the_experts_in_its_forward_pass() -> None:
    """The base is one product for all slots: the multiply-adds are those of the base and of the thin products."""
    experts = make(experts="lora", rank=2).experts
    slots = torch.randn(6, 1, 8), torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 0, 1])
    assert macs(experts, *slots) == 4 * experts.macs == 4 * (2 * 8 * 12 + 2 * 2 * (8 + 12))
