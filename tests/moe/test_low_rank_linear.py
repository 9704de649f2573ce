"""The linear map with changes of low rank: the formula by every backend, its gradients, and what it leaves out."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import make, tokens
from torch import Tensor

import vimoe
from vimoe.moe import low_rank_linear as module
from vimoe.moe.grouped_linear import BACKENDS
from vimoe.moe.low_rank_linear import low_rank_linear

IN, OUT, RANK, TOKENS = 16, 24, 8, 3
LOADS = {"even": [2, 2, 2], "uneven": [4, 0, 1], "none": [0, 0, 0]}
NAMES = ("x", "weight", "bias", "a", "b")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest value


def operands(load: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((sum(load), TOKENS, IN), (OUT, IN), (OUT,), (len(load), RANK, IN), (len(load), OUT, RANK))
    return tuple(torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes)


def naive(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, load: list[int]) -> Tensor:
    parts = [rows @ (weight + b[e] @ a[e]).T for e, rows in enumerate(x.split(load))]
    return torch.cat(parts) + (0 if bias is None else bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_are_the_formulas(backend: str, load: str, biased: bool, dtype: torch.dtype) -> None:
    mine = operands(LOADS[load], dtype)
    exact = [operand.detach().double().requires_grad_() for operand in mine]
    if not biased:
        mine, exact = (*mine[:2], None, *mine[3:]), [*exact[:2], None, *exact[3:]]
    y = low_rank_linear(*mine, torch.tensor(LOADS[load]), backend)
    exact_y = naive(*exact, LOADS[load])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(dy)
    exact_y.backward(dy.double())
    pairs = [(p.grad, q.grad) for p, q in zip(mine, exact, strict=True) if p is not None]
    for got, true in [(y, exact_y), *pairs]:
        assert got.dtype == dtype and got.shape == true.shape
        if true.numel():
            assert (got.double() - true).abs().max() <= TOLERANCE[dtype] * true.abs().max(), "beyond rounding"


@pytest.mark.parametrize("backend", ["auto", "loop", "bmm"])
def test_gradients_in_float64(backend: str) -> None:
    load = torch.tensor(LOADS["uneven"])
    values = operands(LOADS["uneven"], torch.float64)
    assert torch.autograd.gradcheck(lambda *v: low_rank_linear(*v, load, backend), values, fast_mode=True)


@pytest.mark.parametrize(
    ("trained", "calls"),
    [
        ("x", ["_product"]),
        ("weight", ["weight_gradient"]),
        ("bias", ["grouped_sum"]),
        ("a", ["input_gradient", "weight_gradient"]),
        ("b", ["weight_gradient"]),
    ],
)
def test_nothing_is_computed_that_is_not_asked_for(
    trained: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [each.detach().requires_grad_(n == trained) for n, each in zip(NAMES, operands([4, 0, 1]), strict=True)]
    y = low_rank_linear(*values, torch.tensor([4, 0, 1]), "loop")
    seen = []
    for name in ("_product", "input_gradient", "weight_gradient", "grouped_sum"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real, name=name: (seen.append(name), real(*args))[1])
    y.sum().backward()
    assert seen == calls


def test_the_change_takes_no_tensor_of_the_size_of_the_output() -> None:
    """The loop, chosen on a CPU, adds it in place: beside the output only small tensors are allocated."""
    load = torch.tensor([2, 0, 2])
    x, weight, bias, a, b = (
        torch.ones(4, 16, 8),
        torch.ones(512, 8),
        torch.ones(512),
        torch.ones(3, 2, 8),
        torch.ones(3, 512, 2),
    )
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        y = low_rank_linear(x, weight, bias, a, b, load, "auto")
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.function_events)
    assert y.nbytes <= allocated < 1.5 * y.nbytes


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_pass_computes_in_the_type_of_the_forward_pass_under_an_autocast_too(
    backend: str, compiled: bool
) -> None:
    product = low_rank_linear
    if compiled:
        torch._dynamo.reset()
        product = torch.compile(low_rank_linear, backend="aot_eager", fullgraph=True)
    gradients = []
    for autocast in (False, True):
        values = operands(LOADS["uneven"])
        y = product(*values, torch.tensor(LOADS["uneven"]), backend)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y.backward(torch.ones_like(y))
        gradients.append([each.grad for each in values])
    for plain, under_autocast in zip(*gradients, strict=True):
        assert torch.equal(plain, under_autocast)


def test_autocast_computes_in_its_type_and_gives_gradients_in_that_of_the_weights() -> None:
    values = operands(LOADS["uneven"])
    low = operands(LOADS["uneven"], torch.bfloat16)
    load = torch.tensor(LOADS["uneven"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = low_rank_linear(*values, load, "auto")
    y.backward(torch.ones_like(y))
    reference = low_rank_linear(*low, load, "auto")
    reference.backward(torch.ones_like(reference))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, reference)
    for mine, theirs in zip(values, low, strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, theirs.grad.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("rank", "outputs"), [(2, OUT), (RANK, 6)])
def test_grouped_mm_refuses_sizes_that_torch_cannot_take_in_one_line(rank: int, outputs: int) -> None:
    """The sizes of both matrices count, those of B too."""
    x, weight, bias, a, b = operands([1, 1])
    with pytest.raises(vimoe.VimoeError, match="choose 'loop' or 'auto'"):
        low_rank_linear(
            x, weight[:outputs], bias[:outputs], a[:, :rank], b[:, :outputs, :rank], torch.tensor([1, 1]), "grouped_mm"
        )


@pytest.mark.parametrize("layout", ["image by class token", "token"])
def test_a_layer_compiles_in_one_graph_and_exports_for_any_number_of_images(layout: str) -> None:
    layer = make("mlp", layout, experts="lora", rank=2).eval()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    program = torch.export.export(layer, (tokens(),), dynamic_shapes=({0: torch.export.Dim("images", min=2)},))
    for count in (2, 5):
        expected = layer(tokens(count))
        torch.testing.assert_close(program.module()(tokens(count)), expected)
        torch.testing.assert_close(compiled(tokens(count)), expected)
        gradients = [
            torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (compiled(tokens(count)), expected)
        ]
        for mine, exact in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, exact)
