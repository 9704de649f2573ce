"""vimoe.optimize: the same selections, the same outputs to rounding; and what can no longer be done."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import timm
import torch
from helpers.layers import FFNS, make, tokens
from helpers.tiny import FAMILIES, images, perturb_experts, randomise, vit
from torch import nn

import vimoe
from vimoe.models.segmenter import Segmenter
from vimoe.moe.packed import PackedExperts, PackedLinear, can_pack

packs = pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="this build of torch packs nothing")


def both(model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None) -> None:
    """Compares the optimised model with a copy that is not, in the same type."""
    fast = vimoe.optimize(copy.deepcopy(model), dtype)
    plain = model.eval()
    exact = [layer.router.weight.clone() for layer in plain.modules() if isinstance(layer, vimoe.MoE)]
    plain.to(dtype or torch.float32)
    for layer, weight in zip((m for m in plain.modules() if isinstance(m, vimoe.MoE)), exact, strict=True):
        layer.router.weight.data = weight
    routers = [layer.router.weight for layer in fast.modules() if isinstance(layer, vimoe.MoE)]
    assert all(torch.equal(ours, weight) for ours, weight in zip(routers, exact, strict=True))
    with torch.no_grad(), vimoe.record(plain) as routings:
        expected = plain(x.to(dtype or torch.float32))
    with torch.no_grad(), vimoe.record(fast) as fast_routings:
        y = fast(x)
    tolerance = 1e-5 if dtype is None else 3e-2
    assert y.dtype == expected.dtype
    # where the margin of a choice is more than rounding, it is the same; outputs are compared where all of them are
    agree = torch.ones(len(x), dtype=torch.bool)
    for a, b in zip(routings, fast_routings, strict=True):
        best = a.probabilities.topk(a.experts.shape[1] + 1, dim=-1).values
        sure = best[:, -2] - best[:, -1] > (1e-4 if dtype is None else 1e-2)
        same = (a.experts.sort(dim=-1).values == b.experts.sort(dim=-1).values).all(dim=-1)
        assert same[sure].all()
        agree &= same.view(len(x), -1).all(dim=1)
    assert agree.any()
    assert (y - expected)[agree].abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", ["image by class token", "token"])
@pytest.mark.parametrize("ffn", FFNS)
def test_a_layer_chooses_and_computes_the_same(ffn: str, layout: str, dtype: torch.dtype | None) -> None:
    layer = make(ffn, layout)
    both(layer, tokens(), dtype)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_models_does(family: str, routing: str, dtype: torch.dtype | None) -> None:
    config = vimoe.MoEConfig(layers="last:1", num_experts=4, routing=routing)
    try:
        model = perturb_experts(vimoe.upcycle(vit(family), config))
    except vimoe.VimoeError:
        pytest.skip("this family routes no images")
    size = timm.models.get_model_input_config(model)["input_size"]
    both(model, torch.randn(3, *size, generator=torch.Generator().manual_seed(0)), dtype)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_segmenter_does(dtype: torch.dtype | None) -> None:
    backbone = vit(num_classes=0, dynamic_img_size=True)
    model = randomise(Segmenter(backbone, 3), seed=1, scale=0.3).eval()
    model = perturb_experts(vimoe.upcycle(model, vimoe.MoEConfig(layers="last:1", num_experts=4, routing="token")))
    both(model, images(backbone), dtype)


@packs
def test_what_products_read_is_packed_and_activations_go_with_them() -> None:
    model = vimoe.optimize(vimoe.upcycle(vit(), vimoe.MoEConfig(layers="last:1", num_experts=4)))
    assert isinstance(model.blocks[-1].mlp.experts, PackedExperts)
    first = model.blocks[0].mlp
    assert isinstance(first.fc1, PackedLinear) and isinstance(first.act, nn.Identity)
    assert isinstance(model.blocks[0].attn.qkv, PackedLinear)


@packs
def test_what_is_optimised_can_only_be_run(tmp_path: Path) -> None:
    model = vimoe.optimize(vimoe.upcycle(vit(), vimoe.MoEConfig(layers="last:1", num_experts=4)))
    config = vimoe.MoEConfig(layers=[0])
    x = images(model)
    for refused in (
        lambda: vimoe.optimize(model),
        lambda: vimoe.set_backend(model, "loop"),
        lambda: vimoe.save(model, tmp_path / "model"),
        lambda: vimoe.densify(model),
        lambda: vimoe.upcycle(model, config),
        lambda: vimoe.plan(model, config),
        lambda: vimoe.count(model),
        lambda: vimoe.analyze(model, [(x, torch.zeros(len(x), dtype=torch.long))]),
        lambda: copy.deepcopy(model),
        lambda: torch.save(model, io.BytesIO()),
        lambda: model.state_dict(),
        lambda: torch.export.export(model, (x,)),
        lambda: model.train(),
    ):
        with pytest.raises(vimoe.VimoeError, match="only be run"):
            refused()
    assert not (tmp_path / "model").exists()


@packs
def test_a_gradient_through_packed_weights_is_refused_and_not_wrong() -> None:
    model = vimoe.optimize(vimoe.upcycle(vit(), vimoe.MoEConfig(layers="last:1", num_experts=4)))
    x = images(model)
    with pytest.raises(vimoe.VimoeError, match="gradient"):
        model(x.clone().requires_grad_())
    assert not model(x).requires_grad
    with torch.no_grad():
        assert torch.equal(model(x.clone().requires_grad_()), model(x))


@pytest.mark.parametrize("routing", ["image", "token"])
def test_what_is_optimised_runs_under_autocast(routing: str) -> None:
    every = vimoe.MoEConfig(layers="last:1", num_experts=3, top_k=3, routing=routing)  # so that no choice is rounded
    model = perturb_experts(vimoe.upcycle(vit(), every))
    x = images(model)
    with torch.no_grad():
        expected = model.eval()(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = vimoe.optimize(model)(x)
    assert (y - expected).abs().max() <= 3e-2 * expected.abs().max()


@pytest.mark.parametrize("where", ["blocks.0.attn.qkv", "blocks.0.mlp.act", "blocks.0.mlp.fc2", "blocks.1.mlp.experts"])
def test_hooks_do_what_they_did(where: str) -> None:
    model = perturb_experts(vimoe.upcycle(vit(), vimoe.MoEConfig(layers="last:1", num_experts=4))).eval()
    x = images(model)
    without = model(x)
    model.get_submodule(where).register_forward_hook(lambda module, args, output: 2 * output)
    with torch.no_grad():
        expected = model(x)
        assert not torch.allclose(expected, without)
        torch.testing.assert_close(vimoe.optimize(model)(x), expected)


def test_inputs_given_by_name_are_cast_too() -> None:
    model = vimoe.optimize(vit(), torch.bfloat16)
    x = images(model)
    with torch.inference_mode():
        assert torch.equal(model(x=x), model(x)) and model(x=x).dtype == torch.bfloat16


def test_a_type_that_does_not_float_is_refused() -> None:
    with pytest.raises(vimoe.VimoeError, match="floating"):
        vimoe.optimize(vit(), torch.int8)
    with pytest.raises(vimoe.VimoeError, match="floating"):
        vimoe.optimize(vit(), "bfloat16")  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiled_it_computes_the_same() -> None:
    """Needs a C++ compiler on a CPU."""
    model = perturb_experts(vimoe.upcycle(vit(), vimoe.MoEConfig(layers="last:1", num_experts=4)))
    x = torch.randn(3, *timm.models.get_model_input_config(model)["input_size"])
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(vimoe.optimize(model, compile=True)(x), expected, rtol=1e-4, atol=1e-4)


def test_what_is_optimised_stays_where_and_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vimoe.optimize(vimoe.upcycle(vit(depth=2), vimoe.MoEConfig(layers="last:1")))
    model.to("cpu").float()  # which change nothing
    with pytest.raises(vimoe.VimoeError, match="can only be run"):
        model.bfloat16()
    monkeypatch.setattr("vimoe.models.inference.can_pack", lambda weight: False)
    unpacked = vimoe.optimize(vimoe.upcycle(vit(depth=2), vimoe.MoEConfig(layers="last:1")))
    for change in (vimoe.optimize, vimoe.densify):
        with pytest.raises(vimoe.VimoeError, match="can only be run"):
            change(unpacked)
