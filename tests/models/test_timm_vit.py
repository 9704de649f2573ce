"""Models of timm that are no plain ViTs: hierarchical ones, grids, mixers, late class tokens. And what users call."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.round_trip import round_trip
from helpers.slow import one_in
from helpers.tiny import config, layers, perturb_experts, randomise, upcycle, vit
from helpers.tiny import images as pixels
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import vimoe
from vimoe.errors import ConfigError
from vimoe.models.interface import find_backbone
from vimoe.models.segmenter import Segmenter
from vimoe.models.upcycling import sites
from vimoe.moe.router import TokenLayout

PLAIN: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "tokens in stages": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)},
        32,
    ),
    "grids": ("convnext_tiny", SMALL, 32),
    "convolutions": ("convnext_tiny", {**SMALL, "conv_mlp": True}, 32),
    "lists of blocks": ("twins_svt_small", {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64)}, 64),
    "class token later": ("cait_xxs24_224", PLAIN, 32),
}


def dense(name: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    called, arguments, _ = MODELS[name]
    return randomise(timm.create_model(called, num_classes=5, **arguments, **more), scale=0.3).eval()


def images(name: str, batch: int = 3) -> Tensor:
    side = MODELS[name][2]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("routing", ["image", "token"])
def test_it_is_upcycled_saved_and_brought_back(name: str, routing: str, tmp_path: Path) -> None:
    parent = dense(name)
    _, names = round_trip(parent, images(name), routing, tmp_path / "m", model_args=MODELS[name][1])
    assert names == [site.name for site in sites(parent)] and len(names) >= 2


@pytest.mark.parametrize("routing", ["image", "token"])
def test_decisions_for_an_image_are_of_that_image_alone(name: str, routing: str) -> None:
    """The first axis of what the routers get is images, and each image has all of its tokens there."""
    model = perturb_experts(vimoe.upcycle(dense(name), config(routing=routing)))
    x = images(name)
    with torch.no_grad(), vimoe.record(model) as together:
        model(x)
    with torch.no_grad(), vimoe.record(model) as alone:
        model(x[1:2])
    for ours, theirs in zip(together, alone, strict=True):
        rows = ours.logits.shape[0] // 3
        torch.testing.assert_close(ours.logits[rows : 2 * rows], theirs.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("name", ["grids", "convolutions"], indirect=True)
def test_it_is_calibrated_analysed_and_pruned(name: str, routing: str) -> None:
    x, y = images(name, 8), torch.arange(8) % 5
    model = vimoe.upcycle(dense(name), config(routing=routing, init="cluster"), images=[(x, y)])
    evidence = vimoe.analyze(model, [(x, y)], draws=2, overrule=20)
    assert [layer.name for layer in evidence.layers] == [site.name for site in sites(model)]
    vimoe.prune(model, evidence, [(x, y)], tolerance=99.0)
    assert not layers(model)


def test_the_layout_is_what_a_block_gets() -> None:
    late = find_backbone(dense("class token later"))
    assert late.layout == TokenLayout(1, True)
    assert late.layout_of(4) == TokenLayout(0, False) and late.layout_of(1) == TokenLayout(1, True)
    assert late.layout_of(5) == TokenLayout(1, True)
    pyramid = find_backbone(dense("tokens in stages"))
    assert pyramid.layout_of(64) == pyramid.layout_of(16) == TokenLayout(0, False)


def test_blocks_of_a_hierarchical_model_are_its_stages() -> None:
    model = dense("tokens in stages")
    assert find_backbone(model).blocks == ("layers.0", "layers.1")
    vimoe.upcycle(model, config(layers="last:1"))
    assert [name for name, m in model.named_modules() if isinstance(m, vimoe.MoE)] == [
        "layers.1.blocks.0.mlp",
        "layers.1.blocks.1.mlp",
    ]


def test_the_mlp_of_a_mixer_that_maps_the_tokens_of_a_channel_is_left_alone() -> None:
    with torch.device("meta"):
        model = timm.create_model("mixer_s32_224")
    assert {site.name for site in sites(model)} == {f"blocks.{i}.mlp_channels" for i in range(8)}


@pytest.mark.parametrize("name", ["swinv2_cr_tiny_224", "csatv2", "maxvit_rmlp_pico_rw_256"])
def test_mlps_that_make_biases_or_masks_are_left_alone(name: str) -> None:
    with torch.device("meta"):
        found = [site.name for site in sites(timm.create_model(name))]
    assert found and not any(".attn.meta_mlp" in each or ".attn.attn" in each or ".rel_pos" in each for each in found)


def test_a_hierarchical_model_gives_no_maps_to_a_decoder() -> None:
    model = dense("tokens in stages")
    model.reset_classifier(0)
    assert find_backbone(model).width is None
    with pytest.raises(ConfigError, match="SwinTransformer gives no feature maps"):
        Segmenter(model, 3)


# ---- what timm's users call


CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "forward_features": lambda model, x: model.forward_features(x),
    "forward_intermediates": lambda model, x: model.forward_intermediates(x, indices=1)[1][0],
    "get_intermediate_layers": lambda model, x: model.get_intermediate_layers(x, n=2)[0],
    "forward_head": lambda model, x: model.forward_head(model.forward_features(x)),
    "without a classifier": lambda model, x: (model.reset_classifier(0), model(x))[1],
    "copy": lambda model, x: copy.deepcopy(model)(x),
    "compile": lambda model, x: torch.compile(model, backend="eager", fullgraph=True)(x),
    "half": lambda model, x: model.half()(x.half()).float(),
}


@pytest.mark.parametrize(("call", "routing"), one_in(3, itertools.product(CALLS, ["image", "token"])))
@torch.no_grad()
def test_an_upcycled_vit_answers_timms_calls_as_its_parent_does(call: str, routing: str) -> None:
    parent = vit(depth=3)
    model, x = upcycle(copy.deepcopy(parent), config(routing=routing)), pixels(parent)
    changed = perturb_experts(copy.deepcopy(model))
    precision = 2e-2 if call == "half" else 1e-4
    expected, found = (CALLS[call](each, x) for each in (parent, model))
    torch.testing.assert_close(found, expected, rtol=precision, atol=precision)
    assert (CALLS[call](changed, x) - expected).abs().max() > 10 * precision


@pytest.mark.parametrize("call", [call for call in CALLS if call not in ("get_intermediate_layers", "compile")])
@torch.no_grad()
def test_other_models_of_timm_answer_its_calls_as_their_parents_do(name: str, call: str) -> None:
    parent, x = dense(name), images(name)
    model = vimoe.upcycle(copy.deepcopy(parent), config())
    precision = 2e-2 if call == "half" else 1e-4
    expected, found = (CALLS[call](copy.deepcopy(each), x) for each in (parent, model))
    torch.testing.assert_close(found, expected, rtol=precision, atol=precision)


@torch.no_grad()
def test_features_of_a_list_of_modules_are_those_of_the_parent() -> None:
    """timm takes some models apart for features alone; what is left is of no family, and its FFNs have names."""
    parent = randomise(timm.create_model("convnext_tiny", features_only=True, **SMALL), scale=0.3).eval()
    model = vimoe.upcycle(copy.deepcopy(parent), config(layers="stages_*.mlp", routing="token"))
    assert len(layers(model)) == 4
    x = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(model(x), parent(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_features_alone_are_those_of_the_parent() -> None:
    parent = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **PLAIN).eval()
    model = vimoe.upcycle(copy.deepcopy(parent), config())
    assert len(layers(model)) == 2
    x = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(model(x), parent(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(perturb_experts(model)(x)[0], parent(x)[0], atol=1e-2)


@pytest.mark.parametrize("changes", [{}, {"dynamic_img_size": True}], ids=str)
def test_a_vit_is_saved_for_the_size_that_it_was_built_for(changes: dict, tmp_path: Path) -> None:
    """Also one that takes any size, of which timm notes the size of its weights; a size that is given holds."""
    model = vit("dinov3") if not changes else vit(**changes)
    for each in (model, vimoe.load(vimoe.save(model, tmp_path / "m"))):
        assert find_backbone(each).data_config({})["input_size"] == (3, 32, 32)
    vimoe.save(model, tmp_path / "other", preprocessing={"input_size": (3, 48, 64)})
    again = vimoe.load(tmp_path / "other")
    assert find_backbone(again).data_config({})["input_size"] == (3, 48, 64)


def test_names_by_number_are_names() -> None:
    model = vit(num_classes=2)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": {"n01": "cat", "n02": "dog"}}
    assert find_backbone(model).label_names == ["cat", "dog"]


def test_a_changed_classifier_has_its_number_of_classes() -> None:
    model = upcycle(vit(), config())
    model.reset_classifier(7)
    assert model(pixels(model)).shape == (3, 7) and find_backbone(model).num_classes == 7
    assert len(layers(model)) == 2


def test_checkpointing_changes_no_gradient() -> None:
    found, made = [], perturb_experts(upcycle(vit(), config()))
    for checkpointing in (False, True):
        model = copy.deepcopy(made)
        model.set_grad_checkpointing(checkpointing)
        model(pixels(model)).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_timms_layer_decay_gives_experts_the_rate_of_their_block() -> None:
    model = upcycle(vit(depth=3), config())
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert set(scales) == {id(p) for p in model.parameters()}
    for block in model.blocks:
        assert {scales[id(p)] for p in block.mlp.parameters()} == {scales[id(block.attn.qkv.weight)]}
    assert len({scales[id(block.attn.qkv.weight)] for block in model.blocks}) == 3


@torch.no_grad()
def test_a_saved_state_brings_it_back() -> None:
    model, file = perturb_experts(upcycle(vit(), config())), io.BytesIO()
    torch.save(model.state_dict(), file)
    again = upcycle(vit(), config())
    assert not torch.equal(again(pixels(model)), model(pixels(model)))
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(again(pixels(model)), model(pixels(model)))
