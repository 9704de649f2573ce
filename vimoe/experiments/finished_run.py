"""A finished run, opened again: its model and its images, scored, analysed and pruned."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from vimoe import run_folder
from vimoe.analysis.analyze import analyze
from vimoe.analysis.evidence import Evidence
from vimoe.analysis.figures import contact_sheet, png
from vimoe.analysis.pruning import prune, receipts
from vimoe.config.analysis import DRAWS, OVERRULED_IMAGES, PRUNE_TOLERANCE
from vimoe.config.data import Inference
from vimoe.config.train import TrainConfig
from vimoe.data.images import open_image
from vimoe.errors import ConfigError, FolderError, Stopped
from vimoe.experiments.train import check_outside
from vimoe.files import read_text, temporary_folder, write_bytes
from vimoe.metrics.classification import Score
from vimoe.metrics.segmentation import SceneScore
from vimoe.models.interface import label_names
from vimoe.models.model_folder import load, save
from vimoe.moe.layer import moe_layers
from vimoe.process import Process
from vimoe.report.run_report import write_run_report
from vimoe.tasks.predicted_masks import predict_scenes
from vimoe.tasks.registry import Problem, problem_of
from vimoe.training import checkpoint
from vimoe.training.loop import train


class FinishedRun:
    """What can be done with a run folder once its training is over.

    Args:
        path: the run folder.
        inference, flip_test: of a segmentation, as in `DataConfig`; by default the run's.

    Raises:
        FolderError: where it is none, or its training did not finish.
        ConfigError: for a way of inference of a classification.
    """

    def __init__(self, path: str | Path, inference: Inference | None = None, flip_test: bool | None = None) -> None:
        self.run = run_folder.open_run(path)
        ways: dict[str, Any] = {"inference": inference, "flip_test": flip_test}
        given = {name: value for name, value in ways.items() if value is not None}
        if given and not self.segments:
            name, value = next(iter(given.items()))
            raise ConfigError(f"data.{name}={value!r} of a classification: expected it of a segmentation; leave it out")
        settings = self.run.settings
        self.run = replace(self.run, settings=replace(settings, data=replace(settings.data, **given)))

    @cached_property
    def model(self) -> nn.Module:
        """The trained model, on the GPU where there is one."""
        return self._fresh_model()

    @cached_property
    def problem(self) -> Problem:
        """What it was trained on, with the validation split that decided then."""
        return problem_of(self.run.settings, label_names(self.model), self.run.validation())

    @property
    def reported(self) -> tuple[str, tuple[Any, ...]]:
        """The images that results are reported on: test, or validation where there is no test, and which it is."""
        data = self.problem.data
        return ("test", data.test) if data.test else ("validation", data.val)

    def score(self, path: str | None = None) -> tuple[str, Score | SceneScore]:
        """The model's score on the reported images, or on those of another data path; and which images they are."""
        if path is not None:
            split, loader = self.problem.elsewhere(self.model, path)
        else:
            split, samples = self.reported
            loader = self._loader(samples)
        return split, self.problem.evaluate(self.model, loader, "evaluating")

    @property
    def segments(self) -> bool:
        """Whether it is a segmentation."""
        return self.run.settings.data.task == "segmentation"

    def predict_scenes(self, files: Sequence[Path], out: str | Path) -> list[dict[str, Any]]:
        """Writes the masks of image files, as `vimoe.tasks.predicted_masks.predict_scenes`."""
        return predict_scenes(self.model, files, Path(out), self.run.settings.data)

    def analyze(self, draws: int = DRAWS, overrule: int | None = OVERRULED_IMAGES, seed: int = 0) -> Evidence:
        """Measures the routing on validation, and writes routing.json, example images and the report."""
        with temporary_folder(self.run.path):  # before all the work
            pass
        loader, sequences = self.problem.deciding(self.model), self.problem.sequences
        evidence = analyze(self.model, loader, draws, overrule, seed, progress=True, sequences=sequences)
        run_folder.write_json(self.run.path / run_folder.ROUTING, evidence.to_dict())
        self._write_examples(evidence)
        write_run_report(self.run.path)
        return evidence

    def prune(
        self, out: str | Path, tolerance: float = PRUNE_TOLERANCE, experts: bool = False, recover: int = 0,
        recover_lr: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Writes a new run with the pruned model and a receipt; analyses first where that was not done.

        Args:
            out: the folder to make.
            tolerance, experts: as `vimoe.prune`.
            recover: epochs to train the pruned model on, with the settings of the run but for `recover_lr`.
            recover_lr: by default a tenth of the run's.

        Returns:
            What summary.json of the new run holds, and the paths of the run and its report.
        """
        run_folder.check_new(out)
        check_outside("--out", out, self.run.settings.data.path)
        recovery = self._recovery(recover, recover_lr)
        with run_folder.made_whole(out) as folder:
            values = self._prune(folder, tolerance, experts, recovery)
        return {**values, "out": str(out), "report": str(write_run_report(Path(out)))}

    def _prune(self, folder: Path, tolerance: float, experts: bool, recovery: TrainConfig | None) -> dict[str, Any]:
        """Prunes, and writes the files of the new run into a folder."""
        known = self.run.path / run_folder.ROUTING
        evidence = _read_evidence(known) if known.exists() else self.analyze()
        pruned = self._fresh_model()
        loader, sequences = self.problem.deciding(self.model), self.problem.sequences
        done = prune(pruned, evidence, loader, tolerance, experts, progress=True, sequences=sequences)
        models, epochs = {"before": self.model, "after": pruned}, 0
        if recovery:
            models["recovered"] = copy.deepcopy(pruned)
            names = [layer.name for layer in evidence.layers]
            task = self.problem.task(models["recovered"], recovery, names)
            try:
                recovered = train(models["recovered"], task, recovery, folder, names)
            except Stopped as stopped:  # its checkpoint goes with the folder
                raise KeyboardInterrupt(stopped.status - 128) from None
            epochs = recovered["epochs"]  # fewer where it stopped early
            checkpoint.remove(folder)
        split, samples = self.reported
        timed = self.problem.deciding(self.model) if self.segments else None
        measured = receipts(
            list(models.values()),
            self._loader(samples),
            self.problem.evaluate,
            timed,
            f"scoring on {split} for the receipt",
        )
        left = moe_layers(pruned)
        summary = {
            **done.to_dict(),
            "kept": [{**asdict(step), "experts": left[step.layer].config.num_experts} for step in done.kept],
            "recovery_epochs": epochs,
            "recovery_lr": recovery.lr if recovery else None,
            "validation_images": len(self.problem.data.val),
            "split": split,
            **{when: receipt.to_dict() for when, receipt in zip(models, measured, strict=True)},
            "versions": run_folder.versions(),
        }
        run_folder.write_settings(folder, self.run.settings)
        run_folder.write_validation(folder, self.problem.split_off)
        final = models.get("recovered", pruned)
        save(final, folder / run_folder.MODEL, label_names=label_names(final))
        run_folder.write_json(folder / run_folder.ROUTING_BEFORE, evidence.to_dict())
        for sheet in (self.run.path / run_folder.FIGURES).glob(run_folder.EXAMPLES.format("*")):
            (folder / run_folder.FIGURES).mkdir(exist_ok=True)
            write_bytes(folder / run_folder.FIGURES / sheet.name, sheet.read_bytes())
        run_folder.write_json(folder / run_folder.SUMMARY, {"schema": run_folder.SCHEMA, "command": "prune", **summary})
        return {**summary, "text": str(done)}

    def _write_examples(self, evidence: Evidence) -> None:
        """A sheet for each layer: the images that each expert got most of, as figures/examples-LAYER.png."""
        if self.segments:  # what an expert got there are patches; the report shows them in their images
            return
        folder = self.run.path / run_folder.FIGURES
        folder.mkdir(exist_ok=True)
        for layer in evidence.layers:
            rows = {
                f"expert {expert}": [self._picture(place, evidence.classes) for place in layer.examples[expert]]
                for expert in layer.expert_order
                if layer.examples[expert]
            }
            write_bytes(folder / run_folder.EXAMPLES.format(layer.name), png(contact_sheet(rows)))

    def _picture(self, place: int, classes: tuple[str, ...]) -> tuple[Any, str]:
        sample: Any = self.problem.data.val[place]
        source, label = sample
        image = open_image(source).copy()
        image.thumbnail((96, 96))
        return image, classes[label]

    def _recovery(self, epochs: int, lr: float | None) -> TrainConfig | None:
        if epochs < 0:
            raise ConfigError(f"recover={epochs}: expected a number of epochs, 0 for none")
        config = self.run.settings.train
        lr = config.lr / 10 if lr is None else lr
        if not epochs:
            return None
        config = replace(config, warmup_epochs=0, router_warmup_epochs=0)  # what it starts from is trained
        return replace(config, epochs=epochs, lr=lr, min_lr=min(config.min_lr, lr))

    def _fresh_model(self) -> nn.Module:
        return load(self.run.model, Process().device)

    def _loader(self, samples: tuple[Any, ...]) -> DataLoader:
        return self.problem.loader(self.model, samples)


def _read_evidence(path: Path) -> Evidence:
    try:
        return Evidence.from_dict(json.loads(read_text(path)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{path} cannot be read ({error}): expected what analyze wrote; run analyze again") from error
