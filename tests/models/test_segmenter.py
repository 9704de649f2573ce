"""A ViT with a decoder: shapes, gradients, image sizes; MoE layers inside of it; folders."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.segmenters import pictures, segmenter
from helpers.slow import one_in
from helpers.tiny import config, layers, perturb_experts, randomise, upcycle, vit
from torch import nn

import vimoe
from vimoe.config.model import ModelConfig
from vimoe.config.train import TrainConfig
from vimoe.data.loaders import preprocessing
from vimoe.errors import ConfigError, FolderError
from vimoe.metrics.segmentation import pixel_loss
from vimoe.models.create import create_segmenter
from vimoe.models.decoders import DECODERS
from vimoe.models.interface import find_backbone, label_names
from vimoe.models.segmenter import Segmenter
from vimoe.training.parameter_groups import freeze_all_but, parameter_groups

# how tokens are laid out: class token; registers; neither class token nor prefix; rotary embeddings
BACKBONES = (
    "vit",
    "dinov2, registers",
    "siglip, attention pool",
    "registers without class token",
    "dinov3",
    "eva02, SwiGLU with inner norm",
)
PALETTE = ((1, 2, 3), (4, 5, 6), (7, 8, 9))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("family", BACKBONES)
@torch.no_grad()
def test_every_decoder_scores_every_pixel(family: str, decoder: str) -> None:
    model = segmenter(family, decoder)
    got = model(pictures(model))
    assert got.shape == (2, 3, *model.crop) and got.isfinite().all() and got.std() > 0
    patch = model.backbone.patch_embed.patch_size[0]
    assert model(pictures(model, 1, (3 * patch, 5 * patch))).shape == (1, 3, 3 * patch, 5 * patch)


@torch.no_grad()
def test_linear_is_a_linear_map_of_the_last_patch_tokens() -> None:
    model = segmenter("dinov2, registers")
    x = pictures(model)
    tokens = model.backbone.forward_features(x)[:, model.backbone.num_prefix_tokens :]
    head = model.decoder
    assert head.blocks == (3,)
    side = model.crop[0] // 14
    scores = F.linear((tokens - head.norm.running_mean) / (head.norm.running_var + 1e-5).sqrt() * head.norm.weight
                      + head.norm.bias, head.classifier.weight[:, :, 0, 0], head.classifier.bias)  # fmt: skip
    grid = scores.transpose(1, 2).reshape(2, 3, side, side)
    expected = F.interpolate(grid, model.crop, mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_decoders_read_the_layers_that_they_say() -> None:
    assert segmenter(decoder="linear4", depth=6).decoder.blocks == (2, 3, 4, 5)
    assert DECODERS["upernet"](8, 12, 3).blocks == (2, 5, 8, 11)


@pytest.mark.parametrize("decoder", DECODERS)
def test_gradients_reach_every_block(decoder: str) -> None:
    model = segmenter(decoder=decoder).train()
    masks = torch.randint(3, (2, *model.crop), generator=torch.Generator().manual_seed(0))
    pixel_loss(model(pictures(model)), masks).backward()
    unmoved = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # what follows the softmax of attention is blind to a bias of the keys; nothing else may be left out
    assert all(p.grad is not None for p in model.parameters())
    assert not [name for name in unmoved if name.endswith("weight")]


@torch.no_grad()
def test_a_backbone_that_is_put_in_its_place_is_computed_with() -> None:
    """As in the replicas of DataParallel; `randomise` draws other weights."""
    model, other = segmenter(), segmenter()
    randomise(other.backbone, seed=5)
    x, before = pictures(model), model(pictures(model))
    other.decoder, model.backbone = model.decoder, other.backbone
    assert torch.equal(model(x), other(x)) and not torch.equal(model(x), before)
    model.backbone = vit("dinov2", num_classes=0, depth=4, dynamic_img_size=True)
    assert model.patch_size == (14, 14)
    model.backbone = vit(num_classes=0, depth=4, dynamic_img_size=False)
    assert model.fixed_size == (32, 32)


@torch.no_grad()
def test_it_is_compiled_and_exported_whole() -> None:
    model = segmenter()
    x = pictures(model)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.parametrize("size", [(40, 32), (33, 50), (7, 5)], ids=str)
@torch.no_grad()
def test_other_sizes_are_padded_at_the_bottom_and_right_and_cut_back(size: tuple[int, int]) -> None:
    model = segmenter()
    x = pictures(model, 1, size)
    height, width = (-(-side // 16) * 16 for side in size)
    by_hand = torch.zeros(1, 3, height, width)
    by_hand[..., : size[0], : size[1]] = x
    got = model(x)
    assert got.shape == (1, 3, *size)
    torch.testing.assert_close(got, model(by_hand)[..., : size[0], : size[1]])


@pytest.mark.parametrize("changes", [{"family": "vit", "dynamic_img_size": False}, {"family": "beit"}], ids=str)
@torch.no_grad()
def test_a_vit_of_fixed_size_takes_what_fits(changes: dict) -> None:
    arguments = {"num_classes": 0, "depth": 4, **changes}
    model = Segmenter(vit(**arguments), 3).eval()
    assert model(pictures(model, 1, (20, 32))).shape == (1, 3, 20, 32)
    with pytest.raises(vimoe.VimoeError, match=r"40x32 for a ViT of fixed size: expected at most 32x32; .* windows"):
        model(pictures(model, 1, (40, 32)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segmenter(vit(), 3), "classifies images into 5: .* num_classes=0"),
        (lambda: Segmenter(vit(num_classes=0), 3, "liner"), "decoder='liner': did you mean 'linear'"),
        (lambda: Segmenter(vit(num_classes=0), 1), "classes=1: expected 2 to 255"),
        (lambda: Segmenter(vit(num_classes=0), 3, palette=[(0, 0, 0)]), "palette of 1 colours"),
        (lambda: Segmenter(vit(num_classes=0), 3, "linear4"), "last 4 layers: expected as many blocks, got 2"),
        (lambda: Segmenter(vit(num_classes=0), 3, "upernet"), "reads four layers: expected as many blocks, got 2"),
        (lambda: Segmenter(vit(num_classes=0), 3, crop=(40, 60)), r"crop=\(40, 60\): .* 16x16, such as \(32, 64\)"),
        (lambda: Segmenter(nn.Linear(2, 2), 3), "Linear gives no feature maps"),
    ],
)
def test_what_cannot_be_is_one_line(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_upernet_without_transformers_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="not installed: pip install 'transformers>=5'"):
        segmenter(decoder="upernet")


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("family", BACKBONES)
@torch.no_grad()
def test_upcycling_changes_nothing_and_densify_brings_it_back(family: str, routing: str) -> None:
    parent = segmenter(family)
    model = upcycle(copy.deepcopy(parent), config(layers="last:1", routing=routing))
    assert [site.name for site in vimoe.plan(parent, config(layers="last:1")).sites] == ["backbone.blocks.3.mlp"]
    larger = tuple(2 * side for side in model.crop)
    for x in (pictures(parent), pictures(parent, 1, larger)):
        expected = parent(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        perturbed = perturb_experts(copy.deepcopy(model))(x)
        assert (perturbed - expected).abs().max() > 1e-3 * expected.abs().max()  # so that the above says something
    vimoe.densify(model)
    states = model.state_dict(), parent.state_dict()
    assert states[0].keys() == states[1].keys() and all(
        torch.equal(w, states[1][name]) for name, w in states[0].items()
    )


@pytest.mark.parametrize("family", BACKBONES)
def test_routers_know_the_token_layout(family: str) -> None:
    model = upcycle(segmenter(family), config(layers="last:1"))
    layout, backbone = layers(model)[0].router.layout, model.backbone
    assert layout.num_prefix_tokens == backbone.num_prefix_tokens
    assert layout.class_token == (backbone.cls_token is not None)


@pytest.mark.parametrize("routing", ["image", "token"])
def test_records_and_losses(routing: str) -> None:
    model = upcycle(segmenter(), config(layers="last:2", routing=routing)).train()
    with vimoe.record(model) as record:
        logits = model(pictures(model))
    assert [r.layer for r in record] == ["backbone.blocks.2.mlp", "backbone.blocks.3.mlp"]
    assert record[0].unit == routing and record[0].batch == (2, 5)
    loss = pixel_loss(logits, torch.zeros(2, *model.crop, dtype=torch.int64)) + vimoe.balance_loss(record)
    loss.backward()
    assert all(layer.router.weight.grad.any() for layer in layers(model))


def test_count_adds_the_decoder_to_the_vit() -> None:
    model = segmenter()
    vits, both = vimoe.count(model.backbone), vimoe.count(model)
    decoder = sum(p.numel() for p in model.decoder.parameters())
    assert both.params == vits.params + decoder and both.macs == vits.macs + 4 * 24 * 3
    assert find_backbone(model).input_size == (3, 32, 32)
    moe = vimoe.count(upcycle(model, config(layers="last:1")))
    assert moe.params > moe.activated_params > both.params and moe.moe_layers == ("backbone.blocks.3.mlp",)
    assert vimoe.count(model, (3, 64, 64)).macs > 4 * both.macs


@pytest.mark.parametrize(
    ("moe", "decoder"),
    one_in(
        4,
        itertools.product(
            [None, {"layers": "last:1"}, {"layers": [1, 3], "routing": "token", "top_k": 2}], ["linear", "linear4"]
        ),
    ),
)
@torch.no_grad()
def test_a_folder_brings_it_back(tmp_path: Path, decoder: str, moe: dict | None) -> None:
    model = segmenter(decoder=decoder, palette=PALETTE)
    model.decoder.norm.running_mean.normal_()
    if moe:
        randomise(upcycle(model, config(**moe)), seed=3, scale=0.1)
    args = {"mean": (0.1, 0.2, 0.3), "crop_pct": 1.0}
    vimoe.save(model, tmp_path / "m", label_names=["sky", "road", "car"], preprocessing=args)
    entry = json.loads((tmp_path / "m" / "config.json").read_text())["vimoe"]
    assert entry["segmentation"] == {
        "classes": 3, "decoder": decoder, "crop": [32, 32], "palette": [list(colour) for colour in PALETTE],
    }  # fmt: skip
    vimoe.save(vimoe.load(tmp_path / "m"), tmp_path / "again")
    for name in ("m", "again"):
        again = vimoe.load(tmp_path / name)
        assert isinstance(again, Segmenter) and not again.training
        assert (again.crop, again.palette, again.num_classes) == ((32, 32), PALETTE, 3)
        assert label_names(again) == ["sky", "road", "car"] and preprocessing(again)["mean"] == (0.1, 0.2, 0.3)
        states = again.state_dict(), model.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(w, states[1][key]) for key, w in states[0].items())
        for size in ((32, 32), (50, 70)):
            torch.testing.assert_close(again(pictures(again, 1, size)), model(pictures(model, 1, size)))


@torch.no_grad()
def test_a_folder_keeps_upernet_and_another_crop(tmp_path: Path) -> None:
    model = Segmenter(vit(num_classes=0, depth=4, dynamic_img_size=True), 3, "upernet", crop=(48, 64)).eval()
    vimoe.save(model, tmp_path / "m")
    again = vimoe.load(tmp_path / "m")
    assert again.crop == (48, 64) and again.decoder_name == "upernet" and label_names(again) == ["0", "1", "2"]
    torch.testing.assert_close(again(pictures(model)), model(pictures(model)), rtol=1e-4, atol=1e-4)


def test_a_decoder_that_the_folder_would_not_rebuild_is_refused(tmp_path: Path) -> None:
    model = segmenter()
    model.decoder.norm.eps = 10.0  # nothing notes it
    with pytest.raises(FolderError, match="computes something else"):
        vimoe.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("entry", "message"),
    [({"decoder": "fpn", "classes": 3}, "'segmentation' entry does not fit: decoder='fpn'"), ({"clases": 3}, "clases")],
)
def test_a_damaged_entry_is_one_line(tmp_path: Path, entry: dict, message: str) -> None:
    vimoe.save(segmenter(), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    values = json.loads(path.read_text())
    values["vimoe"]["segmentation"] = entry
    path.write_text(json.dumps(values))
    with pytest.raises(FolderError, match=message) as error:
        vimoe.load(tmp_path / "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", BACKBONES)
def test_rates_and_decays_are_the_vits_and_the_decoder_is_its_head(family: str) -> None:
    model = upcycle(segmenter(family), config(layers="last:1"))
    classifier = upcycle(vit(family, depth=4), config(layers="last:1"))
    settings = TrainConfig(layer_decay=0.5, router_lr_scale=3.0)

    def treatment(of: nn.Module) -> dict[str, tuple[float, float]]:
        names = {id(p): name for name, p in of.named_parameters()}
        return {
            names[id(p)].removeprefix("backbone."): (group["weight_decay"], group["lr_scale"])
            for group in parameter_groups(of, settings)
            for p in group["params"]
        }

    whole, vits = treatment(model), treatment(classifier)
    decoder = {name: whole.pop(name) for name in list(whole) if name.startswith("decoder.")}
    assert whole == {name: how for name, how in vits.items() if not name.startswith("head.")}
    assert len({scale for _, scale in whole.values()}) > 4
    assert {scale for _, scale in decoder.values()} == {1.0}
    freeze_all_but(model, ["backbone.blocks.3.mlp"])
    trained = {name.split(".mlp")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"backbone", "decoder"} and "backbone.blocks.3" in trained


@torch.no_grad()
def test_one_is_created_from_settings() -> None:
    args = {"depth": 4, "embed_dim": 24, "num_heads": 2}
    settings = ModelConfig(name="vit_tiny_patch16_224", pretrained=False, img_size=32, num_classes=7, args=args)
    assert create_segmenter(settings, 3).crop == (32, 32)
    model = create_segmenter(settings, 3, "linear4", (48, 64), PALETTE).eval()
    assert model.backbone.patch_embed.img_size == model.crop == (48, 64) and model.palette == PALETTE
    assert model(pictures(model, 1, (70, 33))).shape == (1, 3, 70, 33)
    fixed = create_segmenter(replace(settings, name="beit_base_patch16_224"), 3, crop=(48, 48))
    assert fixed.crop == (48, 48) and fixed.eval()(pictures(fixed)).shape == (2, 3, 48, 48)
    with pytest.raises(
        ConfigError, match=r"img_size=\(50, 50\): expected a multiple of the patch size 16; set 48 or 64"
    ):
        create_segmenter(settings, 3, crop=(50, 50))
    with pytest.raises(ConfigError, match="timm has no such model; did you mean 'vit_tiny_patch16_224'"):
        create_segmenter(replace(settings, name="vit_tinny_patch16_224"), 3)


def test_label_names_must_fit_the_classes(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="2 label_names for 3 classes"):
        vimoe.save(segmenter(), tmp_path / "m", label_names=["a", "b"])
