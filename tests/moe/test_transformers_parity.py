"""vimoe.MoE with combine="sum" is transformers' Qwen2-MoE block; vimoe.balance_loss is its balancing loss."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import randomise
from timm.layers import SwiGLU
from torch import Tensor, nn
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock, load_balancing_loss_func

import vimoe
from vimoe.moe.router import TokenLayout

DIM, HIDDEN, EXPERTS, IMAGES, TOKENS = 16, 12, 4, 3, 10


def pair_of_layers(k: int, normalised: bool, shared: int) -> tuple[vimoe.MoE, nn.Module]:
    """The layer of each library, with the same weights."""
    settings = vimoe.MoEConfig(
        num_experts=EXPERTS,
        top_k=k,
        routing="token",
        num_shared_experts=shared,
        combine="sum",
        normalize_gates=normalised,
    )
    torch.manual_seed(0)
    ours = randomise(vimoe.MoE(SwiGLU(DIM, HIDDEN, bias=False), settings, TokenLayout(1, True)))
    theirs = Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(
            hidden_size=DIM,
            num_experts=EXPERTS,
            num_experts_per_tok=k,
            norm_topk_prob=normalised,
            moe_intermediate_size=HIDDEN,
            shared_expert_intermediate_size=shared * HIDDEN,
        )
    )
    state = {theirs_name: ours.get_parameter(name).detach().clone() for name, theirs_name in NAMES.items()}
    # the gate of their shared expert reads the first channel, which `tokens` holds at 1: sigmoid(100) is exactly 1
    state["shared_expert_gate.weight"] = 100.0 * torch.eye(1, DIM)
    theirs.load_state_dict(state)
    return ours, theirs


NAMES = {
    "router.weight": "gate.weight",
    "experts.fc1.weight": "experts.gate_up_proj",
    "experts.fc2.weight": "experts.down_proj",
    "shared.fc1_g.weight": "shared_expert.gate_proj.weight",
    "shared.fc1_x.weight": "shared_expert.up_proj.weight",
    "shared.fc2.weight": "shared_expert.down_proj.weight",
}


def tokens() -> Tensor:
    x = torch.randn(IMAGES, TOKENS, DIM, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 1
    return x.requires_grad_()


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_sum_gives_the_outputs_and_gradients_of_qwen2_moe(k: int, normalised: bool, shared: int) -> None:
    ours, theirs = pair_of_layers(k, normalised, shared)
    x_ours, x_theirs = tokens(), tokens()
    y_ours, y_theirs = ours(x_ours), theirs(x_theirs)
    direction = torch.randn(y_ours.shape, generator=torch.Generator().manual_seed(2))
    (y_ours * direction).sum().backward()
    (y_theirs * direction).sum().backward()
    torch.testing.assert_close(y_ours, y_theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=1e-5, atol=5e-6)
    for name, theirs_name in NAMES.items():
        gradient = theirs.get_parameter(theirs_name).grad
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, rtol=1e-5, atol=5e-6)
        blind = name == "router.weight" and ours.router.blind
        assert blind or gradient.abs().max() > 1e-2


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_balance_loss_of_one_layer_is_transformers_without_any_factor(k: int) -> None:
    """Both are N x sum f P with f summing to k. Over several layers ours is the mean of theirs, layer by layer."""
    ours, _ = pair_of_layers(k, False, 1)
    with vimoe.record(ours) as routings:
        ours(tokens())
        ours(tokens().flip(-1) * 2)
    theirs = [load_balancing_loss_func((r.logits,), num_experts=EXPERTS, top_k=k) for r in routings]
    assert theirs[0] != theirs[1]
    torch.testing.assert_close(vimoe.balance_loss(routings[:1]), theirs[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(vimoe.balance_loss(routings), torch.stack(theirs).mean(), rtol=1e-6, atol=0)
    gradients = [
        torch.autograd.grad(loss, ours.router.weight, retain_graph=True)[0]
        for loss in (theirs[0], vimoe.balance_loss(routings[:1]))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    assert gradients[0].abs().max() > 1e-3
