"""Most likely classes of image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vimoe.analysis.trust import Trust, observed
from vimoe.data.loaders import Readable, eval_loader, preprocessing
from vimoe.models.interface import label_names, logits_of
from vimoe.process import Alone, Process
from vimoe.tasks.base import warn_of_errors
from vimoe.terminal import track


def predict(
    model: nn.Module, files: Sequence[Path], top: int = 5, workers: int | None = None, process: Process | None = None,
    trust: Trust | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Name the most likely classes of image files, best first.

    Args:
        model: a model with preprocessing and label names, as `vimoe.load` gives it.
        files: image files.
        top: number of classes to name.
        workers: number of processes that decode images, as `DataConfig.workers`.
        process: this one of the processes that share the files; by default they are all for this one.
        trust: scores of each prediction, fitted to the model; by default there are none.

    Returns:
        {"file", "classes": [{"name", "probability"}]} of each file, whichever process read it, or {"file", "error"} of
        one that cannot be read. With `trust` also "familiarity" and "correct", as `Trust.of`.

    Raises:
        DataError: if none can be read.
    """
    samples, prepared = [(file, 0) for file in files], preprocessing(model)
    names, weight = label_names(model.eval()), next(model.parameters())
    results: dict[int, dict[str, Any]] = {}  # by the place of the file
    loader: Any = eval_loader(samples, prepared, 32, workers, Readable, process)
    for places, (images, errors) in zip(loader.batch_sampler, track(loader, "predicting"), strict=True):
        inputs = images.to(weight.device, weight.dtype)
        scores: list[dict[str, float]] = [{}] * len(images)
        if trust is None:
            with torch.no_grad():
                logits = logits_of(model, inputs)
        else:
            logits, features = observed(model, inputs)
            scores = trust.of(logits, features)
        values, indices = logits.float().softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
        rows = zip(places, values.tolist(), indices.tolist(), errors, scores, strict=True)
        for place, row, best, error, score in rows:
            classes = [{"name": names[i], "probability": p} for p, i in zip(row, best, strict=True)]
            found = {"error": error} if error else {"classes": classes, **score}
            results[place] = {"file": str(files[place]), **found}
    predictions = (process or Alone()).merge(results)
    warn_of_errors(predictions)
    return predictions
