"""vimoe.MoE against tests/helpers/reference.py: outputs and every gradient; and the cases at the edge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.layers import (
    COMBINE,
    DIM,
    EXPERTS,
    FFNS,
    HIDDEN,
    IMAGES,
    LAYOUTS,
    TOKENS,
    assert_agrees,
    assert_close,
    by_reference,
    make,
    tokens,
)
from helpers.tiny import randomise
from timm.layers import Mlp
from torch import Tensor, nn

import vimoe
from vimoe.moe.router import TokenLayout


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
        make(layout="image by class token")(torch.zeros(shape))


@pytest.mark.parametrize("layout", ["image by mean", "token"])
def test_a_grid_without_special_tokens_is_a_row(layout: str) -> None:
    layer, x = make(layout=layout), tokens()[:, :4]
    layer.router.layout = TokenLayout(num_prefix_tokens=0, class_token=False)
    assert torch.equal(layer(x.unflatten(1, (2, 2))), layer(x).unflatten(1, (2, 2)))
    if layout == "token":
        assert torch.equal(layer(x[0]), layer(x[:1])[0])
    else:
        with pytest.raises(vimoe.VimoeError, match=r"expected \(images, tokens, channels\)"):
            layer(x[0])


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


def replica_of(module: nn.Module) -> nn.Module:
    """A replica as torch.nn.DataParallel makes them: weights are attributes, and no parameters."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            setattr(replica, name, parameter.detach().clone())
    return replica


@torch.no_grad()
def test_a_replica_of_data_parallel_computes_the_same_or_refuses() -> None:
    """Those refuse whose experts hold the shared expert by reference: on another device it would be the first one's."""
    x = tokens()
    for settings in ({}, {"shared": 0}, {"router": "expert_choice"}, {"gate": "sigmoid"}):
        layer = make(**settings).eval()
        assert torch.equal(replica_of(layer)(x), layer(x))
    for settings in ({"experts": "lora"}, {"experts": "adapter", "shared": 0}, {"router": "smear"}):
        layer = make(layout="image by class token", k=1, **settings).eval()
        layer(x)
        with pytest.raises(vimoe.VimoeError, match="in a replica of DataParallel.*expected DistributedDataParallel"):
            replica_of(layer)(x)
