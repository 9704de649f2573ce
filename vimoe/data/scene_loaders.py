"""Transforms of an image and its mask together, and batches of both.

Geometry changes both, colours change the image alone. Pixels are areas: images are resized with antialiased bilinear
interpolation, and masks take the value at the centre of each new pixel (nearest-exact). So the two stay aligned at
every scale, while plain "nearest" would shift masks by up to half a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from vimoe.config.masks import IGNORE
from vimoe.data.images import image_size, open_image, source_path
from vimoe.data.loaders import processes, share
from vimoe.data.masks import Legend
from vimoe.data.order import Shuffled, seed_host
from vimoe.data.scenes import Scene
from vimoe.errors import DataError
from vimoe.process import Process

Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]]


class RandomScaledCrop(v2.Transform):  # type: ignore[misc]
    """Scale by a random factor, and cut a random window out of the result.

    The window is cut before it is scaled. That gives the same to within a pixel of rounding, and only the window has
    to be scaled. If the scaled image is smaller than the window, all of it is returned.

    Args:
        size: (height, width) of the window.
        scale: range of the factor, drawn uniformly.

    Raises:
        DataError: if the range is empty or not above 0.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float]) -> None:
        super().__init__()
        if not 0 < scale[0] <= scale[1]:
            raise DataError(f"scale={scale}: expected two factors above 0, the smaller first, such as (0.5, 2.0)")
        self.size, self.scale = size, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = flat_inputs[0].shape[-2:]
        factor = float(torch.empty(()).uniform_(*self.scale))
        (top, box_h, out_h), (left, box_w, out_w) = (
            _span(have, want, factor) for have, want in zip((height, width), self.size, strict=True)
        )
        return {"box": (top, left, box_h, box_w), "size": [out_h, out_w]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        cut = F.crop(inpt, *params["box"])
        if isinstance(inpt, tv_tensors.Mask):
            plain = cut.as_subclass(Tensor)[
                None
            ]  # as a plain tensor, because for a Mask torchvision takes the corner of the pixel
            resized = F.resize(plain, params["size"], InterpolationMode.NEAREST_EXACT, antialias=False)[0]
            return tv_tensors.wrap(resized, like=inpt)
        return F.resize(cut, params["size"], InterpolationMode.BILINEAR, antialias=True)


class CentreCut(v2.Transform):  # type: ignore[misc]
    """Cut the middle, of at most `size` (height, width), out of an image and its mask."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.center_crop(inpt, [min(have, want) for have, want in zip(inpt.shape[-2:], self.size, strict=True)])


class PadTo(v2.Transform):  # type: ignore[misc]
    """Pad bottom and right to `size` (height, width).

    Masks are padded as void (`IGNORE`), so padding is in no loss and no score. Normalised images are padded with 0,
    which is the mean colour.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = inpt.shape[-2:]
        margins = [0, 0, self.size[1] - width, self.size[0] - height]
        return F.pad(inpt, margins, fill=IGNORE if isinstance(inpt, tv_tensors.Mask) else 0)


def train_transform(
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    hflip: float = 0.5,
    jitter: float = 0.5,
) -> Transform:
    """Return a transform for training: random scale, crop, flip and colours, as in mmsegmentation's defaults.

    Args:
        size: (height, width) of the crop.
        mean, std: normalisation of each channel, for values in 0..1.
        scale: range of the scale relative to the image's own size, drawn uniformly.
        hflip: probability of a horizontal flip.
        jitter: largest relative change of contrast and saturation; brightness changes by a quarter of it, hue by a
            tenth.

    Returns:
        Function of image (3, h, w) uint8 and mask (h, w) uint8 that returns image (3, *size) float32 and mask (*size).
    """
    colours = v2.ColorJitter(brightness=jitter / 4, contrast=jitter, saturation=jitter, hue=jitter / 10)
    steps = [RandomScaledCrop(size, scale), v2.RandomHorizontalFlip(hflip), *([colours] if jitter else [])]
    return v2.Compose([*steps, *_normalise(mean, std), PadTo(size)])


def eval_transform(mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Return a transform that normalises the whole image: (3, h, w) and (h, w), as `train_transform`."""
    return v2.Compose(_normalise(mean, std))


def centre_transform(size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Return a transform that cuts the middle (3, *size) out, normalises it and pads smaller images; masks alike."""
    return v2.Compose([CentreCut(size), *_normalise(mean, std), PadTo(size)])


class JointImages(Dataset):
    """Dataset of (image, mask) from scenes on disk.

    A key is an index, or (index, seed); then the random transform follows from the seed alone.

    Args:
        scenes: (image, mask) of each scene.
        legend: meaning of the masks' values.
        transform: function of image (3, h, w) uint8 and mask (h, w) uint8.
    """

    def __init__(self, scenes: Sequence[Scene], legend: Legend, transform: Transform) -> None:
        self.scenes, self.legend, self.transform = scenes, legend, transform

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        if isinstance(key, tuple):
            key, seed = key
            seed_host(seed)
        image, mask = self.scenes[key]
        seen = tv_tensors.Image(F.pil_to_tensor(open_image(image)))
        numbers = tv_tensors.Mask(torch.from_numpy(self.legend.read(mask)))
        if seen.shape[-2:] != numbers.shape:
            raise DataError(
                f"{source_path(mask)} is {numbers.shape[1]}x{numbers.shape[0]} and its image "
                f"{seen.shape[2]}x{seen.shape[1]}: expected one size; resize one of them"
            )
        pixels, numbers = self.transform(seen, numbers)
        return pixels.as_subclass(Tensor), numbers.as_subclass(Tensor).long()


def train_loader(
    scenes: Sequence[Scene], legend: Legend, transform: Transform, batch_size: int, seed: int, workers: int | None
) -> DataLoader:
    """Return shuffled batches of images (B, 3, H, W) and masks (B, H, W) int64, which follow from seed and epoch.

    The last batch is dropped if it is incomplete. `loader.sampler` is a `vimoe.data.order.Shuffled`, whose `start` sets
    the epoch.
    """
    order = Shuffled(len(scenes), seed)
    data = JointImages(scenes, legend, transform)
    return DataLoader(data, batch_size, sampler=order, drop_last=True, **processes(workers))


def eval_loader(
    scenes: Sequence[Scene],
    legend: Legend,
    transform: Transform,
    batch_size: int,
    workers: int | None,
    process: Process | None = None,
) -> DataLoader:
    """Return whole images in order: in batches if all have one size (by their headers), else one by one.

    Of several processes each gets its share, as in `vimoe.data.loaders.eval_loader`.
    """
    sizes = {image_size(image) for image, _ in scenes} if batch_size > 1 else set()
    data = JointImages(scenes, legend, transform)
    places: Any = share(len(scenes), batch_size if len(sizes) == 1 else 1, process)
    return DataLoader(data, batch_sampler=places, **processes(workers))


def _normalise(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    kinds: dict[Any, torch.dtype | None] = {tv_tensors.Image: torch.float32, "others": None}
    return [v2.ToDtype(kinds, scale=True), v2.Normalize(list(mean), list(std))]


def _span(have: int, want: int, factor: float) -> tuple[int, int, int]:
    """Draw one side of a window of `want` pixels after scaling by `factor`.

    Returns:
        Start and length of the side in the source, and its length in the result.
    """
    length = max(1, round(want / factor))
    if have < length:
        return 0, have, max(1, min(want, round(have * factor)))
    return int(torch.randint(have - length + 1, ())), length, want
