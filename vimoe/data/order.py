"""The order of training images, and random numbers that follow from the seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class Shuffled(Sampler):
    """(index, seed) of each image, in an order and with seeds that follow from the seed and the epoch alone."""

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.seed = images, seed
        self.start(epoch=1)

    def start(self, epoch: int, skip: int = 0) -> None:
        """The next iteration is of this epoch, without its first `skip` images."""
        self.epoch, self.skip = epoch, skip

    def images_at(self, start: int, count: int) -> list[int]:
        """Which images come at these places of the epoch."""
        order = torch.randperm(self.images, generator=torch.Generator().manual_seed(mix(self.seed, self.epoch)))
        return order[start : start + count].tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in self.images_at(self.skip, self.images):
            yield index, mix(self.seed, self.epoch, index)

    def __len__(self) -> int:
        return self.images - self.skip


def mix(*numbers: int) -> int:
    """One 32-bit seed of several numbers, unlike that of any near them."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_host(seed: int) -> None:
    """Seeds what augmentation draws from: python, numpy and torch on the CPU."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the generator that timm's transforms draw from
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would go round all devices for each image


def seed_everything(seed: int) -> None:
    """Seeds what a training step draws from: python, numpy and torch on all devices."""
    seed_host(seed)
    torch.manual_seed(seed)
