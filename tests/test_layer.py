"""vimoe.MoE against tests/reference.py: outputs and every gradient; and the cases at the edge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from tiny import randomise
from torch import Tensor, nn

import vimoe
from vimoe.moe.router import TokenLayout

DIM, HIDDEN, IMAGES, TOKENS, EXPERTS = 8, 12, 3, 6, 4

FFNS = {
    "mlp": lambda: Mlp(DIM, HIDDEN),
    "mlp, norm": lambda: Mlp(DIM, HIDDEN, norm_layer=nn.LayerNorm),
    "mlp, no biases": lambda: Mlp(DIM, HIDDEN, bias=False),
    "mlp, first bias only": lambda: Mlp(DIM, HIDDEN, bias=(True, False)),
    "mlp, relu": lambda: Mlp(DIM, HIDDEN, act_layer=nn.ReLU),
    "glu, gate last": lambda: GluMlp(DIM, 2 * HIDDEN),
    "glu, gate last, norm": lambda: GluMlp(DIM, 2 * HIDDEN, norm_layer=nn.LayerNorm),
    "glu, gate first": lambda: GluMlp(DIM, 2 * HIDDEN, act_layer=nn.SiLU, gate_last=False),
    "glu, no biases": lambda: GluMlp(DIM, 2 * HIDDEN, bias=False),
    "swiglu": lambda: SwiGLU(DIM, HIDDEN),
    "swiglu, norm": lambda: SwiGLU(DIM, HIDDEN, norm_layer=nn.LayerNorm),
    "swiglu, no biases": lambda: SwiGLU(DIM, HIDDEN, bias=False),
}
# what is routed, by what: routing, class token, number of prefix tokens
LAYOUTS = {
    "image by class token": ("image", True, 1),
    "image by class token, registers": ("image", True, 3),
    "image by mean": ("image", False, 0),
    "image by mean without registers": ("image", False, 2),
    "token": ("token", True, 1),
}
COMBINE = {"mix": ("mix", False), "sum": ("sum", False), "sum, normalised": ("sum", True)}


def make(ffn: str = "mlp", layout: str = "token", combine: str = "mix", shared: int = 1, k: int = 2) -> vimoe.MoE:
    """A layer all of whose experts differ."""
    routing, class_token, prefix = LAYOUTS[layout]
    rule, normalised = COMBINE[combine]
    config = vimoe.MoEConfig(
        num_experts=EXPERTS,
        top_k=k,
        routing=routing,
        num_shared_experts=shared,
        combine=rule,
        normalize_gates=normalised,
    )
    torch.manual_seed(0)
    return randomise(vimoe.MoE(FFNS[ffn](), config, TokenLayout(prefix, class_token)))


def tokens(images: int = IMAGES, length: int = TOKENS) -> Tensor:
    return torch.randn(images, length, DIM, generator=torch.Generator().manual_seed(1))


def by_reference(layer: vimoe.MoE, x: Tensor, weights: dict[str, Tensor], chosen: list | None = None) -> Tensor:
    """The reference's output for these weights of the layer, which are named as in the layer."""
    config, layout = layer.config, layer.router.layout
    experts = [
        expert({n.removeprefix("experts."): w[e] for n, w in weights.items() if n.startswith("experts.")}, layer)
        for e in range(config.num_experts)
    ]
    shared = {n.removeprefix("shared."): w for n, w in weights.items() if n.startswith("shared.")}
    return reference.moe(
        x,
        weights["router.weight"],
        experts,
        shared_expert(shared, layer) if shared else None,
        top_k=config.top_k,
        routing=config.routing,
        class_token=layout.class_token,
        num_prefix_tokens=layout.num_prefix_tokens,
        combine=config.combine,
        normalize_gates=config.normalize_gates,
        chosen=chosen,
    )


def expert(weights: dict[str, Tensor], layer: vimoe.MoE) -> reference.FFN:
    """Experts hold the rows of the gate before those of the value, whatever their FFN did."""
    gated = weights["fc1.weight"].shape[0] == 2 * weights["fc2.weight"].shape[1]
    first = halves(weights, "fc1") if gated else [None, pair(weights, "fc1")]
    return _ffn(weights, *first, layer)


def shared_expert(weights: dict[str, Tensor], layer: vimoe.MoE) -> reference.FFN:
    """The shared expert is an FFN of timm's, with timm's names and order."""
    if isinstance(layer.shared, SwiGLU):
        return _ffn(weights, pair(weights, "fc1_g"), pair(weights, "fc1_x"), layer)
    if isinstance(layer.shared, GluMlp):
        first, second = halves(weights, "fc1")
        return _ffn(weights, *((second, first) if layer.shared.gate_last else (first, second)), layer)
    return _ffn(weights, None, pair(weights, "fc1"), layer)


