"""Batches of images for training and evaluation: transforms, and an order and augmentation that follow from seeds."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from vimoe.config.data import DataConfig
from vimoe.config.train import TrainConfig
from vimoe.data.decoded import Decoded, Shrink, Where, decode
from vimoe.data.images import THIN, open_image
from vimoe.data.labelled_images import Sample
from vimoe.data.order import Shuffled, seed_host
from vimoe.errors import DataError
from vimoe.models.interface import find_backbone
from vimoe.process import Process, device


class Images(Dataset):
    """Dataset of (transformed image, label) from samples on disk or in memory (`open_image`)."""

    def __init__(self, samples: Sequence[Sample], transform: Any) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source, label = self.samples[index]
        return self.transform(open_image(source)), label


class Readable(Images):
    """Dataset of (transformed image, error); a black image and the reason if one cannot be read, else ""."""

    def __getitem__(self, index: int) -> tuple[Tensor, str]:  # type: ignore[override]
        try:
            return super().__getitem__(index)[0], ""
        except DataError as error:
            return self.transform(Image.new("RGB", (1, 1))), str(error)


class CutThin:
    """Cut the middle out of an image whose longer side is more than `ratio` times the shorter one.

    A centre crop sees no more of such an image. But it comes after the resize, which turns an image one pixel wide into
    gigabytes.
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


class _Fitted(Compose):  # type: ignore[misc]
    """Steps whose repr also tells the colour of borders, which timm's own (of crop_mode "border") does not."""

    def __repr__(self) -> str:
        fills = [str(step.fill) for step in self.transforms if hasattr(step, "fill")]
        return "".join([repr(Compose(self.transforms)), *fills])


class Augmented(Images):
    """Dataset whose transform draws from the seed that comes with the index, in whichever process it runs."""

    def __getitem__(self, key: Any) -> tuple[Tensor, int]:
        index, seed = key
        seed_host(seed)
        return super().__getitem__(index)


def preprocessing(model: nn.Module, config: DataConfig | None = None) -> dict[str, Any]:
    """Return timm's data config for a model: input_size, mean, std, crop_pct, crop_mode, interpolation.

    Args:
        model: a ViT, or a module around one.
        config: settings, of which crop_pct, interpolation, mean and std replace the model's own.

    Raises:
        DataError: if the settings do not fit the model, or it does not take 3 channels.
    """
    names = ("crop_pct", "interpolation", "mean", "std")
    given = {name: getattr(config, name) for name in names if config and getattr(config, name) is not None}
    try:
        prepared = find_backbone(model).data_config(given)
    except ValueError as error:
        raise DataError(f"data settings {given} do not fit the model: {error}") from error
    if prepared["input_size"][0] != 3:
        raise DataError(f"the model takes {prepared['input_size'][0]} channels: expected 3, since images become RGB")
    return prepared


def decoded_for_training(
    samples: Sequence[Sample], prepared: dict[str, Any], config: TrainConfig, where: Where
) -> Decoded:
    """Decode images once, at the size at which the smallest crop still has all the pixels that the model reads."""
    return decode(samples, Shrink(math.ceil(max(prepared["input_size"][1:]) / math.sqrt(config.min_crop))), where)


def decoded_for_evaluation(samples: Sequence[Sample], prepared: dict[str, Any], where: Where) -> Decoded:
    """Decode, resize and crop images once; `eval_loader` with `crop_pct` 1 then changes nothing more."""
    steps = _eval_transform(prepared, use_prefetcher=True).transforms
    return decode(samples, _Fitted(steps[:-1]), where)  # without the last step, which makes a tensor


def train_loader(
    samples: Sequence[Sample], prepared: dict[str, Any], config: TrainConfig, workers: int | None
) -> DataLoader:
    """Return shuffled batches with timm's augmentation; the last one is dropped if it is incomplete.

    Order and augmentation follow from the seed and the epoch.

    Args:
        samples: train images.
        prepared: preprocessing of the model (`preprocessing`).
        config: settings of the augmentation.
        workers: number of processes (`processes`).

    Raises:
        DataError: if `config.auto_augment` is no policy of timm.
    """
    images, order = Augmented(samples, train_transform(prepared, config)), Shuffled(len(samples), config.seed)
    return DataLoader(images, config.batch_size, sampler=order, drop_last=True, **processes(workers))


def train_transform(prepared: dict[str, Any], config: TrainConfig) -> Any:
    """Return timm's augmentation. Raises DataError for a policy that timm does not know."""
    whole = config.min_crop == 1
    try:
        return create_transform(
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


def eval_loader(
    samples: Sequence[Sample],
    prepared: dict[str, Any],
    batch_size: int,
    workers: int | None,
    dataset: type[Images] = Images,
    process: Process | None = None,
) -> DataLoader:
    """Return batches in order, resized and centre-cropped; with dataset=`Readable`, errors stand in place of labels.

    Args:
        samples: images.
        prepared: preprocessing of the model (`preprocessing`).
        batch_size: number of images of a batch of all processes.
        workers: number of processes that decode (`processes`).
        dataset: class of the pairs.
        process: this one of the processes that share the images (`share`); by default they are all for this one.
    """
    images = dataset(samples, _eval_transform(prepared))
    places: Any = share(len(samples), batch_size, process)
    return DataLoader(images, batch_sampler=places, **processes(workers))


def share(images: int, batch_size: int, process: Process | None = None) -> list[range]:
    """Return the places of this process's images, batch by batch, as the `batch_sampler` of a DataLoader.

    Of n processes each gets every n-th image of each batch, so that all have the same batches as one process would. A
    batch has an image for each process at least. No batch is empty: a process may have one less than the first.

    Args:
        images: number of images of all processes.
        batch_size: number of images of a batch of all processes.
        process: this one of the processes; by default the only one.
    """
    rank, count = (process.rank, process.count) if process else (0, 1)
    whole = max(batch_size, count)
    return [range(at + rank, min(at + whole, images), count) for at in range(0, images - rank, whole)]


def _eval_transform(prepared: dict[str, Any], **options: Any) -> Compose:
    """Return timm's transform for evaluation, with a cut in front for thin images."""
    steps = create_transform(**prepared, is_training=False, **options).transforms
    mode, sides = prepared.get("crop_mode") or "center", prepared["input_size"][1:]
    if mode == "squash":  # shows the whole image
        return Compose(steps)
    # "border" also shows the whole image, as long as its short side keeps a pixel
    return Compose([CutThin(THIN * max(sides) / min(sides) if mode == "center" else max(sides)), *steps])


def processes(workers: int | None) -> dict[str, Any]:
    """Return arguments of a DataLoader.

    Args:
        workers: number of processes; by default one per core, at most 8, if a GPU computes, else 0.
    """
    if workers is None:  # decoders would only compete with a model that computes on all cores
        workers = min(os.cpu_count() or 1, 8) if device().type != "cpu" else 0
    return {"num_workers": workers, "persistent_workers": workers > 0}
