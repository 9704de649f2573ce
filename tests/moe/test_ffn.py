"""FFNs in the canonical layout: wider, narrower, matched and averaged, of every kind."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers.tiny import randomise
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from vimoe.errors import SurgeryError
from vimoe.moe import ffn, ffn_weights
from vimoe.moe.ffn_weights import Weights

DIM, HIDDEN = 8, 12

KINDS = {
    "mlp": lambda: Mlp(DIM, HIDDEN),
    "mlp, norm": lambda: Mlp(DIM, HIDDEN, norm_layer=nn.LayerNorm),
    "mlp, no biases": lambda: Mlp(DIM, HIDDEN, bias=False),
    "glu, gate last, norm": lambda: GluMlp(DIM, 2 * HIDDEN, norm_layer=nn.LayerNorm),
    "glu, gate first": lambda: GluMlp(DIM, 2 * HIDDEN, act_layer=nn.SiLU, gate_last=False),
    "swiglu, norm": lambda: SwiGLU(DIM, HIDDEN, norm_layer=nn.LayerNorm),
    "swiglu, no biases": lambda: SwiGLU(DIM, HIDDEN, bias=False),
    "other names": lambda: Numbered(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM)),
    "other names, value first": lambda: ValueFirst(DIM, HIDDEN),
}


class Numbered(nn.Sequential):
    """An FFN whose parts have numbers for names, without a norm and dropouts."""


class ValueFirst(nn.Module):
    """A gated FFN whose matrices have other names, in another order, with a norm and a dropout."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim, bias=False)
        self.squash, self.scale, self.drop = nn.SiLU(), nn.LayerNorm(hidden), nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.wide(x).chunk(2, dim=-1)
        return self.narrow(self.scale(self.drop(self.squash(gate) * value)))


@pytest.fixture(autouse=True)
def classes_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ffn.KINDS, Numbered, ffn.Kind(fc1=("0",), fc2="2", act="1"))
    kind = ffn.Kind(
        fc1=("wide",), fc2="narrow", act="squash", norm="scale", drops=("drop", None), gated=True,
        value_first=lambda module: True,
    )  # fmt: skip
    monkeypatch.setitem(ffn.KINDS, ValueFirst, kind)


def part(module: nn.Module, name: str) -> nn.Module:
    """Of an FFN by its name in Kind; of two first matrices the value's."""
    own = getattr(ffn.KINDS[type(module)], name)
    return nn.Identity() if own is None else module.get_submodule(own[-1] if isinstance(own, tuple) else own)


def test_a_class_of_a_user_is_described_by_its_entry() -> None:
    odd, plain = ValueFirst(DIM, HIDDEN), KINDS["other names"]()
    kind = ffn.describe(odd)
    assert (kind.dim, kind.hidden, kind.gated, kind.norm_eps, kind.drop) == (DIM, HIDDEN, True, 1e-5, (0.25, 0.0))
    assert type(kind.act) is nn.SiLU and (ffn.describe(plain).drop, ffn.describe(plain).norm_eps) == ((0.0, 0.0), None)
    odd.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(SurgeryError, match="it has the parameter extra .its activation is SiLU."):
        ffn.describe(odd)


@pytest.fixture(params=KINDS)
def dense(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return randomise(KINDS[request.param]()).eval()


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


def test_hidden_units_are_what_the_last_matrix_gets(dense: nn.Module) -> None:
    seen: list[Tensor] = []
    part(dense, "fc2").register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    dense(tokens())
    torch.testing.assert_close(ffn.hidden(ffn.describe(dense), ffn.read(dense), tokens()), seen[0])


def test_the_canonical_layout_has_the_gate_before_the_value(dense: nn.Module) -> None:
    weights, kind = ffn.read(dense), ffn.describe(dense)
    hidden = nn.functional.linear(tokens(), weights["fc1.weight"], weights.get("fc1.bias"))
    if kind.gated:
        hidden = part(dense, "act")(hidden[:, :HIDDEN]) * hidden[:, HIDDEN:]
    else:
        hidden = part(dense, "act")(hidden)
    y = nn.functional.linear(part(dense, "norm")(hidden), weights["fc2.weight"], weights.get("fc2.bias"))
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
        part(wide, "fc2").weight[0, -1] = 0.5
    assert ffn.narrow(wide, 2) is wide


def test_silent_units_that_a_norm_still_sees_are_kept(dense: nn.Module) -> None:
    """They say nothing themselves, but once they are no copies they move the mean and variance of the others."""
    wide = ffn.widen(dense, 2)
    with torch.no_grad():
        part(wide, "fc1").weight[-1] += 1
    narrow = ffn.narrow(wide, 2)
    assert (narrow is wide) == isinstance(part(wide, "norm"), nn.LayerNorm)
    torch.testing.assert_close(narrow(tokens()), wide(tokens()))


def test_the_mean_of_equal_ffns_is_that_ffn_bit_for_bit(dense: nn.Module) -> None:
    mean = ffn_weights.average([ffn.read(dense)] * 3, [0.2, 0.3, 0.5])
    assert_same(ffn.build(dense, mean), dense)


def test_the_mean_weighs_and_scales_the_output_only(dense: nn.Module) -> None:
    one, other = ffn.read(dense), ffn.read(randomise(ffn.build(dense, ffn.read(dense)), seed=1))
    mean = ffn_weights.average([one, other], [0.25, 0.75], scale=2.0)
    for name, value in mean.items():
        expected = 0.25 * one[name] + 0.75 * other[name]
        torch.testing.assert_close(value, 2 * expected if name.startswith("fc2.") else expected)


def permuted(dense: nn.Module) -> nn.Module:
    """The same function with its hidden units in another order, written in each class's own weights."""
    copied = copy.deepcopy(dense)
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(2))
    last = ffn.KINDS[type(dense)].fc2
    with torch.no_grad():
        for name, p in copied.named_parameters():
            if name == f"{last}.weight":
                p.copy_(p[:, order])
            elif name != f"{last}.bias":
                p.copy_(torch.cat([half[order] for half in p.split(HIDDEN)]))
    return copied


