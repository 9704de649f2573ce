"""Tasks that a model learns one after the other (`data.tasks`): what it still knows of each, and how it routes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.analysis.forgetting import forgetting, lift
from vimoe.data.labelled_images import Data
from vimoe.data.tasks import classes_of
from vimoe.files import read_text
from vimoe.metrics.base import batches, metric_of
from vimoe.moe import record
from vimoe.run_folder import TASKS, write_json
from vimoe.tasks.base import Task

logger = logging.getLogger(__name__)
SEEN, OWN = "seen", "own"


class TaskSequence:
    """Measurements of a model after each task, on the validation images of the tasks until then.

    They are kept in the run's tasks.json, so that a resumed training has those from before: {"after": a row for each
    task}. Row t has, for each task i <= t, {"seen", "own": accuracies, "routing": decisions for each expert by layer}.
    "seen" is among all classes of the tasks until then, "own" among the classes of the image's task alone.

    Args:
        task: the kind of task, such as classification.
        parts: images of each task of the sequence.
        folder: run folder.
    """

    def __init__(self, task: Task[Data], parts: Sequence[Data], folder: Path) -> None:
        self.task, self.parts, self.path = task, parts, folder / TASKS
        self.classes = [classes_of(part) for part in parts]

    def measured(self, model: nn.Module, number: int, summary: dict[str, Any]) -> dict[str, Any]:
        """Measure a model after a task, write tasks.json, and return the entries for summary.json.

        Args:
            model: trained model, in eval mode.
            number: number of the task, from 0.
            summary: result of the training of this task.

        Returns:
            The summary with "val" of the images of all tasks until now and "tasks" in place of "stages".
        """
        before = json.loads(read_text(self.path))["after"][:number] if number else []
        row, score = self.row(model, number)
        rows = [*before, row]
        write_json(self.path, {"after": rows})
        found = {name: forgetting([[each[name] for each in row] for row in rows]) for name in (SEEN, OWN)}
        logger.info(
            "after task %d of %d: mean accuracy %.2f%%, %.2f%% within a task's own classes",
            number + 1, len(self.parts), 100 * found[SEEN]["mean"], 100 * found[OWN]["mean"],
        )  # fmt: skip
        stages = summary.pop("stages")
        trained = [
            {**{name: value for name, value in stage.items() if name != "train_only"},
             **({"split": part.split} if part.split else {}),
             "classes": [part.classes[label] for label in own], "train_images": len(part.train)}
            for stage, own, part in zip(stages, self.classes, self.parts, strict=False)
        ]  # fmt: skip
        images = sum(each["train_images"] for each in trained)
        tasks = {"trained": trained, **found, "routing": _drift(rows)}
        return {**summary, "train_images": images, "val": score, "tasks": tasks}

    def row(self, model: nn.Module, number: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the row of tasks.json after a task, and the score on all images that it is of."""
        metric = metric_of(model, self.task.metric)
        seen = sorted({label for own in self.classes[: number + 1] for label in own})
        counts, row = metric.counts(), []
        for part, own in zip(self.parts[: number + 1], self.classes, strict=False):
            right, routing = {SEEN: 0, OWN: 0}, dict[str, Tensor]()
            for entry, labels in batches(metric, self.task.scored(model, part, part.val)):
                with torch.no_grad(), record(model) as routings:
                    logits = entry.logits(model)
                counts.add(logits, labels)
                for name, among in ((SEEN, seen), (OWN, own)):
                    right[name] += _right(logits, labels, among)
                for each in routings:
                    routing[each.layer] = routing.get(each.layer, 0) + each.load
            shares = {name: images / len(part.val) for name, images in right.items()}
            row.append({**shares, "routing": {layer: load.tolist() for layer, load in routing.items()}})
        return row, counts.score().to_dict()


def _right(logits: Tensor, labels: Tensor, among: Sequence[int]) -> int:
    """Return the number of images whose class has the largest logit among some classes."""
    chosen = torch.tensor(among, device=logits.device)
    return int((chosen[logits[:, chosen].argmax(dim=1)] == labels).sum())


def _drift(rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return by layer which experts tasks share, as log2 lift over the base rate (`vimoe.analysis.forgetting.lift`).

    "lift" (T, T) is of the tasks at the end. "kept" is, for each task but the last, that of its images right after it
    and at the end: it falls as the images of a task move to experts that are not theirs.
    """
    found = {}
    for layer in rows[-1][-1]["routing"]:
        counts = [[each["routing"][layer] for each in row] for row in rows]
        kept = [float(lift(then, counts[-1])[i, i]) for i, then in enumerate(counts[:-1])]
        found[layer] = {"lift": lift(counts[-1], counts[-1]).tolist(), "kept": kept}
    return found
