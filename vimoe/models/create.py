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
        ConfigError: if the name is unknown, weights cannot be loaded, or arguments do not fit.
        FolderError: if a model folder is damaged.
    """
    check_name(config)
    classes = config.num_classes if num_classes is None else num_classes
    if vimoe_folder(config):
        return continued(config, classes, any_size, img_size)
    family, name = config.family
    try:
        model: nn.Module = FAMILIES.find(family).create(
            name,
            pretrained=config.pretrained,
            num_classes=classes,
            img_size=img_size or config.img_size,
            any_size=any_size,
            drop_path_rate=config.drop_path_rate,
            **config.args,
        )
    except TypeError as error:
        raise ConfigError(f"model.name={config.name!r}: {first_line(error)}; look at model.args") from error
    return set_reading(model, config.read)


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