def _ffn(weights: dict[str, Tensor], gate: tuple | None, fc1: tuple, layer: vimoe.MoE) -> reference.FFN:
    norm = pair(weights, "norm") if "norm.weight" in weights else None
    return reference.FFN(fc1=fc1, fc2=pair(weights, "fc2"), gate=gate, norm=norm, eps=1e-5, act=layer.experts.act)


def pair(weights: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    return weights[f"{name}.weight"], weights.get(f"{name}.bias")


def halves(weights: dict[str, Tensor], name: str) -> list[tuple[Tensor, Tensor | None]]:
    weight, bias = pair(weights, name)
    return list(zip(weight.chunk(2), [None, None] if bias is None else bias.chunk(2), strict=True))


def assert_agrees(layer: vimoe.MoE, x: Tensor, all_used: bool = True) -> None:
    """Output and every gradient of the layer in float32 are the reference's in float64, to float32 rounding."""
    x = x.detach().requires_grad_()
    exact = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    y, exact_y = layer(x), by_reference(layer, exact_x, exact)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * direction).sum().backward()
    (exact_y * direction).sum().backward()
    assert_close(y, exact_y)
    assert_close(x.grad, exact_x.grad)
    for name, p in layer.named_parameters():
        assert_close(p.grad, exact[name].grad, name)
        if all_used and not (name == "router.weight" and layer.config.router_is_blind):
            assert exact[name].grad.abs().max() > 1e-3, f"{name}: the comparison would be of zeros"


def assert_close(actual: Tensor, exact: Tensor, name: str = "") -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=5e-6, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("layout", ["image by class token", "token"])
@pytest.mark.parametrize("ffn", FFNS)
def test_every_kind_of_ffn_agrees_with_the_loop(ffn: str, layout: str, shared: int) -> None:
    assert_agrees(make(ffn, layout, shared=shared), tokens())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_setting_agrees_with_the_loop(layout: str, combine: str, shared: int, k: int) -> None:
    assert_agrees(make("mlp", layout, combine, shared, k), tokens())


@pytest.mark.parametrize(("images", "length"), [(1, TOKENS), (IMAGES, 1), (1, 1)])
@pytest.mark.parametrize("layout", ["image by class token", "image by mean", "token"])
def test_one_image_or_one_token_agrees_with_the_loop(layout: str, images: int, length: int) -> None:
    assert_agrees(make(layout=layout), tokens(images, length), all_used=False)


@pytest.mark.parametrize("layout", ["image by class token", "token"])
def test_all_on_one_expert_agrees_with_the_loop_and_the_idle_get_zero_gradient(layout: str) -> None:
    layer, x = make(layout=layout, k=1), tokens().abs()
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([-0.5, -0.5, 0.5, -0.5]).view(EXPERTS, 1).expand(EXPERTS, DIM))
    assert_agrees(layer, x, all_used=False)
    for p in layer.experts.parameters():
        assert p.grad[2].any()
        assert not p.grad[[0, 1, 3]].any()


@pytest.mark.parametrize("layout", ["image by class token", "image by mean", "token"])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(layout: str) -> None:
    layer = make(layout=layout)
    y = layer(tokens(images=0))
    assert y.shape == (0, TOKENS, DIM)
    y.sum().backward()
    assert not any(p.grad.any() for p in layer.experts.parameters())


@pytest.mark.parametrize("layout", ["image by class token", "token"])
def test_tied_scores_choose_k_different_experts_with_equal_gates(layout: str) -> None:
    layer, x = make(layout=layout, k=2), tokens()
    nn.init.zeros_(layer.router.weight)
    with vimoe.record(layer) as routings:
        y = layer(x)
    (routing,) = routings
    assert torch.equal(routing.gates, torch.full_like(routing.gates, 1 / EXPERTS))
    assert (routing.experts[:, 0] != routing.experts[:, 1]).all()
    weights = {name: p.detach().double() for name, p in layer.named_parameters()}
    assert_close(y, by_reference(layer, x.double(), weights, chosen=routing.experts.tolist()))


@pytest.mark.parametrize("layout", ["image by class token", "image by mean", "token"])
def test_a_non_contiguous_input_gives_the_same_output(layout: str) -> None:
    layer, x = make(layout=layout), tokens()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(layer(strided), layer(x))


