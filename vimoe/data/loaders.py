"""Batches of images for training and evaluation: the transforms, and an order and draws that follow from seeds."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from vimoe.config.data import DataConfig
from vimoe.config.train import TrainConfig
from vimoe.data.classification import Sample
from vimoe.data.decoded import Decoded, Shrink, Where, decode
from vimoe.data.images import THIN, open_image
from vimoe.data.order import Shuffled, seed_host
from vimoe.errors import DataError
from vimoe.models.interface import vit
from vimoe.process import Process


class Images(Dataset):
    """Images on disk or in memory, opened as RGB the way they are meant to be seen."""

    def __init__(self, samples: Sequence[Sample], transform: Any) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source, label = self.samples[index]
        return self.transform(open_image(source)), label


class Readable(Images):
    """Images with, in the place of a label, why one cannot be read; of such a one a black image."""

    def __getitem__(self, index: int) -> tuple[Tensor, str]:  # type: ignore[override]
        try:
            return super().__getitem__(index)[0], ""
        except DataError as error:
            return self.transform(Image.new("RGB", (1, 1))), str(error)


class CutThin:
    """Cuts the middle out of images whose longer side is more than `ratio` times the shorter one.

    A centre crop sees no more of them. But it comes after the resize, which makes gigabytes of a line of one pixel.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def __call__(self, image: Image.Image) -> Image.Image:
        most = math.ceil(self.ratio * min(image.size))
        width, height = (min(side, most) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image if image.size == (width, height) else image.crop((left, top, left + width, top + height))

    def __repr__(self) -> str:
        return f"CutThin({self.ratio})"


class Augmented(Images):
    """Images whose transform draws from the seed that comes with the index, whichever process it runs in."""

    def __getitem__(self, key: Any) -> tuple[Tensor, int]:
        index, seed = key
        seed_host(seed)
        return super().__getitem__(index)


def preprocessing(model: nn.Module, config: DataConfig | None = None) -> dict[str, Any]:
    """The data config of timm (input_size, mean, std, crop_pct, crop_mode, interpolation) for a model."""
    names = ("crop_pct", "interpolation", "mean", "std")
    given = {name: getattr(config, name) for name in names if config and getattr(config, name) is not None}
    try:
        prepared = resolve_input_data_config(vit(model), given)
    except ValueError as error:
        raise DataError(f"data settings {given} do not fit the model: {error}") from error
    if prepared["input_size"][0] != 3:
        raise DataError(f"the model takes {prepared['input_size'][0]} channels: expected 3, since images become RGB")
    return prepared


def decoded_for_training(
    samples: Sequence[Sample], prepared: dict[str, Any], config: TrainConfig, where: Where
) -> Decoded:
    """The images decoded once, as large as the smallest crop needs them to have all the model's pixels."""
    return decode(samples, Shrink(math.ceil(max(prepared["input_size"][1:]) / math.sqrt(config.min_crop))), where)


def decoded_for_evaluation(samples: Sequence[Sample], prepared: dict[str, Any], where: Where) -> Decoded:
    """The images decoded, resized and cropped once; with `crop_pct` 1 `eval_loader` does nothing more to them."""
    steps = _eval_transform(prepared, use_prefetcher=True).transforms
    return decode(samples, Compose(steps[:-1]), where)  # the last makes a tensor of it


def train_loader(
    samples: Sequence[Sample], prepared: dict[str, Any], config: TrainConfig, workers: int | None
) -> DataLoader:
    """Return shuffled whole batches with timm's augmentation, the same for an epoch of a seed.

    Raises:
        DataError: for a policy of augmentation that timm does not know.
    """
    whole = config.min_crop == 1
    try:
        transform = create_transform(
            **{name: prepared[name] for name in ("input_size", "mean", "std", "interpolation")},
            is_training=True,
            scale=(config.min_crop, 1.0),
            ratio=(1.0, 1.0) if whole else (3 / 4, 4 / 3),
            hflip=config.hflip,
            color_jitter=config.color_jitter or 0.0,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise DataError(
            f"train.auto_augment={config.auto_augment!r}: expected a policy of timm, such as 'rand-m9-mstd0.5-inc1'"
        ) from error
    order = Shuffled(len(samples), config.seed)
    images = Augmented(samples, transform)
    return DataLoader(images, config.batch_size, sampler=order, drop_last=True, **processes(workers))


def eval_loader(
    samples: Sequence[Sample],
    prepared: dict[str, Any],
    batch_size: int,
    workers: int | None,
    dataset: type[Images] = Images,
) -> DataLoader:
    """Return batches in order, resized and centre-cropped; by `Readable` with reasons in the place of labels."""
    return DataLoader(dataset(samples, _eval_transform(prepared)), batch_size, **processes(workers))


def _eval_transform(prepared: dict[str, Any], **options: Any) -> Compose:
    """Timm's transform for evaluation, for images of any shape."""
    steps = create_transform(**prepared, is_training=False, **options).transforms
    mode, sides = prepared.get("crop_mode") or "center", prepared["input_size"][1:]
    if mode == "squash":  # which shows all of the image
        return Compose(steps)
    # "border" shows all of it too, as long as it is a pixel wide then
    return Compose([CutThin(THIN * max(sides) / min(sides) if mode == "center" else max(sides)), *steps])


def processes(workers: int | None) -> dict[str, Any]:
    """Arguments of a DataLoader: this many processes, by default one a core beside a GPU and none beside a CPU."""
    if workers is None:  # beside a model that computes on all cores, decoders would only take turns with it
        workers = min(os.cpu_count() or 1, 8) if Process().device.type != "cpu" else 0
    return {"num_workers": workers, "persistent_workers": workers > 0}
