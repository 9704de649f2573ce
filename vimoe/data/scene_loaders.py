"""What is done to an image and its mask together, and their batches.

The geometry is done to both, the colours to the image alone. Pixels are areas: an image is resized with antialiased
bilinear interpolation, a mask takes the value at the centre of each new pixel (nearest-exact), so that the two stay
aligned at every scale; plain "nearest" would shift masks by up to half a pixel.
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
from vimoe.data.images import image_size, open_image, place
from vimoe.data.loaders import processes
from vimoe.data.masks import Legend
from vimoe.data.order import Shuffled, seed_host
from vimoe.data.scenes import Scene
from vimoe.errors import DataError

Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]]


class RandomScaledCrop(v2.Transform):  # type: ignore[misc]
    """Scales by a factor drawn from a range, and cuts a random window of at most `size` out of the result.

    The window is cut from the source before it is scaled, which gives the same to within a pixel of rounding, and
    costs only the window. Where the scaled image is smaller than the window, all of it comes back.
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
            plain = cut.as_subclass(Tensor)[None]  # of a Mask, torchvision would take the pixel's corner
            resized = F.resize(plain, params["size"], InterpolationMode.NEAREST_EXACT, antialias=False)[0]
            return tv_tensors.wrap(resized, like=inpt)
        return F.resize(cut, params["size"], InterpolationMode.BILINEAR, antialias=True)


class CentreCut(v2.Transform):  # type: ignore[misc]
    """Cuts the middle out of an image and its mask, of at most `size`."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.center_crop(inpt, [min(have, want) for have, want in zip(inpt.shape[-2:], self.size, strict=True)])


class PadTo(v2.Transform):  # type: ignore[misc]
    """Pads bottom and right to `size`: images with 0, the mean colour once they are normalised, and masks as void."""

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
    """Random scale, random crop, flip and colours, as is usual in semantic segmentation (mmsegmentation's defaults).

    Args:
        size: (height, width) of the crop.
        mean, std: normalisation of each channel, of values in 0..1.
        scale: factors of the image's own size to draw from, uniformly.
        hflip: probability of mirroring left and right.
        jitter: up to which share contrast and saturation change; brightness a quarter of it, hue a tenth.

    Returns:
        A function of (image (3, h, w) uint8, mask (h, w) uint8) that gives (image (3, *size) float32, mask size int64).
    """
    colours = v2.ColorJitter(brightness=jitter / 4, contrast=jitter, saturation=jitter, hue=jitter / 10)
    steps = [RandomScaledCrop(size, scale), v2.RandomHorizontalFlip(hflip), *([colours] if jitter else [])]
    return v2.Compose([*steps, *_numbers(mean, std), PadTo(size)])


def eval_transform(mean: Sequence[float], std: Sequence[float]) -> Transform:
    """The whole image, normalised: (3, h, w) and (h, w), as `train_transform`."""
    return v2.Compose(_numbers(mean, std))


def centre_transform(size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Transform:
    """The middle (3, *size) of an image, normalised, padded where it is smaller; and of its mask."""
    return v2.Compose([CentreCut(size), *_numbers(mean, std), PadTo(size)])


class JointImages(Dataset):
    """Scenes from disk: (image, mask) for an index, or for (index, seed) with draws that follow from the seed alone."""

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
                f"{place(mask)} is {numbers.shape[1]}x{numbers.shape[0]} and its image "
                f"{seen.shape[2]}x{seen.shape[1]}: expected one size; make them so"
            )
        pixels, numbers = self.transform(seen, numbers)
        return pixels.as_subclass(Tensor), numbers.as_subclass(Tensor).long()


def train_loader(
    scenes: Sequence[Scene], legend: Legend, transform: Transform, batch_size: int, seed: int, workers: int | None
) -> DataLoader:
    """Shuffled batches (images (B, 3, H, W), masks (B, H, W) int64), the same for an epoch of a seed.

    An incomplete last one is dropped. `loader.sampler` is a `vimoe.data.order.Shuffled`, to be told the epoch.
    """
    order = Shuffled(len(scenes), seed)
    data = JointImages(scenes, legend, transform)
    return DataLoader(data, batch_size, sampler=order, drop_last=True, **processes(workers))


def eval_loader(
    scenes: Sequence[Scene], legend: Legend, transform: Transform, batch_size: int, workers: int | None
) -> DataLoader:
    """Whole images in order; in batches where all are of one size (by their headers), else one by one."""
    sizes = {image_size(image) for image, _ in scenes} if batch_size > 1 else set()
    data = JointImages(scenes, legend, transform)
    return DataLoader(data, batch_size if len(sizes) == 1 else 1, **processes(workers))


def _numbers(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    kinds: dict[Any, torch.dtype | None] = {tv_tensors.Image: torch.float32, "others": None}
    return [v2.ToDtype(kinds, scale=True), v2.Normalize(list(mean), list(std))]


def _span(have: int, want: int, factor: float) -> tuple[int, int, int]:
    """(start, length) in the source, and the length that it gets, of a window of `want` after scaling by `factor`."""
    length = max(1, round(want / factor))
    if have < length:
        return 0, have, max(1, min(want, round(have * factor)))
    return int(torch.randint(have - length + 1, ())), length, want