@pytest.mark.parametrize("shape", [(TOKENS, DIM), (IMAGES, 2, 3, DIM)])
def test_an_input_that_is_not_images_by_tokens_by_channels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(vimoe.VimoeError, match=r"expected \(images, tokens, channels\)"):
        make()(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_gates_stay_float32_under_autocast(layout: str, dtype: torch.dtype) -> None:
    """Of what the experts see, too: tokens rounded to the type of the autocast."""
    layer, x = make(layout=layout), tokens().to(dtype)
    with vimoe.record(layer) as plain:
        exact = layer(x.bfloat16().float())
    with vimoe.record(layer) as mixed, torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        dense = layer.shared(x)
    assert mixed[0].logits.dtype == mixed[0].gates.dtype == torch.float32
    assert torch.equal(mixed[0].logits, plain[0].logits)
    assert torch.equal(mixed[0].gates, plain[0].gates)
    assert y.dtype == dense.dtype == torch.bfloat16
    assert 0 < (y.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_autocast_one_copy_of_the_input_is_kept_for_backward(layout: str) -> None:
    layer, x = make(layout=layout), tokens().requires_grad_() * 1
    kept: dict[int, tuple[torch.dtype, int]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = tensor.dtype, storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    as_large = [dtype for dtype, elements in kept.values() if elements == x.numel()]
    assert as_large == [torch.bfloat16]  # what the gates multiplied is as large for each of the k


@pytest.mark.parametrize("combine", ["mix", "sum"])
@pytest.mark.parametrize("layout", ["image by class token", "token"])
@pytest.mark.parametrize("ffn", ["mlp", "glu, gate last, norm", "swiglu, norm"])
def test_gradients_are_those_of_finite_differences(ffn: str, layout: str, combine: str) -> None:
    """Of the input, the gates and every weight, in float64, where finite differences are exact enough.

    A hook fixes the router's decision, so that an expert is idle and the gates are inputs of their own.
    """
    layer, x = make(ffn, layout, combine).double(), tokens(2, 3).double().requires_grad_()
    routing = layer.router(x)
    experts = routing.experts.clamp(max=EXPERTS - 2)  # so that the last one is idle
    gates = routing.gates.detach().double().requires_grad_()
    names, weights = zip(*((n, p) for n, p in layer.named_parameters() if n != "router.weight"), strict=True)

    def compute(x: Tensor, gates: Tensor, *weights: Tensor) -> Tensor:
        decision = replace(routing, gates=gates, experts=experts)
        with layer.router.register_forward_hook(lambda *_: decision):
            return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), x)

    assert torch.autograd.gradcheck(compute, (x, gates, *weights), fast_mode=True)


@pytest.mark.parametrize("combine", ["mix", "sum"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_through_the_router_are_those_of_finite_differences(layout: str, combine: str) -> None:
    """Of the whole layer; the margin of the choice is far above the step, so that no difference crosses it."""
    layer, x = make("mlp", layout, combine).double(), tokens(2, 3).double().requires_grad_()
    with vimoe.record(layer) as routings:
        layer(x)
    best = routings[0].logits.sort(descending=True).values
    assert routings[0].logits.dtype == torch.float64 and (best[:, 0] - best[:, 1]).min() > 1e-3
    names, weights = zip(*layer.named_parameters(), strict=True)

    def compute(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), x)

    assert torch.autograd.gradcheck(compute, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("ffn", FFNS)
def test_every_expert_starts_as_the_dense_ffn(ffn: str) -> None:
    dense, x = randomise(FFNS[ffn]()), tokens(1, TOKENS)
    layer = vimoe.MoE(dense, vimoe.MoEConfig(num_experts=EXPERTS), TokenLayout(1, True))
    for expert_index in range(EXPERTS):
        load = torch.tensor([i == expert_index for i in range(EXPERTS)]).long()
        torch.testing.assert_close(layer.experts(x, torch.tensor([0]), load), dense(x))


@pytest.mark.parametrize(("first", "last"), [(0.5, 0.0), (0.0, 0.5)])
def test_experts_drop_out_where_the_ffn_did_and_only_in_training(first: float, last: float) -> None:
    dense = Mlp(DIM, HIDDEN, drop=(first, last))
    layer = vimoe.MoE(dense, vimoe.MoEConfig(num_experts=1, num_shared_experts=0, top_k=1), TokenLayout(1, True))
    x = tokens()
    zeros = (layer(x) == 0).float().mean()
    assert (zeros > 0.3) == (last > 0)  # the second dropout empties outputs, the first one does not
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own jvp uses it
@pytest.mark.parametrize("frozen", [False, True])
def test_a_forward_mode_derivative_is_refused(frozen: bool) -> None:
    layer, x = make().requires_grad_(not frozen), tokens()
    with pytest.raises(vimoe.VimoeError, match="expected reverse mode"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))
