"""Predicted masks as files: the mask, an overlay on the image, and the area of each class."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vimoe.config.data import DataConfig
from vimoe.data.images import open_image
from vimoe.data.loaders import preprocessing, share
from vimoe.data.mask_colours import colour, spread_colours
from vimoe.errors import DataError, FolderError
from vimoe.files import written_whole
from vimoe.models.interface import label_names
from vimoe.process import Alone, Process
from vimoe.tasks.base import warn_of_errors
from vimoe.tasks.segmentation_job import infer
from vimoe.terminal import track

LONGEST = 255  # bytes of a file's name, on nearly all file systems


def predict_scenes(
    model: nn.Module, files: Sequence[Path], out: Path, config: DataConfig, process: Process | None = None
) -> list[dict[str, Any]]:
    """Write NAME-mask.png, a palette image of class numbers, and NAME-overlay.png for each image file.

    Args:
        model: a segmenter with preprocessing and label names, as `vimoe.load` gives it.
        files: image files; files of one name in several folders get a number, and a long name is cut.
        out: folder to write into; made if it is missing.
        config: inference on whole images.
        process: this one of the processes that share the files, of which each writes what it predicts; by default they
            are all for this one.

    Returns:
        {"file", "mask", "overlay", "areas": share of pixels by class name} of each file, or {"file", "error"} of one
        that cannot be read.

    Raises:
        DataError: if none can be read.
        FolderError: if the folder cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"--out {out} cannot be made: {error.strerror}; name another folder") from error
    names, prepared = label_names(model), preprocessing(model)
    colours = getattr(model, "palette", None) or spread_colours(len(names))
    mean, std = (torch.tensor(prepared[key])[:, None, None] for key in ("mean", "std"))
    weight = next(model.parameters())
    model.eval()
    results: dict[int, dict[str, Any]] = {}  # by the place of the file
    called = _names(files)
    for place in track([place for places in share(len(files), 1, process) for place in places], "predicting"):
        file, name = files[place], called[place]
        try:
            image = open_image(file)
        except DataError as error:
            results[place] = {"file": str(file), "error": str(error)}
            continue
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        batch = ((pixels - mean) / std)[None].to(weight.device, weight.dtype)
        predicted = infer(model, batch, config)[0].argmax(dim=0).to("cpu", torch.uint8).numpy()
        mask = colour(predicted, colours)
        paths = {"mask": out / f"{name}-mask.png", "overlay": out / f"{name}-overlay.png"}
        for path, picture in zip(paths.values(), (mask, Image.blend(image, mask.convert("RGB"), 0.5)), strict=True):
            with written_whole(path) as opened:
                picture.save(opened, "PNG")
        shares = np.bincount(predicted.ravel(), minlength=len(names)) / predicted.size
        areas = {names[c]: float(shares[c]) for c in np.argsort(-shares, kind="stable") if shares[c] > 0}
        results[place] = {"file": str(file), **{kind: str(path) for kind, path in paths.items()}, "areas": areas}
    predictions = (process or Alone()).merge(results)
    warn_of_errors(predictions)
    return predictions


def _names(files: Sequence[Path]) -> list[str]:
    """Return a name for what is predicted of each file, all of them different."""
    names: dict[str, None] = {}
    for file in files:
        numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        names[next(name for number in numbers if (name := _name(file.stem, number)) not in names)] = None
    return list(names)


def _name(stem: str, number: str) -> str:
    """Return a name with its number, cut so that the longest ending fits into a file name."""
    while len(os.fsencode(f"{stem}{number}-overlay.png")) > LONGEST:
        stem = stem[:-1]
    return stem + number
