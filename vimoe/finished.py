"""A finished run, opened again: its model and its images, scored, analysed and pruned."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from vimoe import runs
from vimoe.analysis import Evidence, analyze
from vimoe.data import Data, Sample, eval_loader, load_data, load_folder, preprocessing
from vimoe.errors import FolderError
from vimoe.evaluate import Score, evaluate, label_names
from vimoe.experiment import write_validation
from vimoe.folder import load, save
from vimoe.pruning import prune, receipts
from vimoe.report import write_run_report


class FinishedRun:
    """What can be done with a run folder once its training is over.

    Args:
        path: the run folder.

    Raises:
        FolderError: where it is none, or its training did not finish.
    """

    def __init__(self, path: str | Path) -> None:
        self.run = runs.open_run(path)

    @cached_property
    def model(self) -> nn.Module:
        """The trained model, on the GPU where there is one."""
        return self._fresh_model()

    @cached_property
    def data(self) -> Data:
        """The images that it was trained on, with the validation split that decided then."""
        return load_data(self.run.settings.data, label_names(self.model), self.run.validation())

    @property
    def reported(self) -> tuple[str, tuple[Sample, ...]]:
        """The images that results are reported on: test, or validation where there is no test, and which it is."""
        return ("test", self.data.test) if self.data.test else ("validation", self.data.val)

    def score(self, folder: str | None = None) -> tuple[str, Score]:
        """The model's score on the reported images, or on those of another folder; and which images they are."""
        split, samples = load_folder(folder, label_names(self.model)) if folder else self.reported
        return split, evaluate(self.model, self._loader(samples), "evaluating")

    def analyze(self) -> Evidence:
        """Measures the routing on validation, and writes routing.json and the report."""
        evidence = analyze(self.model, self._loader(self.data.val), progress=True)
        runs.write_json(self.run.path / runs.ROUTING, evidence.to_dict())
        write_run_report(self.run.path)
        return evidence

    def prune(self, out: str | Path, tolerance: float) -> dict[str, Any]:
        """Writes a new run with the pruned model and a receipt; analyses first where that was not done.

        Returns:
            What summary.json of the new run holds, and the paths of the run and its report.
        """
        runs.check_new(out)
        known = self.run.path / runs.ROUTING
        evidence = _read_evidence(known) if known.exists() else self.analyze()
        pruned = self._fresh_model()
        decided = prune(pruned, evidence, tolerance)
        split, samples = self.reported
        before, after = receipts([self.model, pruned], self._loader(samples))
        summary = {
            "verdicts": [str(verdict) for verdict in decided],
            "kept": [verdict.layer for verdict in decided if verdict.keep],
            "split": split,
            "before": before.to_dict(),
            "after": after.to_dict(),
        }
        folder = runs.new_run(out)
        runs.write_settings(folder, self.run.settings)
        write_validation(folder, self.run.settings, self.data)
        save(pruned, folder / runs.MODEL, label_names=label_names(pruned))
        runs.write_json(folder / runs.ROUTING_BEFORE, evidence.to_dict())
        runs.write_json(folder / runs.SUMMARY, {"schema": runs.SCHEMA, "command": "prune", **summary})
        return {**summary, "out": str(folder), "report": str(write_run_report(folder))}

    def _fresh_model(self) -> nn.Module:
        return load(self.run.model, torch.accelerator.current_accelerator(check_available=True) or "cpu")

    def _loader(self, samples: tuple[Sample, ...]) -> DataLoader:
        settings = self.run.settings
        return eval_loader(samples, preprocessing(self.model), 2 * settings.train.batch_size, settings.data.workers)


def _read_evidence(path: Path) -> Evidence:
    try:
        return Evidence.from_dict(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{path} cannot be read ({error}): expected what analyze wrote; run analyze again") from error
