"""Predicted masks as files: the mask, the image under it, and how much of the image each class has."""

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
from vimoe.data.loaders import preprocessing
from vimoe.data.mask_colours import colour, spread_colours
from vimoe.errors import DataError, FolderError
from vimoe.files import written_whole
from vimoe.models.interface import label_names
from vimoe.tasks.predictions import report_errors
from vimoe.tasks.scene_training import infer
from vimoe.terminal import track

LONGEST = 255  # bytes of a file's name, on nearly all file systems


def predict_scenes(model: nn.Module, files: Sequence[Path], out: Path, config: DataConfig) -> list[dict[str, Any]]:
    """Writes NAME-mask.png (a palette image whose values are places in the model's classes) and NAME-overlay.png.

    Args:
        model: a segmenter with preprocessing and label names, as `vimoe.load` gives it.
        files: image files; those of one name in several folders get a number, and a long name is cut.
        out: folder to write into; made where it is not there.
        config: how whole images are inferred.

    Returns:
        For each file {"file", "mask", "overlay", "areas": the share of pixels of each class that it has}, or {"file",
        "error"} where it cannot be read.

    Raises:
        DataError: where none can be read.
        FolderError: where the folder cannot be made or written to.
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
    results: list[dict[str, Any]] = []
    used: set[str] = set()
    for file in track(files, "predicting"):
        try:
            image = open_image(file)
        except DataError as error:
            results.append({"file": str(file), "error": str(error)})
            continue
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        batch = ((pixels - mean) / std)[None].to(weight.device, weight.dtype)
        predicted = infer(model, batch, config)[0].argmax(dim=0).to("cpu", torch.uint8).numpy()
        numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        name = next(name for number in numbers if (name := _name(file.stem, number)) not in used)
        used.add(name)
        mask = colour(predicted, colours)
        paths = {"mask": out / f"{name}-mask.png", "overlay": out / f"{name}-overlay.png"}
        for path, picture in zip(paths.values(), (mask, Image.blend(image, mask.convert("RGB"), 0.5)), strict=True):
            with written_whole(path) as opened:
                picture.save(opened, "PNG")
        shares = np.bincount(predicted.ravel(), minlength=len(names)) / predicted.size
        areas = {names[c]: float(shares[c]) for c in np.argsort(-shares, kind="stable") if shares[c] > 0}
        results.append({"file": str(file), **{kind: str(path) for kind, path in paths.items()}, "areas": areas})
    report_errors(results)
    return results


def _name(stem: str, number: str) -> str:
    """As much of a name as leaves room for a number and the longest ending in the bytes that a file's name may have."""
    while len(os.fsencode(f"{stem}{number}-overlay.png")) > LONGEST:
        stem = stem[:-1]
    return stem + number
