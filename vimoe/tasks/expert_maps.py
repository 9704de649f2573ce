"""Expert maps: the expert of each patch of an image, drawn beside the image, its mask and its prediction.

Axes: B images of H x W pixels, h x w patches that contain pixels of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from vimoe.config.masks import IGNORE, Colour
from vimoe.data.images import open_image
from vimoe.data.mask_colours import spread_colours
from vimoe.data.masks import Legend
from vimoe.data.scenes import Scene
from vimoe.files import printable
from vimoe.models.segmenter import Segmenter
from vimoe.moe import record
from vimoe.moe.layer import moe_layers

Shade = tuple[float, float, float]  # red, green, blue in 0..1
# the palette of Okabe and Ito, which people with colour blindness can distinguish
EXPERTS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
LISTED = 24  # most classes whose names fit into a legend
LISTED_EXPERTS = 48  # most experts that do, whose names are short
LAYERS = 6  # most layers that fit side by side


@torch.no_grad()
def choices(model: Segmenter, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of a batch and the expert that each MoE layer chose first for each patch, in one forward pass.

    Args:
        model: segmenter in eval mode.
        images: (B, 3, H, W), normalised, on the model's device; any size that the model accepts.

    Returns:
        Logits (B, classes, H, W), and by layer name the index of the first expert, (B, h, w), -1 for none. Prefix
        tokens and patches of padding are left out. With image routing all patches of an image have the expert of the
        image.
    """
    with record(model) as routings:
        logits = model(images)
    height, width = images.shape[-2:]
    (rows, columns), (patch_h, patch_w) = model.grid(height, width), model.patch_size
    seen = -(-height // patch_h), -(-width // patch_w)
    layers = moe_layers(model)
    found: dict[str, Tensor] = {}
    for routing in routings:
        batch, tokens = routing.batch
        first = routing.experts[:, 0]
        if routing.unit == "image":
            found[routing.layer] = first[:, None, None].expand(batch, *seen)
            continue
        prefix = layers[routing.layer].router.layout.num_prefix_tokens
        patches = first.view(batch, tokens)[:, prefix:].view(batch, rows, columns)
        found[routing.layer] = patches[:, : seen[0], : seen[1]]
    return logits, found


def expert_maps(model: Segmenter, scenes: Sequence[Scene], legend: Legend, prepared: dict[str, Any]) -> Figure:
    """Draw one row for each scene: image, mask, prediction, and the expert of every patch in the last six MoE layers.

    An image larger than the training crop is cut to a window of that size around its centre: the model sees no more in
    one forward pass.

    Args:
        model: segmenter; it is left in eval mode.
        scenes: (image file, mask file) of each row; at least one.
        legend: meaning of the masks' values, and names of the classes.
        prepared: mean and std, as `vimoe.data.loaders.preprocessing` returns them.

    Raises:
        DataError: A file cannot be read.
    """
    model.eval()
    layers = {name: layer.config for name, layer in list(moe_layers(model).items())[-LAYERS:]}
    titles = [
        "image",
        "truth",
        "prediction",
        *(f"{name}\none choice per {_UNITS[c.routing]}" for name, c in layers.items()),
    ]
    names = legend.names
    classes = [_share(rgb) for rgb in model.palette or spread_colours(len(names))]
    experts = expert_colours(max((config.num_experts for config in layers.values()), default=0))
    figure = Figure(figsize=(1.8 * len(titles), 1.8 * len(scenes) + 1.4), layout="constrained")
    axes = figure.subplots(len(scenes), len(titles), squeeze=False)
    for row, (image, mask) in zip(axes, scenes, strict=True):
        pixels, truth = _centre(np.asarray(open_image(image)), legend.read(mask), model.crop)
        logits, chosen = choices(model, _normalised(model, pixels, prepared))
        row[0].imshow(pixels)
        _draw_labels(row[1], truth, classes)
        _draw_labels(row[2], logits[0].argmax(dim=0).cpu().numpy(), classes)
        for axis, name in zip(row[3:], layers, strict=True):
            _draw_labels(axis, chosen[name][0].cpu().numpy(), experts, model.patch_size)
        for axis in row:  # patches may reach beyond the edge of the image, where there is padding
            axis.set(xticks=[], yticks=[], xlim=(-0.5, truth.shape[1] - 0.5), ylim=(truth.shape[0] - 0.5, -0.5))
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9, parse_math=False)
    listed = dict(zip(names, classes, strict=True)) if len(names) <= LISTED else {}
    _legend(figure, {**listed, "void": (1.0, 1.0, 1.0)}, "outside upper center")
    numbered = {f"expert {i}": shade for i, shade in enumerate(experts)} if len(experts) <= LISTED_EXPERTS else {}
    _legend(figure, numbered, "outside lower center")
    return figure


def expert_colours(number: int) -> list[Shade]:
    """Return a fixed colour for each expert of a layer; up to 8 are safe for colour blindness."""
    return list(map(to_rgb, EXPERTS[:number])) if number <= len(EXPERTS) else list(map(_share, spread_colours(number)))


_UNITS = {"token": "patch", "image": "image"}


def _draw_labels(axis: Axes, labels: np.ndarray, shades: Sequence[Shade], cell: tuple[int, int] = (1, 1)) -> None:
    """Draw (h, w) labels in their `shades`, each as a cell of (height, width) pixels; IGNORE and -1 stay white."""
    table = np.ones((max(IGNORE, len(shades)) + 1, 3))  # -1 is its last row
    table[: len(shades)] = shades
    right, bottom = (side * length - 0.5 for side, length in zip(labels.shape[::-1], cell[::-1], strict=True))
    axis.imshow(table[labels], extent=(-0.5, right, bottom, -0.5), interpolation="nearest")


def _centre(pixels: np.ndarray, mask: np.ndarray, crop: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cut the centre, at most as large as `crop`, out of an image (H, W, 3) and its mask (H, W)."""
    top, left = (max(0, side - most) // 2 for side, most in zip(mask.shape, crop, strict=True))
    window = np.s_[top : top + crop[0], left : left + crop[1]]
    return pixels[window], mask[window]


def _normalised(model: Segmenter, pixels: np.ndarray, prepared: dict[str, Any]) -> Tensor:
    """Return (H, W, 3) uint8 pixels as a normalised batch of one on the model's device."""
    weight = next(model.parameters())
    mean, std = (torch.tensor(prepared[key])[:, None, None] for key in ("mean", "std"))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    return ((image - mean) / std)[None].to(weight.device, weight.dtype)


def _share(rgb: Colour) -> Shade:
    red, green, blue = rgb
    return red / 255, green / 255, blue / 255


def _legend(
    figure: Figure, entries: Mapping[str, Shade], where: Literal["outside upper center", "outside lower center"]
) -> None:
    if entries:
        handles = [Patch(facecolor=shade, edgecolor="0.5", lw=0.5) for shade in entries.values()]
        across = max(3, int(figure.get_figwidth() / 1.1))
        legend = figure.legend(
            handles, list(map(printable, entries)), loc=where, ncols=across, fontsize=8, frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # names may have dollar signs
