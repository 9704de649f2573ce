"""Expert maps show the expert that each patch went to, at its place: held against a router that was set by hand."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import tiny
from helpers.commands import QUICK, TINY
from helpers.scenery import NAMES, PALETTE, VOID, mask, scene, scenes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import vimoe
from vimoe.cli import main
from vimoe.data.masks import Legend
from vimoe.models.segmenter import Segmenter
from vimoe.tasks.expert_maps import (
    EXPERTS,
    LISTED_EXPERTS,
    _draw_labels,
    choices,
    expert_colours,
    expert_maps,
)

PREPARED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
LEGEND = Legend(NAMES, (0, 1, 2), (VOID,), PALETTE)
PATCH = 4


def by_colour(name: str = "vit_tiny_patch16_224", routing: str = "token", **settings: object) -> Segmenter:
    """A segmenter whose experts are 0 for red patches, 1 for green ones, 2 for blue ones, 3 for the class token."""
    settings = {"img_size": 4 * PATCH, "dynamic_img_size": True, **settings}
    vit = timm.create_model(name, patch_size=PATCH, embed_dim=8, depth=1, num_heads=1, num_classes=0, **settings)
    config = vimoe.MoEConfig(layers="all", num_experts=4, routing=routing)
    model = vimoe.upcycle(Segmenter(vit, 3, palette=PALETTE[:3]), config).eval()
    with torch.no_grad():
        vit.patch_embed.proj.weight.zero_()
        vit.patch_embed.proj.bias.zero_()
        for channel in range(3):
            vit.patch_embed.proj.weight[channel, channel] = 1
        for position in (vit.pos_embed, vit.cls_token, getattr(vit, "reg_token", None)):
            if position is not None:
                position.zero_()
        vit.cls_token[..., 3] = 1
        vit.blocks[0].attn.proj.weight.zero_()
        vit.blocks[0].attn.proj.bias.zero_()
        vit.blocks[0].mlp.router.weight.copy_(torch.eye(4, 8))
    return model


def painted(layout: np.ndarray, height: int, width: int) -> Tensor:
    """(1, 3, height, width): an image whose patches have one channel each."""
    channels = torch.from_numpy(layout).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)[:height, :width]
    return torch.nn.functional.one_hot(channels.long(), 3).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("size", [(16, 16), (20, 12), (11, 26)])
def test_each_patch_has_the_expert_that_its_colour_asks_for(name: str, size: tuple[int, int]) -> None:
    height, width = size
    rows, columns = -(-height // PATCH), -(-width // PATCH)
    layouts = [np.random.default_rng(seed).integers(0, 3, (rows, columns)) for seed in (0, 1)]
    images = torch.cat([painted(layout, height, width) for layout in layouts])
    logits, found = choices(by_colour(name), images)
    assert logits.shape == (2, 3, height, width) and list(found) == ["backbone.blocks.0.mlp"]
    assert np.array_equal(found["backbone.blocks.0.mlp"].numpy(), layouts)


def test_names_with_dollar_signs_are_in_the_legend_as_they_are(tmp_path: Path) -> None:
    names = ("$0_$50", r"a_$\frac", "__void$$")
    scene(tmp_path, "val", "a", mask(0, 16, 16))
    pair = (tmp_path / "images/val/a.png", tmp_path / "annotations/val/a.png")
    figure = expert_maps(by_colour(), [pair], Legend(names, (0, 1, 2), (VOID,)), PREPARED)
    figure.canvas.draw()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    assert [text.get_text() for text in texts][:4] == [*names, "void"]
    assert not any(text.get_parse_math() for text in texts)


def test_padding_of_a_vit_of_fixed_size_is_cut_off() -> None:
    layout = np.array([[0, 1, 2], [2, 0, 1]])
    _, found = choices(by_colour(dynamic_img_size=False), painted(layout, 7, 12))
    assert np.array_equal(found["backbone.blocks.0.mlp"][0].numpy(), layout)


def test_all_patches_of_an_image_show_the_expert_that_it_went_to() -> None:
    layout = np.array([[0, 1], [2, 0]])
    _, found = choices(by_colour(routing="image"), painted(layout, 8, 8))
    assert np.array_equal(found["backbone.blocks.0.mlp"].numpy(), np.full((1, 2, 2), 3))  # that of the class token


def files(root: Path, layout: np.ndarray, values: np.ndarray) -> tuple[Path, Path]:
    height, width = values.shape
    picture = (255 * painted(layout, height, width)[0].permute(1, 2, 0).numpy()).astype("uint8")
    scene(root, "val", "a", values)
    Image.fromarray(picture).save(root / "images/val/a.png")
    return root / "images/val/a.png", root / "annotations/val/a.png"


def test_the_figure_has_image_truth_prediction_and_experts_in_their_colours(tmp_path: Path) -> None:
    """An image of 14 x 15 pixels: the last row and column of patches are in part padding."""
    layout, values = np.random.default_rng(2).integers(0, 3, (4, 4)), mask(0, 14, 15)
    model = by_colour()
    figure = expert_maps(model, [files(tmp_path, layout, values)] * 2, LEGEND, PREPARED)
    axes = figure.axes
    assert len(axes) == 2 * 4
    titles = [axis.get_title() for axis in axes[:4]]
    assert titles == ["image", "truth", "prediction", "backbone.blocks.0.mlp\none choice per patch"]
    image, truth, predicted, experts = (axis.images[0] for axis in axes[4:])
    assert np.array_equal(image.get_array()[..., 0] == 255, np.kron(layout, np.ones((4, 4)))[:14, :15] == 0)
    expected = np.array([*PALETTE[:3], *[(255, 255, 255)] * 5])[values] / 255  # void is white
    assert np.allclose(truth.get_array(), expected)
    logits, _ = choices(model, painted(layout, 14, 15))
    assert np.allclose(predicted.get_array(), np.array(PALETTE)[logits[0].argmax(0).numpy()] / 255)
    assert np.allclose(experts.get_array(), np.array([to_rgb(EXPERTS[i]) for i in range(3)])[layout])
    left, right, bottom, top = experts.get_extent()  # a patch covers its pixels, and the axis ends with the image
    assert (left, right, bottom, top) == (-0.5, 15.5, 15.5, -0.5)
    assert axes[7].get_xlim() == (-0.5, 14.5) and axes[7].get_ylim() == (13.5, -0.5)
    told = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert told == [*NAMES, "void", *(f"expert {i}" for i in range(4))]


def test_a_patch_without_an_expert_stays_white(tmp_path: Path) -> None:
    def give_red_nothing(_router: object, _args: object, routing: vimoe.Routing) -> vimoe.Routing:
        red = routing.experts == 0
        experts, gates = routing.experts.masked_fill(red, -1), routing.gates.masked_fill(red, 0)
        return replace(routing, experts=experts, gates=gates, ragged=True)

    layout, model = np.random.default_rng(2).integers(0, 3, (4, 4)), by_colour()
    model.backbone.blocks[0].mlp.router.register_forward_hook(give_red_nothing)
    figure = expert_maps(model, [files(tmp_path, layout, mask(0, 16, 16))], LEGEND, PREPARED)
    shades = np.array([(1, 1, 1), to_rgb(EXPERTS[1]), to_rgb(EXPERTS[2])])
    assert np.allclose(figure.axes[3].images[0].get_array(), shades[layout])


@pytest.mark.parametrize("experts", [LISTED_EXPERTS, 256, 300])
def test_of_many_experts_each_has_its_colour_and_names_leave_room_for_the_maps(tmp_path: Path, experts: int) -> None:
    figure, shades = Figure(), expert_colours(experts)
    axis = figure.subplots()
    _draw_labels(axis, np.array([[experts - 1, -1]]), shades)
    assert np.allclose(axis.images[0].get_array()[0], [shades[-1], (1, 1, 1)])
    model = Segmenter(tiny.vit(depth=1, num_classes=0, dynamic_img_size=True), 3)
    model = vimoe.upcycle(model, vimoe.MoEConfig(layers="all", routing="token", num_experts=experts))
    figure = expert_maps(model, [files(tmp_path, np.zeros((8, 8), int), mask(0, 32, 32))], LEGEND, PREPARED)
    told = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert (f"expert {experts - 1}" in told) == (experts <= LISTED_EXPERTS)
    figure.draw_without_rendering()  # a warning, which is an error here, says that nothing is left for the maps


def test_of_a_large_image_the_middle_is_shown(tmp_path: Path) -> None:
    """The crop is 16 x 16 and the image 24 x 32: rows 4 to 19, columns 8 to 23."""
    layout, values = np.random.default_rng(3).integers(0, 3, (6, 8)), mask(1)
    figure = expert_maps(by_colour(), [files(tmp_path, layout, values)], LEGEND, PREPARED)
    experts = figure.axes[3].images[0].get_array()
    assert np.allclose(experts, np.array([to_rgb(EXPERTS[i]) for i in range(3)])[layout[1:5, 2:6]])
    assert figure.axes[1].images[0].get_array().shape == (16, 16, 3)


def test_of_many_layers_the_last_six_are_shown(tmp_path: Path) -> None:
    model = Segmenter(tiny.vit(depth=8, num_classes=0, dynamic_img_size=True), 3)
    model = vimoe.upcycle(model, vimoe.MoEConfig(layers="all", routing="token"))
    figure = expert_maps(model, [files(tmp_path, np.zeros((8, 8), int), mask(0, 32, 32))], LEGEND, PREPARED)
    assert [axis.get_title().split("\n")[0] for axis in figure.axes[3:]] == [
        f"backbone.blocks.{i}.mlp" for i in range(2, 8)
    ]


def test_experts_have_fixed_colours_that_can_be_told_apart() -> None:
    assert expert_colours(8)[:3] == expert_colours(3)
    for number in (8, 32):
        colours = np.array(expert_colours(number))
        apart = np.abs(colours[:, None] - colours[None]).max(axis=-1)[~np.eye(number, dtype=bool)]
        assert apart.min() > (0.2 if number == 8 else 0.01)


def test_a_run_of_segmentation_shows_its_expert_maps(tmp_path: Path) -> None:
    data = scenes(tmp_path / "scenes", train=4, val=5)
    argv = ["train", "--data.path", str(data), "--data.task=segmentation", *TINY, *QUICK, "--train.batch_size=2"]
    for out, layers, there in (("moe", "last:1", True), ("dense", "none", False)):
        run = tmp_path / out
        assert main([*argv, f"--moe.layers={layers}", "--moe.routing=token", "--out", str(run)]) == 0
        picture = run / "figures/expert-maps.png"
        assert picture.exists() == there
        page = (run / "report.html").read_text()
        assert ("Experts over the image" in page) == there
        if there:
            encoded = base64.b64encode(picture.read_bytes()).decode()
            assert encoded in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
