"""Contestants in the shape of a layer: routed as asked, and not slower or larger than they should be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vimoe
from vimoe.bench.layer import layer_case, layer_memory, layer_seconds
from vimoe.bench.timing import compare
from vimoe.config.bench import LayerBench
from vimoe.config.moe import MoEConfig
from vimoe.moe.grouped_linear import BACKENDS

SMALL = LayerBench(images=2, tokens=8, dim=16, hidden=32, rounds=3)


@pytest.mark.parametrize("routing", ["image", "token"])
def test_layers_are_routed_as_asked_and_compute_in_the_type(routing: str) -> None:
    case = layer_case(replace(SMALL, images=8, dtype="bfloat16", load="zipf"), MoEConfig(routing=routing))
    assert set(case.layers) >= {*case.floor, "vimoe auto", "vimoe loop", "vimoe bmm", "vimoe grouped_mm"}
    outputs = []
    for name, layer in case.layers.items():
        with vimoe.record(layer) as routings:
            y = layer(case.x)
        assert y.shape == case.x.shape and y.dtype == torch.bfloat16
        if name not in case.floor:
            assert torch.equal(routings[0].experts, case.experts)
            outputs.append(y)
    side_by_side = case.layers[case.floor[0]]
    assert case.macs == sum(p.numel() for p in side_by_side.parameters() if p.ndim == 2)
    for y in outputs:  # every expert and the shared one begin as one FFN, so all of them compute it
        torch.testing.assert_close(y, side_by_side.ffns[0](case.x), rtol=0.02, atol=0.002)


def test_under_autocast_products_are_bfloat16_and_gradients_float32() -> None:
    case = layer_case(replace(SMALL, precision="bf16"), MoEConfig(routing="token"))
    seen: dict[str, torch.dtype] = {}
    for name, layer in case.layers.items():
        layer.register_forward_hook(lambda module, args, y, name=name: seen.update({name: y.dtype}))
    layer_seconds(case, training=True, rounds=1)
    assert seen == dict.fromkeys(case.layers, torch.bfloat16)
    assert {p.grad.dtype for layer in case.layers.values() for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("routing", ["image", "token"])
def test_a_layer_keeps_at_most_7_percent_more_for_backward_than_the_floor(
    routing: str, dtype: str, backend: str
) -> None:
    case = layer_case(LayerBench(images=2, tokens=129, dtype=dtype), MoEConfig(routing=routing))
    kept = layer_memory(replace(case, layers={name: case.layers[name] for name in (*case.floor, f"vimoe {backend}")}))
    assert 1 < kept[f"vimoe {backend}"] / min(kept[name] for name in case.floor) < 1.07


def test_a_backend_that_torch_cannot_run_here_is_left_out() -> None:
    for bench in (replace(SMALL, dim=7), replace(SMALL, dim=20, precision="bf16")):  # rows of 28 and of 40 bytes
        case = layer_case(bench, MoEConfig())
        assert "vimoe loop" in case.layers and "vimoe grouped_mm" not in case.layers
        assert "16 bytes" in case.left_out["vimoe grouped_mm"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU the loop is chosen: test_grouped_linear.py")
# images, routing, number of experts
@pytest.mark.parametrize(("images", "routing", "experts"), [(8, "token", 8), (8, "image", 8), (1, "image", 64)])
def test_what_is_chosen_is_not_slower_than_the_loop_beyond_noise(images: int, routing: str, experts: int) -> None:
    bench = LayerBench(images=images, tokens=65, dim=96, hidden=384)
    case = layer_case(bench, MoEConfig(routing=routing, num_experts=experts))
    case = replace(case, layers={name: case.layers[name] for name in (*case.floor, "vimoe auto", "vimoe loop")})
    for training in (False, True):
        seconds = layer_seconds(case, training, rounds=20)
        (auto,) = (t for t in compare(seconds, ("vimoe loop",), {}) if t.name == "vimoe auto")
        assert auto.low < 1.1, f"{auto.ratio:.2f} [{auto.low:.2f}, {auto.high:.2f}] of the loop"