def distance(one: Weights, other: Weights) -> float:
    return sum((one[name] - other[name]).square().sum().item() for name in one)


def test_a_permuted_copy_is_matched_back_bit_for_bit(dense: nn.Module) -> None:
    other = permuted(dense)
    torch.testing.assert_close(other(tokens()), dense(tokens()))  # it is one
    assert distance(ffn.read(other), ffn.read(dense)) > 1
    matched = ffn_weights.match(ffn.read(other), ffn.read(dense), ffn.describe(dense).gated)
    assert_same(ffn.build(dense, matched), dense)


def test_matching_another_ffn_keeps_its_function_and_comes_nearest(dense: nn.Module) -> None:
    reference, gated = ffn.read(dense), ffn.describe(dense).gated
    other = permuted(randomise(copy.deepcopy(dense), seed=1, scale=0.5)).double()
    weights = ffn.read(other)
    matched = ffn_weights.match(weights, {name: w.double() for name, w in reference.items()}, gated)
    x = tokens().double()
    torch.testing.assert_close(ffn.build(other, matched)(x), other(x), rtol=1e-12, atol=1e-12)
    nearest = distance(matched, reference)
    assert nearest < 0.9 * distance(weights, reference)
    for a, b in itertools.combinations(range(HIDDEN), 2):  # no two units of the optimum would rather change places
        order = torch.arange(HIDDEN)
        order[[a, b]] = order[[b, a]]
        assert distance(ffn_weights.take(matched, order, gated), reference) >= nearest - 1e-9


@pytest.mark.parametrize("moved", [0.01, 10.0])
def test_the_order_of_nearest_units_is_that_of_the_solver(
    dense: nn.Module, moved: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that have moved a little know their partners, and no assignment is solved for them."""
    solved: list[Tensor] = []
    solve = ffn_weights.linear_sum_assignment

    def noted(*args: object, **kwargs: object) -> object:
        solved.append(solve(*args, **kwargs)[1])
        return solve(*args, **kwargs)

    monkeypatch.setattr(ffn_weights, "linear_sum_assignment", noted)
    gated, other = ffn.describe(dense).gated, permuted(randomise(copy.deepcopy(dense), seed=1, scale=moved))
    order, easy = ffn_weights.order(ffn.read(other), ffn.read(dense), gated)
    assert easy == (moved < 1) == (not solved)
    units, target = (ffn_weights.hidden_units(ffn.read(each), gated) for each in (other, dense))
    assert order.tolist() == solve(torch.cdist(target, units).square().numpy())[1].tolist()
    assert order.tolist() != sorted(order.tolist())


def test_matching_takes_all_weights_of_a_unit_for_evidence(dense: nn.Module) -> None:
    """Units that are twins but for one kind of weight (of one half), which tells them apart by little."""
    gated = ffn.describe(dense).gated
    for name, w in ffn.read(dense).items():
        if name == "fc2.bias":  # belongs to no hidden unit
            continue
        for half in range(1 + gated if name.startswith("fc1.") else 1):
            twins = {key: torch.ones_like(value) for key, value in ffn.read(dense).items()}
            rows = slice(half * HIDDEN, (half + 1) * HIDDEN)
            twins[name][rows] += 0.01 * w[rows].detach()
            other = ffn.read(permuted(ffn.build(dense, twins)))
            assert not torch.equal(other[name], twins[name])
            torch.testing.assert_close(ffn_weights.match(dict(reversed(other.items())), twins, gated), twins)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_units_that_nothing_tells_apart_stay_where_they_are(dense: nn.Module, value: float) -> None:
    """What they are matched to is a different thing for NaN, which equals nothing: itself."""
    weights = {name: w.detach().clone() for name, w in ffn.read(dense).items()}
    weights["fc2.weight"][:, :4] = value
    for name, w in weights.items():
        if name != "fc2.weight":
            w[...] = w[:1]
    matched = ffn_weights.match(weights, weights, ffn.describe(dense).gated)
    assert all(torch.equal(matched[name].nan_to_num(7), w.nan_to_num(7)) for name, w in weights.items())
