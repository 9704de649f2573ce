"""The order of training images, and random seeds that follow from the run's seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class Shuffled(Sampler):
    """Sampler of (index, seed) pairs, which depend on the run's seed and the epoch alone.

    Args:
        images: number of images.
        seed: seed of the run.
    """

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.seed = images, seed
        self.places = torch.tensor([0])
        self.start(epoch=1)

    def start(self, epoch: int, skip: int = 0) -> None:
        """Set the epoch of the next iteration, and the number of images to skip at its start."""
        self.epoch, self.skip = epoch, skip

    def divide(self, batch_size: int, processes: int) -> None:
        """Put the images of each batch in the order in which processes cut their parts of it.

        A batch of any number of processes has the same images. Of n processes the first gets the first and the last
        images of the batch, the next those beside them. So image i and image B - 1 - i, which mixup and cutmix mix, are
        in one process, at places that mirror one another there too.

        Args:
            batch_size: B, number of images of a batch, a multiple of the number of processes.
            processes: number of processes; with 1 the order stays as it is.
        """
        outside_in = torch.arange(batch_size).view(-1, 1).repeat(1, 2)
        outside_in[:, 1] = outside_in[:, 1].flip(0)
        parts = outside_in.flatten()[:batch_size].view(processes, -1)
        self.places = parts.sort(dim=1).values.flatten()

    def images_at(self, start: int, count: int) -> list[int]:
        """Return the indices of `count` images of the epoch, from position `start` on."""
        order = torch.randperm(self.images, generator=torch.Generator().manual_seed(mix(self.seed, self.epoch)))
        whole = self.images - self.images % len(self.places)  # the last batch is dropped if it is incomplete
        order[:whole] = order[:whole].view(-1, len(self.places))[:, self.places].flatten()
        return order[start : start + count].tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in self.images_at(self.skip, self.images):
            yield index, mix(self.seed, self.epoch, index)

    def __len__(self) -> int:
        return self.images - self.skip


def mix(*numbers: int) -> int:
    """Combine numbers into one 32-bit seed; similar numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_host(seed: int) -> None:
    """Seed the generators of augmentation: Python's, numpy's and torch's on the CPU."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  timm's transforms draw from this generator
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would visit all devices for each image


def seed_everything(seed: int) -> None:
    """Seed the generators of a training step: Python's, numpy's and torch's on all devices."""
    seed_host(seed)
    if torch.accelerator.is_available():  # where CUDA is built in but not there, torch notes the call's whole stack
        torch.manual_seed(seed)
