"""scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from vimoe.config.data import DataConfig, joined
from vimoe.data.draws import draw, subset
from vimoe.data.labelled_images import Data, Sample
from vimoe.data.splits import ROLES
from vimoe.errors import ConfigError, DataError, nearest


def digits(config: DataConfig) -> Data:
    """Return scikit-learn's 1,797 handwritten digits, 8x8: 40% for test, 20% for validation, 40% for train.

    Raises:
        ConfigError: if a role is to have joined splits.
    """
    for role in ROLES:
        if len(joined(name := getattr(config, f"{role}_split"))) > 1:
            raise ConfigError(
                f"data.{role}_split={name!r} with data.path='digits': expected no joined splits, since the digits have "
                f"train, validation and test of their own; leave it out"
            )
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grey = (pixels.reshape(-1, 8, 8) * (255 / 16)).round().astype("uint8")
    samples: list[Sample] = [(Image.fromarray(g).convert("RGB"), int(y)) for g, y in zip(grey, labels, strict=True)]
    rest, test = draw(samples, lambda n: round(n * 0.4), seed=0)
    train, val = draw(rest, lambda n: round(n / 3), config.seed)
    return Data(tuple("0123456789"), tuple(subset(train, config)), tuple(val), tuple(test))


def digits_for_test(classes: Sequence[str]) -> tuple[Sample, ...]:
    """Return the test digits, with labels by a model's class map.

    Raises:
        DataError: if the map lacks a digit.
    """
    found = digits(DataConfig(path="digits"))
    if missing := set(found.classes) - set(classes):
        raise DataError(f"digits: no class {min(missing)!r} in the class map from train; {nearest('', classes)}")
    return tuple((image, list(classes).index(found.classes[label])) for image, label in found.test)
