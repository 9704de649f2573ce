"""Images that are drawn from each class: validation that is split off train, and a subset of train."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping

from PIL import Image

from vimoe.config.data import DataConfig
from vimoe.data.images import name_within
from vimoe.data.labelled_images import Sample
from vimoe.data.listing import Listing
from vimoe.data.roles import Split
from vimoe.errors import DataError


def split_off(
    train: list[Sample], listing: Listing, config: DataConfig, listed: set[str], origin: Mapping[int, Split]
) -> tuple[list[Sample], list[Sample]]:
    """Split validation off train: the images that a run has listed, or else a seeded share of each class and split."""
    if listed:
        val = [s for s in train if not isinstance(s[0], Image.Image) and name_within(listing.root, s[0]) in listed]
        if len(val) != len(listed):
            raise DataError(
                f"{listing.name}: {len(listed) - len(val)} of the run's {len(listed)} validation images are missing or "
                f"damaged: expected the data as they were in training; restore them, or train again"
            )
        held_out = {id(sample) for sample in val}
        return [s for s in train if id(s) not in held_out], val

    def share(images: int) -> int:
        return min(images - 1, max(1, round(images * config.val_fraction)))

    kept, val = draw(train, share, config.seed, lambda sample: (sample[1], origin[id(sample)]))
    if not val:
        raise DataError(
            f"{listing.name}: no class has two images: expected some, to split validation off; add images, or a "
            f"{listing.word} 'val'"
        )
    return kept, val


def subset(train: list[Sample], config: DataConfig) -> list[Sample]:
    """Return the train images that are used: so many of each class as `images_per_class` says, or all."""
    most = config.images_per_class
    return train if most is None else draw(train, lambda n: min(n, most), config.seed + 1)[1]


def draw(
    samples: list[Sample],
    how_many: Callable[[int], int],
    seed: int,
    group: Callable[[Sample], Hashable] = lambda sample: sample[1],
) -> tuple[list[Sample], list[Sample]]:
    """Draw `how_many(n)` of the n samples of each group; return (the others, the drawn), both in their old order.

    A group is a class, if no other is given.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[group(sample)].append(index)
    rng = random.Random(seed)
    drawn = {i for members in groups.values() for i in rng.sample(members, how_many(len(members)))}
    return [s for i, s in enumerate(samples) if i not in drawn], [s for i, s in enumerate(samples) if i in drawn]
