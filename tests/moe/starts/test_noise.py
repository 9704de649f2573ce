"""The start "noise" against its formula."""

from __future__ import annotations

import copy

import helpers.kinds  # noqa: F401  it registers kinds of experts
import pytest
import torch
from helpers.layers import FFNS
from helpers.tiny import config, upcycle, vit

import vimoe
from vimoe.moe import ffn
from vimoe.moe.router import TokenLayout


@pytest.mark.parametrize("dense", FFNS)
def test_each_matrix_has_noise_of_its_own_size_and_vectors_have_none(dense: str) -> None:
    torch.manual_seed(2)
    parent = FFNS[dense]().double()
    weights = {name: w.detach().clone() for name, w in ffn.read(parent).items()}
    layer = vimoe.MoE(parent, config(init="noise", noise_std=0.3, routing="token"), TokenLayout(0, False))
    torch.manual_seed(1)
    layer.start()
    torch.manual_seed(1)
    for e in range(4):
        expected = {name: w.clone() for name, w in weights.items()}
        for name in ("fc1.weight", "fc2.weight"):
            hidden_first = expected[name].T if name == "fc2.weight" else expected[name]
            for half in hidden_first.split(weights["fc2.weight"].shape[1]):
                half += 0.3 * half.std(correction=0) * torch.randn_like(half)
        for name, w in layer.experts.weights(e).items():
            torch.testing.assert_close(w, expected[name], rtol=1e-12, atol=1e-12)
            assert torch.equal(w, weights[name]) == (w.ndim == 1)


def test_no_noise_is_copy_bit_for_bit() -> None:
    parent = vit()
    copied = upcycle(copy.deepcopy(parent), config()).state_dict()
    nothing = upcycle(copy.deepcopy(parent), config(init="noise", noise_std=0.0)).state_dict()
    assert all(torch.equal(nothing[name], w) for name, w in copied.items())


def test_experts_that_share_their_weights_are_refused() -> None:
    with pytest.raises(vimoe.VimoeError, match="init='noise' with experts='scaled'.*use init='copy'"):
        vimoe.upcycle(vit(), config(init="noise", experts="scaled"))
