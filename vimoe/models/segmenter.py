"""A ViT that scores every pixel: its feature maps, a decoder, and interpolation to the images' resolution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.config.masks import IGNORE, Colour
from vimoe.errors import ConfigError, VimoeError, nearest
from vimoe.models.decoders import DECODERS
from vimoe.models.interface import find_backbone


class Segmenter(nn.Module):
    """A ViT and a decoder. `vimoe.upcycle`, `record`, `count` and `save` take it as they take the ViT.

    Images of any size are padded at the bottom and right to whole patches, with 0, the mean colour of normalised
    images, and the scores are cut back. For that the ViT must adapt its position embeddings (in timm
    `dynamic_img_size=True`); another one takes images up to its own size, padded to it.

    Args:
        backbone: a ViT without a classifier, such as of `timm.create_model(..., num_classes=0)`.
        classes: number of classes.
        decoder: a name in `vimoe.models.decoders.DECODERS`.
        crop: (height, width) of the training images, and of the windows of inference; by default the ViT's own size.
        palette: (red, green, blue) of each class, for pictures.
        decoder_args: further arguments of the decoder, such as {"prompt_width": 512} of "prompted".

    Raises:
        ConfigError: if the model gives no feature maps, the decoder is unknown, or another value is impossible.
    """

    metric = "segmentation"  # name in vimoe.metrics.registry.METRICS

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        decoder: str = "linear",
        crop: tuple[int, int] | None = None,
        palette: Sequence[Colour] | None = None,
        decoder_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        vit = find_backbone(backbone)
        if vit.width is None or not vit.blocks:
            raise ConfigError(f"{type(backbone).__name__} gives no feature maps: expected a ViT of a known family")
        if vit.num_classes:
            raise ConfigError(
                f"the ViT classifies images into {vit.num_classes}: expected one without a head, whose features "
                f"the decoder reads; create it with num_classes=0"
            )
        if decoder not in DECODERS:
            raise ConfigError(f"decoder={decoder!r}: {nearest(decoder, DECODERS)}")
        _check_classes(classes, palette)
        self.backbone = backbone
        self.decoder_args = dict(decoder_args or {})
        self.decoder = DECODERS[decoder](vit.width, len(vit.blocks), classes, **self.decoder_args)
        self.decoder_name, self.num_classes = decoder, classes
        self.crop = _whole_patches(crop or vit.input_size[1:], vit.patch_size)
        self.palette = _colours(palette)

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return find_backbone(self.backbone).patch_size

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(height, width) of the largest images that the ViT takes; None for a ViT that takes all."""
        return find_backbone(self.backbone).fixed_size

    @property
    def read_blocks(self) -> tuple[int, ...]:
        """Numbers of the ViT's blocks whose output the decoder reads."""
        blocks: Any = self.decoder.blocks
        return tuple(blocks)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patches of images of that size, patches of mere padding among them.

        Raises:
            VimoeError: if the images are larger than a ViT of fixed size.
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
        """Return scores (B, classes, H, W) of images (B, 3, H, W), bilinear between patches.

        Raises:
            VimoeError: if the images are larger than a ViT of fixed size.
        """
        size = images.shape[-2:]
        return self._on_pixels(self.decoder(self._maps(images)), size)

    def track(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the scores (B, classes, H, W) of successive frames (B, 3, H, W) of B videos.

        Each frame's masks tell the next one where the classes were. The first frame's are those of `forward`.

        Example:
            A decoder that was made with prompt_track=True, in training with `loss` over the scores of a clip:

                for scores, mask in zip(model.track(clip), masks):
                    loss = loss + pixel_loss(scores, mask)

        Raises:
            ConfigError: if the decoder does not track.
            VimoeError: as of `forward`.
        """
        decoder: Any = self.decoder
        if getattr(decoder, "tracker", None) is None:
            raise ConfigError(
                f"decoder={self.decoder_name!r} tracks nothing: expected 'prompted' with prompt_track=True; make one"
            )
        tokens = None
        for images in frames:
            scores, tokens = decoder.step(self._maps(images), tokens)
            yield self._on_pixels(scores, images.shape[-2:])

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps (B, D, rows, columns) that the decoder reads."""
        height, width = images.shape[-2:]
        (rows, columns), (patch_h, patch_w) = self.grid(height, width), self.patch_size
        images = F.pad(images, (0, columns * patch_w - width, 0, rows * patch_h - height))
        tokens = find_backbone(self.backbone).features(images, self.read_blocks)
        return [each.unflatten(1, (rows, columns)).permute(0, 3, 1, 2) for each in tokens]

    def _on_pixels(self, scores: Tensor, size: torch.Size) -> Tensor:
        """Return the scores of the patches at the pixels of images of that size."""
        height, width = size
        padded = [count * side for count, side in zip(self.grid(height, width), self.patch_size, strict=True)]
        return F.interpolate(scores, padded, mode="bilinear", align_corners=False)[..., :height, :width]

    def set_prompts(self, prompts: Mapping[str, Tensor], palette: Sequence[Colour] | None = None) -> None:
        """Segment the classes of these vectors from now on, in place and without training.

        Args:
            prompts: vector (width,) of each class by its name, of the encoder that the decoder was trained with.
            palette: (red, green, blue) of each class, for pictures.

        Raises:
            ConfigError: if the decoder takes no vectors, or these do not fit it.
        """
        decoder: Any = self.decoder
        if not hasattr(decoder, "set_prompts"):
            raise ConfigError(f"decoder={self.decoder_name!r} takes no class vectors: expected 'prompted'; train one")
        _check_classes(len(prompts), palette)
        decoder.set_prompts(torch.stack(list(prompts.values())))
        self.num_classes, self.palette = len(prompts), _colours(palette)
        find_backbone(self).set_label_names(list(prompts))

    def to_dict(self) -> dict[str, Any]:
        """Arguments that `Segmenter(backbone, **arguments)` needs to be built again, as JSON knows them."""
        palette = self.palette and [list(colour) for colour in self.palette]
        own = {"decoder_args": self.decoder_args} if self.decoder_args else {}
        return {
            "classes": self.num_classes, "decoder": self.decoder_name, "crop": list(self.crop), "palette": palette,
            **own,
        }  # fmt: skip


def _check_classes(classes: int, palette: Sequence[Colour] | None) -> None:
    if not 2 <= classes <= IGNORE:
        raise ConfigError(f"classes={classes}: expected 2 to {IGNORE}")
    if palette is not None and len(palette) != classes:
        raise ConfigError(f"palette of {len(palette)} colours: expected one for each of the {classes} classes")


def _colours(palette: Sequence[Colour] | None) -> tuple[Colour, ...] | None:
    return None if palette is None else tuple((red, green, blue) for red, green, blue in palette)


def _whole_patches(crop: Sequence[int], patch: Sequence[int]) -> tuple[int, int]:
    (height, width), (high, wide) = crop, patch
    if height < 1 or width < 1 or height % high or width % wide:
        near = tuple(max(1, round(side / part)) * part for side, part in zip(crop, patch, strict=True))
        raise ConfigError(f"crop={(height, width)}: expected whole patches of {high}x{wide}, such as {near}")
    return int(height), int(width)
