"""FFNs that are read from what their forward computes: forms that transformers has, and near misses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import randomise
from torch import Tensor, nn

from vimoe.errors import SurgeryError
from vimoe.moe import ffn, traced_ffn

Forward = Callable[..., Any]


def module(forward: Forward, package: str = "transformers.models.own", **parts: nn.Module) -> nn.Module:
    """A module of a class of its own, as if transformers had it."""
    made = type("Own", (nn.Module,), {"forward": forward, "__module__": package})()
    for name, part in parts.items():
        made.add_module(name, part)
    return randomise(made).eval()


def plain(**more: nn.Module) -> dict[str, nn.Module]:
    return {"a": nn.Linear(4, 8), "act": nn.GELU(), "b": nn.Linear(8, 4), "drop": nn.Dropout(0.5), **more}


def gated(**more: nn.Module) -> dict[str, nn.Module]:
    return {**plain(act=nn.SiLU()), "v": nn.Linear(4, 8), **more}


def packed() -> dict[str, nn.Module]:
    return {**plain(act=nn.Tanh()), "a": nn.Linear(4, 16, bias=False)}


def chunked(self: Any, x: Tensor) -> Tensor:
    gate, value = self.a(x).chunk(2, dim=-1)
    return self.b(value * self.act(gate))


def value_first(self: Any, x: Tensor) -> Tensor:
    value, gate = torch.chunk(self.a(x), 2, dim=-1)
    return self.b(self.act(gate) * value)


def one_half(self: Any, x: Tensor) -> Tensor:
    gate, _ = self.a(x).chunk(2, dim=-1)
    return self.b(self.act(gate) * gate)


FFNS: dict[str, tuple[Forward, dict[str, nn.Module]]] = {
    "plain": (lambda self, x: self.b(self.act(self.a(x))), plain()),
    "dropouts": (lambda self, x: self.last(self.b(self.drop(self.act(self.a(x))))), plain(last=nn.Dropout(0.1))),
    "no biases": (lambda self, x: self.b(self.act(self.a(x))), plain(a=nn.Linear(4, 8, bias=False))),
    "gated": (lambda self, x: self.b(self.act(self.a(x)) * self.v(x)), gated()),
    "gated, value first": (lambda self, x: self.b(self.v(x) * self.act(self.a(x))), gated()),
    "packed": (chunked, packed()),
    "packed, value first": (value_first, packed()),
}
OTHERS: dict[str, tuple[Forward, dict[str, nn.Module]]] = {
    "no activation": (lambda self, x: self.b(self.a(x)), plain()),
    "a function for activation": (lambda self, x: self.b(F.gelu(self.a(x))), plain()),
    "a function for dropout": (lambda self, x: self.b(F.dropout(self.act(self.a(x)))), plain()),
    "a residual": (lambda self, x: x + self.b(self.act(self.a(x))), plain()),
    "a scale": (lambda self, x: 2 * self.b(self.act(self.a(x))), plain()),
    "a scaled gate": (lambda self, x: self.b(self.act(2 * self.a(x)) * self.v(x)), gated()),
    "another input of the value": (lambda self, x: self.b(self.act(self.a(x)) * self.v(x + 1)), gated()),
    "a sum for the product": (lambda self, x: self.b(self.act(self.a(x)) + self.v(x)), gated()),
    "a gate of tokens": (lambda self, x: self.b(self.act(self.a(x).chunk(2, dim=1)[0])), plain()),
    "two inputs": (lambda self, x, y: self.b(self.act(self.a(x))), plain()),
    "two outputs": (lambda self, x: (self.b(self.act(self.a(x))), x), plain()),
    "one half for both": (one_half, packed()),
    "a decision by values": (lambda self, x: self.b(self.act(self.a(x))) if x.sum() > 0 else x, plain()),
}


@pytest.fixture(autouse=True)
def _kinds() -> object:
    """Classes that a test adds are taken back."""
    before = dict(ffn.KINDS)
    yield
    ffn.KINDS.clear()
    ffn.KINDS.update(before)


@pytest.mark.parametrize("name", FFNS)
@torch.no_grad()
def test_it_is_read_and_written(name: str) -> None:
    forward, parts = FFNS[name]
    dense = module(forward, **copy.deepcopy(parts))
    x = torch.randn(5, 4)
    assert ffn.is_ffn(dense)
    kind, weights = ffn.describe(dense), ffn.read(dense)
    assert (kind.dim, kind.hidden, kind.drop) == (4, 8, (0.5, 0.1) if name == "dropouts" else (0.0, 0.0))
    hidden = ffn.hidden(kind, weights, x)
    torch.testing.assert_close(F.linear(hidden, weights["fc2.weight"], weights["fc2.bias"]), dense(x))
    assert torch.equal(ffn.build(dense, weights)(x), dense(x))
    torch.testing.assert_close(ffn.widen(dense, 2)(x), dense(x))


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_is_no_ffn(name: str) -> None:
    forward, parts = OTHERS[name]
    assert not ffn.is_ffn(module(forward, **copy.deepcopy(parts)))


def test_classes_of_other_packages_are_not_read() -> None:
    forward, parts = FFNS["plain"]
    assert not ffn.is_ffn(module(forward, "mine.models", **copy.deepcopy(parts)))


def test_modules_of_one_class_may_compute_different_things() -> None:
    def sparse_in_some(self: Any, x: Tensor) -> Tensor:
        gate = self.a(x).relu() if self.sparse else self.a(x)
        return self.b(self.act(gate) * self.v(x))

    dense = module(sparse_in_some, **gated())
    dense.sparse, sparse = False, copy.deepcopy(dense)
    sparse.sparse = True
    for _ in range(2):
        assert ffn.is_ffn(dense) and not ffn.is_ffn(sparse)


def test_a_copy_is_compiled_without_reading_it_again() -> None:
    dense = module(value_first, **packed())
    weights = ffn.read(dense)
    again = copy.deepcopy(dense)
    read = torch.compile(ffn.read, backend="eager", fullgraph=True)(again)
    assert all(torch.equal(read[key], w) for key, w in weights.items())
    assert pickle.loads(pickle.dumps(ffn.kind_of(dense))) == ffn.kind_of(again)


def test_a_bias_in_one_half_alone_is_refused() -> None:
    dense = module(FFNS["gated"][0], **gated(v=nn.Linear(4, 8, bias=False)))
    with pytest.raises(SurgeryError, match="one of a and v has a bias: expected one in both, or in none"):
        ffn.describe(dense)


def test_an_adapted_matrix_is_refused_by_name_instead_of_being_passed_over() -> None:
    class Adapted(nn.Linear): ...

    dense = module(FFNS["plain"][0], **plain(b=Adapted(8, 4)))
    assert ffn.is_ffn(dense)
    with pytest.raises(SurgeryError, match="b is a Adapted: expected a plain nn.Linear"):
        ffn.describe(dense)


def test_halves_of_a_split_ffn_are_known_by_what_reads_the_input() -> None:
    first = module(lambda self, x: self.act(self.a(x)), **plain())
    assert traced_ffn.begins(first) == ("a", "act")
    assert traced_ffn.begins(module(lambda self, x: self.drop(self.a(x)), **plain())) is None
    assert traced_ffn.begins(module(lambda self, x: self.act(self.a(x) + x), **plain())) is None
    norm = nn.LayerNorm(4)
    last = module(lambda self, x, y: self.norm(self.drop(self.b(x)) + y), **plain(norm=norm))
    assert traced_ffn.ends(last) == "b"
    assert traced_ffn.ends(module(lambda self, x, y: self.b(x) + self.v(x), **plain(v=nn.Linear(8, 4)))) is None
    assert traced_ffn.ends(module(lambda self, x, y: self.norm(x), **plain(norm=norm))) is None
