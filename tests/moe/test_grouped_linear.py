"""Every backend of grouped_linear, alone and in the layer, against the naive loop in float64; all gradients too."""

from __future__ import annotations

import copy
import itertools
import mmap
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.layers import assert_agrees, make, tokens
from helpers.slow import one_in
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import vimoe
from vimoe.moe import dispatch, low_rank_linear, router
from vimoe.moe import grouped_linear as grouped
from vimoe.moe.grouped_linear import BACKENDS, grouped_linear

EXPERTS, IN, OUT = 4, 16, 24
# slots of each expert: all alike, uneven with an idle expert, all on one, a single unit
LOADS = {"even": [3, 3, 3, 3], "uneven": [5, 0, 6, 1], "one expert": [0, 0, 7, 0], "one unit": [0, 1, 0, 0]}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value


class Case:
    """Random operands, the same for each backend."""

    def __init__(
        self, load: list[int], k: int, tokens: int, dtype: torch.dtype, sizes: tuple[int, int] = (IN, OUT)
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        self.load = torch.tensor(load)
        slots = int(self.load.sum())
        self.rows = slots // k
        # a row is never twice at one expert, as each expert's slots come one after the other
        self.source = torch.arange(slots).roll(1) % self.rows if k > 1 else torch.randperm(slots, generator=draw)
        inputs, outputs = sizes

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw).to(dtype).requires_grad_()

        self.x = random(self.rows, tokens, inputs)
        self.weight, self.bias = random(len(load), outputs, inputs), random(len(load), outputs)
        self.dy = torch.randn(slots, tokens, outputs, generator=draw).to(dtype)

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = (t.detach().clone().to(dtype).requires_grad_() for t in (self.x, self.weight, self.bias))
        return x, weight, bias

    def naive(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        expert = [e for e, units in enumerate(self.load.tolist()) for _ in range(units)]
        rows = [x[u] @ weight[e].T for u, e in zip(self.source.tolist(), expert, strict=True)]
        return torch.stack([r if bias is None else r + bias[e] for r, e in zip(rows, expert, strict=True)])


def assert_near(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert (actual.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max(), "beyond rounding"


def compare(
    case: Case, backend: str, dtype: torch.dtype, sorted_already: bool, dy: Tensor, biased: bool = True
) -> None:
    x, weight, bias = case.operands(dtype)
    exact = case.operands(torch.float64)
    if sorted_already:
        case.source = torch.arange(len(case.x))
    source = None if sorted_already else case.source
    y = grouped_linear(x, weight, bias if biased else None, source, case.load, backend)
    exact_y = case.naive(*exact[:2], exact[2] if biased else None)
    assert_near(y, exact_y, dtype)
    y.backward(dy)
    exact_y.backward(dy.double())
    for mine, true in zip((x, weight, bias)[: 2 + biased], exact, strict=False):
        assert_near(mine.grad, true.grad, dtype)
    assert not weight.grad[case.load == 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
# with k of 0 the input is sorted already; with 2 a unit must not be twice at one expert
@pytest.mark.parametrize(("k", "load"), [(2, "even"), *((k, load) for k in (0, 1) for load in LOADS)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_are_the_naive_loops(
    backend: str, k: int, load: str, rows: int, dtype: torch.dtype
) -> None:
    case = Case(LOADS[load], max(k, 1), rows, dtype)
    compare(case, backend, dtype, k == 0, case.dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "source"),
    [
        (4, [0, 1, 1, 3]),  # as many slots as rows, and yet not each row once
        (3, [0, 1, 0, 2, 0, 1]),  # any number of slots, in this order
        (6, [5, 2, 5]),
        (4, []),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_may_have_any_number_of_slots(backend: str, rows: int, source: list[int], dtype: torch.dtype) -> None:
    first = len(source) // 2
    case = Case([first, 0, 1 if source else 0, max(len(source) - first - 1, 0)], 1, 3, dtype)
    draw = torch.Generator().manual_seed(1)
    case.source = torch.tensor(source, dtype=torch.long)
    case.x = torch.randn(rows, 3, IN, generator=draw).to(dtype).requires_grad_()
    if source:
        compare(case, backend, dtype, False, case.dy)
    else:
        x, weight, bias = case.operands(dtype)
        y = grouped_linear(x, weight, bias, case.source, case.load, backend)
        assert y.shape == (0, 3, OUT)
        y.sum().backward()
        assert not any(operand.grad.any() for operand in (x, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_biases_too(backend: str) -> None:
    case = Case(LOADS["uneven"], 1, 3, torch.float32)
    compare(case, backend, torch.float32, False, case.dy, biased=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["expanded", "transposed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_not_contiguous(backend: str, kind: str, dtype: torch.dtype) -> None:
    case = Case(LOADS["uneven"], 1, 3, dtype)
    dy = torch.ones((), dtype=dtype).expand_as(case.dy) if kind == "expanded" else case.dy.mT.contiguous().mT
    assert not dy.is_contiguous()
    compare(case, backend, dtype, False, dy)


@pytest.mark.parametrize("backend", ["auto", "loop", "bmm"])
def test_odd_sizes(backend: str) -> None:
    case = Case(LOADS["uneven"], 1, 3, torch.bfloat16, (7, 13))
    compare(case, backend, torch.bfloat16, False, case.dy)


@pytest.mark.parametrize(("sizes", "dtype"), [((7, 13), torch.float32), ((16, 24), torch.float64)])
def test_grouped_mm_refuses_what_torch_cannot_in_one_line(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    case = Case(LOADS["even"], 1, 1, dtype, sizes)
    with pytest.raises(vimoe.VimoeError, match="choose 'loop' or 'auto'"):
        grouped_linear(case.x, case.weight, case.bias, case.source, case.load, "grouped_mm")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_computed_that_is_not_asked_for(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(LOADS["uneven"], 1, 3, torch.float32)
    x, weight, bias = case.operands(torch.float32)
    calls = []
    for name in ("input_gradient", "weight_gradient", "grouped_sum"):
        real = getattr(grouped, name)
        monkeypatch.setattr(grouped, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1])
    grouped_linear(x, weight.detach(), bias.detach(), case.source, case.load, backend).sum().backward()
    grouped_linear(x.detach(), weight, bias.detach(), case.source, case.load, backend).sum().backward()
    assert calls == ["input_gradient", "weight_gradient"]


def test_idle_experts_have_no_gradient_where_torch_leaves_theirs_as_memory_was(monkeypatch: pytest.MonkeyPatch) -> None:
    real = grouped.F.grouped_mm

    def leaving(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        y = real(a, b, offs=offs)
        if b.ndim == 2:
            y[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return y

    monkeypatch.setattr(grouped.F, "grouped_mm", leaving)
    case = Case(LOADS["uneven"], 1, 3, torch.float32)
    compare(case, "grouped_mm", torch.float32, False, case.dy)


PAGES = Path("/proc/self/pagemap")


def resident(x: Tensor) -> int:
    """Bytes of a tensor that are in memory."""
    page = mmap.PAGESIZE
    first, last = x.data_ptr() // page, (x.data_ptr() + x.nbytes - 1) // page
    with PAGES.open("rb") as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * (last - first + 1)), np.uint64)
    return page * int((entries >> 63).sum())  # the highest bit says that a page is there


@pytest.mark.skipif(not PAGES.exists(), reason="the system says nothing of pages")
@pytest.mark.parametrize("experts", [16, 64])  # below and above what glibc always maps (32 MiB)
def test_the_gradients_of_idle_experts_take_no_memory_on_a_cpu(experts: int) -> None:
    """For one image their zeros took longer to write than the products of the others."""
    x, dy, weight = torch.ones(1, 2, 512), torch.ones(1, 2, 512), torch.ones(experts, 512, 512)  # 1 MiB each
    load = torch.zeros(experts, dtype=torch.int64).index_fill_(0, torch.tensor([5]), 1)
    for _ in range(3):
        torch.ones_like(weight)  # and so free: calloc would take this, and fill it
    gradient = grouped.weight_gradient(dy, x, torch.zeros(1, dtype=torch.int64), load, weight, "loop")
    assert 2**20 <= resident(gradient) <= 4 * 2**20  # a huge page, or two
    assert (gradient[5] == 2).all() and gradient.sum() == 2 * 512 * 512 and gradient.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("more", [-8, 0, 8])
def test_unwritten_zeros_are_zeros_of_any_size(dtype: torch.dtype, more: int) -> None:
    like = torch.ones(2, (grouped.MAPPED + more) // (2 * dtype.itemsize), dtype=dtype)
    zeros = grouped.unwritten_zeros(like)
    assert (zeros.shape, zeros.dtype, zeros.stride()) == (like.shape, dtype, like.stride()) and not zeros.any()
    assert torch.equal(zeros.add_(1), like) and torch.equal(copy.deepcopy(zeros), like)


def test_where_nothing_can_be_mapped_zeros_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(grouped.mmap, "mmap", refuse)
    assert not grouped.unwritten_zeros(torch.ones(grouped.MAPPED)).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_type_and_gives_gradients_in_that_of_the_weights(backend: str) -> None:
    case = Case(LOADS["uneven"], 1, 3, torch.float32)
    x, weight, bias = case.operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_linear(x, weight, bias, case.source, case.load, backend)
    y.backward(case.dy.bfloat16())
    low = case.operands(torch.bfloat16)
    grouped_linear(*low, case.source, case.load, backend).backward(case.dy.bfloat16())
    assert y.dtype == torch.bfloat16
    for mine, reference in zip((x, weight, bias), low, strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, reference.grad.float())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_pass_computes_in_the_type_of_the_forward_pass_under_an_autocast_too(
    backend: str, k: int, compiled: bool
) -> None:
    case = Case(LOADS["even"], k, 3, torch.float32)
    product = grouped_linear
    if compiled:
        torch._dynamo.reset()
        product = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True)
    gradients = []
    for autocast in (False, True):
        operands = case.operands(torch.float32)
        y = product(*operands, case.source, case.load, backend)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y.backward(case.dy)
        gradients.append([operand.grad for operand in operands])
    for plain, under_autocast in zip(*gradients, strict=True):
        assert torch.equal(plain, under_autocast)


def test_autocast_leaves_float64_alone_as_it_does_elsewhere() -> None:
    layer, x = make().double(), tokens().double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("layout", ["image by class token", "token"])
@pytest.mark.parametrize("ffn", ["mlp", "mlp, norm", "glu, no biases"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layer_agrees_with_its_definition(backend: str, k: int, ffn: str, layout: str) -> None:
    layer = vimoe.set_backend(make(ffn, layout, k=k), backend)
    assert_agrees(layer, tokens(), all_used=False)


def test_a_backend_that_does_not_exist_is_refused() -> None:
    with pytest.raises(vimoe.VimoeError, match="loop"):
        vimoe.set_backend(make(), "lop")


@pytest.mark.parametrize(
    ("layout", "k", "recorded"),
    one_in(5, itertools.product(["image by class token", "image by mean", "token"], [1, 2], [False, True])),
)
def test_torch_compile_sees_one_graph_and_compiles_once_for_all_loads(layout: str, k: int, recorded: bool) -> None:
    layer = make("mlp", layout, k=k)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    loads = set()
    for seed in range(4):
        x = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        exact = x.detach().clone().requires_grad_()
        with vimoe.record(layer) if recorded else nullcontext([]) as routings:
            y = compiled(x)
        loss, exact_y = y.square().sum(), layer(exact)
        if recorded:
            (routing,) = routings
            loss = loss + vimoe.balance_loss(routings)
            loads.add(tuple(routing.load.tolist()))
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
        layer.zero_grad()
        with vimoe.record(layer) as routings:
            exact_loss = layer(exact).square().sum()
        (exact_loss + (vimoe.balance_loss(routings) if recorded else 0)).backward()
        torch.testing.assert_close(y, exact_y)
        torch.testing.assert_close(x.grad, exact.grad)
        for name, p in layer.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad)
        layer.zero_grad()
    assert counter.frame_count == 1
    assert len(loads) > 1 or not recorded


@pytest.mark.parametrize("ffn", ["mlp", "mlp, norm"])
@pytest.mark.parametrize("layout", ["image by class token", "image by mean", "token"])
def test_torch_export_keeps_every_expert_and_takes_any_number_of_images(layout: str, ffn: str) -> None:
    layer = make(ffn, layout, k=2).eval()
    images = torch.export.Dim("images", min=2, max=64)
    program = torch.export.export(layer, (tokens(),), dynamic_shapes=({0: images},))
    for count in (2, 5):
        torch.testing.assert_close(program.module()(tokens(count)), layer(tokens(count)))
    assert {name for name, _ in layer.named_parameters()} == set(program.state_dict)


@pytest.mark.filterwarnings("ignore")  # torch's own: traces are deprecated, and constants are in them
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("traced", [1, 3])
@pytest.mark.parametrize("layout", ["image by class token", "image by mean", "token"])
def test_a_trace_is_right_on_other_images_and_other_numbers_of_them(layout: str, traced: int, k: int) -> None:
    layer = make("mlp", layout, k=k).eval()
    with torch.no_grad():
        trace = torch.jit.trace(layer, tokens(traced), check_trace=False)
        for count in (1, 2, 5):
            others = tokens(count).flip(-1)
            torch.testing.assert_close(trace(others), layer(others))


def test_another_number_of_images_compiles_once_more_and_then_never() -> None:
    layer = make("mlp", "token", k=1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for count in (2, 3, 4, 5, 6):
        torch.testing.assert_close(compiled(tokens(count)), layer(tokens(count)))
    assert counter.frame_count == 2


def operators() -> dict[str, CustomOpDef]:
    """The operators of the layer by name."""
    found = [each for module in (grouped, low_rank_linear, dispatch, router) for each in vars(module).values()]
    return {each._qualname: each for each in found if isinstance(each, CustomOpDef)}


def test_graphs_of_cuda_do_not_capture_what_waits_for_the_data() -> None:
    """Each operator runs on tensors without data: what cannot has to read them, and a graph must not hold it."""
    known = [name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("vimoe::")]
    assert set(operators()) == set(known) and len(known) == 9
    waits = {}
    with FakeTensorMode():
        x, weight, bias = torch.zeros(6, 2, IN), torch.zeros(EXPERTS, OUT, IN), torch.zeros(EXPERTS, OUT)
        source, load = torch.arange(6), torch.zeros(EXPERTS, dtype=torch.long)
        dy, gates, slots = torch.zeros(6, 2, OUT), torch.zeros(6, 1), torch.zeros(6, 1, dtype=torch.long)
        terms, logits = torch.zeros(6, 1, 2, OUT), torch.zeros(6, EXPERTS)
        arguments = {
            "grouped_linear": (x, weight, bias, source, load, "loop"),
            "grouped_linear_input_gradient": (dy, weight, source, load, 6, "loop"),
            "grouped_linear_weight_gradient": (dy, x, source, load, weight, "loop"),
            "grouped_sum": (dy, load),
            "low_rank_linear": (x, weight[0], bias[0], weight[:, :2], weight[..., :2], load, "loop"),
            "combine": (dy, gates, slots, dy, True, True),
            "combine_gradient": (dy, gates, slots, terms, True, True),
            "scores": (x[:, 0], weight[:, 0]),
            "scores_gradient": (logits, x[:, 0], weight[:, 0]),
        }
        for name, operator in operators().items():
            try:
                operator._init_fn(*arguments[name.removeprefix("vimoe::")])
                waits[name] = False
            except (DataDependentOutputException, DynamicOutputShapeException):
                waits[name] = True
    tagged = {name: torch.Tag.cudagraph_unsafe in operator._opoverload.tags for name, operator in operators().items()}
    assert waits == tagged
    assert set(waits.values()) == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_a_cpu_the_loop_is_chosen(dtype: torch.dtype) -> None:
    """It was the fastest of the three wherever loads are uneven; `vimoe bench layer` measures it."""
    assert grouped.choose(torch.zeros(4, 2, 16, dtype=dtype), torch.zeros(3, 8, 16, dtype=dtype)) == "loop"
