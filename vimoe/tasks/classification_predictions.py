"""Most likely classes of image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vimoe.data.loaders import Readable, eval_loader, preprocessing
from vimoe.models.interface import label_names, logits_of
from vimoe.tasks.base import warn_of_errors
from vimoe.terminal import track


def predict(model: nn.Module, files: Sequence[Path], top: int = 5, workers: int | None = None) -> list[dict[str, Any]]:
    """Name the most likely classes of image files, best first.

    Args:
        model: a model with preprocessing and label names, as `vimoe.load` gives it.
        files: image files.
        top: number of classes to name.
        workers: number of processes that decode images, as `DataConfig.workers`.

    Returns:
        {"file", "classes": [{"name", "probability"}]} of each file, or {"file", "error"} of one that cannot be read.

    Raises:
        DataError: if none can be read.
    """
    samples, prepared = [(file, 0) for file in files], preprocessing(model)
    names, weight = label_names(model.eval()), next(model.parameters())
    results: list[dict[str, Any]] = []
    loader = eval_loader(samples, prepared, 32, workers, Readable)
    for images, errors in track(loader, "predicting"):
        with torch.no_grad():
            logits = logits_of(model, images.to(weight.device, weight.dtype))
        values, indices = logits.float().softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
        for row, best, error in zip(values.tolist(), indices.tolist(), errors, strict=True):
            classes = [{"name": names[i], "probability": p} for p, i in zip(row, best, strict=True)]
            results.append({"file": str(files[len(results)]), **({"error": error} if error else {"classes": classes})})
    warn_of_errors(results)
    return results
