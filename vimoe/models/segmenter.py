"""A ViT that scores every pixel: its feature maps, a decoder, and the way back to the images' resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.config.masks import IGNORE, Colour
from vimoe.config.model import ModelConfig
from vimoe.errors import ConfigError, VimoeError, nearest
from vimoe.models.decoders import DECODERS
from vimoe.models.timm_vit import create


class Segmenter(nn.Module):
    """A timm ViT and a decoder. `vimoe.upcycle`, `record`, `count` and `save` take it as they take the ViT.

    Images of any size are padded at the bottom and right to whole patches, with 0, the mean colour of normalised
    images, and the scores are cut back. For that the ViT must adapt its position embeddings
    (`dynamic_img_size=True`); one that cannot takes images up to its own size, padded to it.

    Args:
        backbone: a ViT that `timm.create_model(..., num_classes=0)` made.
        classes: how many there are.
        decoder: a name in `vimoe.models.decoders.DECODERS`.
        crop: (height, width) that it is trained on, and so of the windows of inference; by default the ViT's own size.
        palette: (red, green, blue) of each class, to draw with.

    Raises:
        ConfigError: for a model that gives no feature maps, an unknown decoder, or other values that cannot be.
    """

    metric = "segmentation"  # name in vimoe.metrics.registry.METRICS

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        decoder: str = "linear",
        crop: tuple[int, int] | None = None,
        palette: Sequence[Colour] | None = None,
    ) -> None:
        super().__init__()
        if not all(
            hasattr(backbone, name) for name in ("forward_intermediates", "patch_embed", "blocks", "num_features")
        ):
            raise ConfigError(
                f"{type(backbone).__name__} gives no feature maps (forward_intermediates): expected a ViT of timm"
            )
        if getattr(backbone, "num_classes", 0):
            raise ConfigError(
                f"the ViT classifies images into {backbone.num_classes}: expected one without a head, whose features "
                f"the decoder reads; create it with num_classes=0"
            )
        if decoder not in DECODERS:
            raise ConfigError(f"decoder={decoder!r}: {nearest(decoder, DECODERS)}")
        if not 2 <= classes <= IGNORE:
            raise ConfigError(f"classes={classes}: expected 2 to {IGNORE}")
        if palette is not None and len(palette) != classes:
            raise ConfigError(f"palette of {len(palette)} colours: expected one for each of the {classes} classes")
        embed: Any = backbone.patch_embed
        dim: Any = backbone.num_features
        blocks: Any = backbone.blocks
        self.backbone = backbone
        self.decoder = DECODERS[decoder](dim, len(blocks), classes)
        self.decoder_name, self.num_classes = decoder, classes
        self.crop = _whole_patches(crop or embed.img_size, embed.patch_size)
        self.palette: tuple[Colour, ...] | None = None if palette is None else tuple((r, g, b) for r, g, b in palette)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The backbone's: its preprocessing, and the names of the classes where it was loaded from a folder."""
        return self.backbone.pretrained_cfg  # type: ignore[return-value]

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        embed: Any = self.backbone.patch_embed
        height, width = embed.patch_size
        return int(height), int(width)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(height, width) of a ViT that takes no larger images, None of one that takes all."""
        embed: Any = self.backbone.patch_embed
        return None if getattr(self.backbone, "dynamic_img_size", False) else embed.img_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patches of images of that size, with those that hold nothing but padding.

        Raises:
            VimoeError: where the images are larger than a ViT of fixed size.
        """
        patch_h, patch_w = self.patch_size
        if self.fixed_size is None:
            return -(-height // patch_h), -(-width // patch_w)
        most_h, most_w = self.fixed_size
        if height > most_h or width > most_w:
            raise VimoeError(
                f"images of {height}x{width} for a ViT of fixed size: expected at most {most_h}x{most_w}; create it "
                f"with dynamic_img_size=True, or infer by windows"
            )
        return most_h // patch_h, most_w // patch_w

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, classes, H, W) of images (B, 3, H, W), bilinear between patches.

        Raises:
            VimoeError: where the images are larger than a ViT of fixed size.
        """
        height, width = images.shape[-2:]
        (rows, columns), (patch_h, patch_w) = self.grid(height, width), self.patch_size
        padded_h, padded_w = rows * patch_h, columns * patch_w
        images = F.pad(images, (0, padded_w - width, 0, padded_h - height))
        blocks: Any = self.decoder.blocks
        tokens = self.backbone.forward_intermediates(  # type: ignore[operator]
            images, indices=list(blocks), norm=True, output_fmt="NLC", intermediates_only=True
        )
        maps = [each.unflatten(1, (rows, columns)).permute(0, 3, 1, 2) for each in tokens]
        logits = F.interpolate(self.decoder(maps), (padded_h, padded_w), mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def get_classifier(self) -> nn.Module:
        """The decoder, by timm's name for what is new on a pretrained model."""
        return self.decoder

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm leaves without decay, as in the backbone."""
        backbone: Any = self.backbone
        return {f"backbone.{name}" for name in backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's layers for layer-wise rates, as timm writes them; the decoder belongs to the last."""
        backbone: Any = self.backbone
        groups: dict[str, Any] = {}
        for group, patterns in backbone.group_matcher(coarse=coarse).items():
            if isinstance(patterns, str):
                groups[group] = _inside_backbone(patterns)
            else:
                groups[group] = [(_inside_backbone(pattern), *rest) for pattern, *rest in patterns]
        return groups

    def to_dict(self) -> dict[str, Any]:
        """What `Segmenter(backbone, **entry)` needs to be built again, as JSON knows it."""
        palette = self.palette and [list(colour) for colour in self.palette]
        return {"classes": self.num_classes, "decoder": self.decoder_name, "crop": list(self.crop), "palette": palette}


def create_segmenter(
    config: ModelConfig,
    classes: int,
    decoder: str = "linear",
    crop: tuple[int, int] | None = None,
    palette: Sequence[Colour] | None = None,
) -> Segmenter:
    """A Segmenter on a ViT from its settings, whose position embeddings are brought to the size of the crop once.

    Args:
        config: the ViT; `config.num_classes` plays no part.
        classes, decoder, crop, palette: as in `Segmenter`; crop by default `config.img_size`.

    Raises:
        ConfigError: as `vimoe.models.timm_vit.create` and `Segmenter`.
    """
    size = {} if crop is None else {"img_size": tuple(crop)}
    try:
        backbone = create(config, num_classes=0, dynamic_img_size=True, **size)
    except ConfigError as error:
        if "unexpected keyword argument 'dynamic_img_size'" not in str(error):
            raise
        backbone = create(config, num_classes=0, **size)  # BEiT, whose relative positions are of one size
    return Segmenter(backbone, classes, decoder, crop, palette)


def _whole_patches(crop: Sequence[int], patch: Sequence[int]) -> tuple[int, int]:
    (height, width), (high, wide) = crop, patch
    if height < 1 or width < 1 or height % high or width % wide:
        near = tuple(max(1, round(side / part)) * part for side, part in zip(crop, patch, strict=True))
        raise ConfigError(f"crop={(height, width)}: expected whole patches of {high}x{wide}, such as {near}")
    return int(height), int(width)


def _inside_backbone(pattern: str) -> str:
    """A pattern for the start of names in the backbone (timm uses re.match), for the same names in the segmenter."""
    return rf"backbone\.(?:{pattern.replace('^', '')})"
