"""Models from their settings: a ViT by its family, what a model folder of vimoe holds, or a segmenter on a ViT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.config.masks import Colour
from vimoe.config.model import FAMILIES, ModelConfig
from vimoe.errors import ConfigError, first_line
from vimoe.models.continued import continued
from vimoe.models.names import check_name, vimoe_folder
from vimoe.models.reading import set_reading
from vimoe.models.segmenter import Segmenter


def create(
    config: ModelConfig, num_classes: int | None = None, *, img_size: tuple[int, int] | None = None,
    any_size: bool = False,
) -> nn.Module:  # fmt: skip
    """Build the ViT that `model.name` names, by its family; one with MoE layers if it is a model folder with some.

    Args:
        config: settings of the model.
        num_classes: size of the classifier in place of `config.num_classes`; 0 for none.
        img_size: (height, width) in place of `config.img_size`.
        any_size: let the ViT take images of other sizes too, if it can.

    Raises:
        ConfigError: if the name is unknown, weights cannot be loaded, arguments do not fit, or images have no whole
            patches.
        FolderError: if a model folder is damaged.
    """
    check_name(config)
    classes = config.num_classes if num_classes is None else num_classes
    if vimoe_folder(config):
        return continued(config, classes, any_size, img_size)
    size = img_size or config.img_size
    try:
        model = _build(config, classes, size, any_size)
    except ConfigError:
        if size and config.pretrained:  # no weights fit images that are smaller than a patch
            with torch.device("meta"):
                _check_whole_patches(config, _build(replace(config, pretrained=False), classes, size, any_size), size)
        raise
    if size:
        _check_whole_patches(config, model, size)
    return set_reading(model, config.read)


def _build(config: ModelConfig, classes: int | None, size: int | tuple[int, int] | None, any_size: bool) -> nn.Module:
    family, name = config.family
    try:
        model: nn.Module = FAMILIES.find(family).create(
            name,
            pretrained=config.pretrained,
            num_classes=classes,
            img_size=size,
            any_size=any_size,
            drop_path_rate=config.drop_path_rate,
            **config.args,
        )
    except TypeError as error:
        raise ConfigError(f"model.name={config.name!r}: {first_line(error)}; look at model.args") from error
    return model


def _check_whole_patches(config: ModelConfig, model: nn.Module, size: int | tuple[int, int]) -> None:
    """Raise ConfigError for images whose last rows or columns a model of timm or transformers would leave out.

    Its first convolution does so if it cuts images into patches, and nothing pads them. torchvision refuses such sizes
    itself; what other families do is theirs.
    """
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if config.family[0] not in ("timm", "transformers") or first is None:
        return
    pads = any(getattr(each, "dynamic_img_pad", False) or hasattr(each, "maybe_pad") for each in model.modules())
    if pads or first.kernel_size != first.stride or set(first.padding) != {0}:
        return
    for side, patch in zip((size, size) if isinstance(size, int) else size, first.kernel_size, strict=True):
        if side % patch:
            below = side // patch * patch
            remedy = f"{below} or {below + patch}" if below else f"{patch} or more"
            raise ConfigError(f"model.img_size={size}: expected a multiple of the patch size {patch}; set {remedy}")


def create_without_weights(config: ModelConfig) -> nn.Module:
    """Build the dense ViT on the meta device: shapes for `plan` and `count`, no memory and no download."""
    with torch.device("meta"):
        return create(replace(config, pretrained=False))


def create_segmenter(
    config: ModelConfig,
    classes: int,
    decoder: str = "linear",
    crop: tuple[int, int] | None = None,
    palette: Sequence[Colour] | None = None,
    prompts: Tensor | None = None,
) -> Segmenter:
    """Create a Segmenter on a ViT from its settings; position embeddings are brought to the size of the crop once.

    Args:
        config: settings of the ViT; `config.num_classes` plays no part.
        classes, decoder, crop, palette: arguments of `Segmenter`; crop by default `config.img_size`.
        prompts: (classes, width) vectors for a decoder that takes such.

    Raises:
        ConfigError: if `create` or `Segmenter` raises it.
    """
    backbone = create(config, num_classes=0, img_size=crop, any_size=True)
    if prompts is None:
        return Segmenter(backbone, classes, decoder, crop, palette, config.decoder_args)
    args = {**config.decoder_args, "prompt_width": prompts.shape[1]}
    model = Segmenter(backbone, classes, decoder, crop, palette, args)
    prompted: Any = model.decoder
    prompted.set_prompts(prompts)
    return model
