"""FFNs in the canonical layout: wider, narrower and averaged, of every kind."""

from __future__ import annotations

import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from tiny import randomise
from torch import Tensor, nn

from vimoe import ffn

DIM, HIDDEN = 8, 12

KINDS = {
    "mlp": lambda: Mlp(DIM, HIDDEN),
    "mlp, norm": lambda: Mlp(DIM, HIDDEN, norm_layer=nn.LayerNorm),
    "mlp, no biases": lambda: Mlp(DIM, HIDDEN, bias=False),
    "glu, gate last, norm": lambda: GluMlp(DIM, 2 * HIDDEN, norm_layer=nn.LayerNorm),
    "glu, gate first": lambda: GluMlp(DIM, 2 * HIDDEN, act_layer=nn.SiLU, gate_last=False),
    "swiglu, norm": lambda: SwiGLU(DIM, HIDDEN, norm_layer=nn.LayerNorm),
    "swiglu, no biases": lambda: SwiGLU(DIM, HIDDEN, bias=False),
}


@pytest.fixture(params=KINDS)
def dense(request: pytest.FixtureRequest) -> nn.Module:
    return randomise(KINDS[request.param]())


def tokens() -> Tensor:
    return torch.randn(5, DIM, generator=torch.Generator().manual_seed(1))


def assert_same(module: nn.Module, expected: nn.Module) -> None:
    state, expected_state = module.state_dict(), expected.state_dict()
    assert type(module) is type(expected)
    assert list(state) == list(expected_state)
    assert all(torch.equal(state[name], value) for name, value in expected_state.items())
    assert str(module) == str(expected)  # the sizes that its layers say they have


def test_built_from_what_was_read_it_is_the_same(dense: nn.Module) -> None:
    rebuilt = ffn.build(dense, ffn.read(dense))
    assert_same(rebuilt, dense)
    assert torch.equal(rebuilt(tokens()), dense(tokens()))
    assert not {p.data_ptr() for p in rebuilt.parameters()} & {p.data_ptr() for p in dense.parameters()}


def test_the_canonical_layout_has_the_gate_before_the_value(dense: nn.Module) -> None:
    weights, kind = ffn.read(dense), ffn.describe(dense)
    hidden = nn.functional.linear(tokens(), weights["fc1.weight"], weights.get("fc1.bias"))
    if kind.gated:
        hidden = dense.act(hidden[:, :HIDDEN]) * hidden[:, HIDDEN:]
    else:
        hidden = dense.act(hidden)
    y = nn.functional.linear(dense.norm(hidden), weights["fc2.weight"], weights.get("fc2.bias"))
    torch.testing.assert_close(y, dense(tokens()))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_wider_computes_the_same_and_narrower_is_bit_for_bit_the_original(dense: nn.Module, times: int) -> None:
    wide = ffn.widen(dense, times)
    assert ffn.describe(wide).hidden == times * HIDDEN
    torch.testing.assert_close(wide(tokens()), dense(tokens()))
    assert_same(ffn.narrow(wide, times), dense)


def test_wider_keeps_what_added_units_have_learned(dense: nn.Module) -> None:
    wide = ffn.widen(dense, 2)
    with torch.no_grad():
        wide.fc2.weight[0, -1] = 0.5
    assert ffn.narrow(wide, 2) is wide


def test_silent_units_that_a_norm_still_sees_are_kept(dense: nn.Module) -> None:
    """They say nothing themselves, but once they are no copies they move the mean and variance of the others."""
    wide = ffn.widen(dense, 2)
    first = wide.fc1_x if isinstance(wide, SwiGLU) else wide.fc1
    with torch.no_grad():
        first.weight[-1] += 1
    narrow = ffn.narrow(wide, 2)
    assert (narrow is wide) == isinstance(wide.norm, nn.LayerNorm)
    torch.testing.assert_close(narrow(tokens()), wide(tokens()))


def test_the_mean_of_equal_ffns_is_that_ffn_bit_for_bit(dense: nn.Module) -> None:
    mean = ffn.average([ffn.read(dense)] * 3, [0.2, 0.3, 0.5])
    assert_same(ffn.build(dense, mean), dense)


def test_the_mean_weighs_and_scales_the_output_only(dense: nn.Module) -> None:
    one, other = ffn.read(dense), ffn.read(randomise(ffn.build(dense, ffn.read(dense)), seed=1))
    mean = ffn.average([one, other], [0.25, 0.75], scale=2.0)
    for name, value in mean.items():
        expected = 0.25 * one[name] + 0.75 * other[name]
        torch.testing.assert_close(value, 2 * expected if name.startswith("fc2.") else expected)
