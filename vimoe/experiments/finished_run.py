"""A finished run, opened again: its model and its images, scored, analysed and pruned."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vimoe import run_folder
from vimoe.analysis.analyze import analyze
from vimoe.analysis.diagnose import check_exchangeable, check_overrule, diagnose
from vimoe.analysis.diagnosis import Diagnosis
from vimoe.analysis.evidence import Evidence
from vimoe.analysis.figures import png
from vimoe.analysis.pruning import check_experts, check_merge_all, images_per_second, prune, receipts
from vimoe.analysis.trust import Trust, fit_trust, see
from vimoe.config.analysis import DRAWS, OVERRULED_IMAGES, PRUNE_TOLERANCE
from vimoe.config.data import Inference
from vimoe.config.export import FORMATS
from vimoe.config.parallel import ParallelConfig
from vimoe.config.settings import check_reads
from vimoe.config.train import TrainConfig
from vimoe.data.loaders import preprocessing
from vimoe.errors import ConfigError, DataError, FolderError, Stopped
from vimoe.experiments.train import check_outside
from vimoe.files import read_text, temporary_folder, write_bytes
from vimoe.metrics.base import Batches, Score, metric_of
from vimoe.metrics.calibration import KeptLogits
from vimoe.models.export.folder import RECEIPT, export
from vimoe.models.export.program import image_size
from vimoe.models.interface import label_names
from vimoe.models.model_folder import load, save
from vimoe.moe.layer import moe_layers
from vimoe.process import Alone, Process, device
from vimoe.report.run_report import write_run_report
from vimoe.tasks.base import Roles, Scanned, facts_of, task_of
from vimoe.training import checkpoint
from vimoe.training.loop import train
from vimoe.training.parameter_groups import trained_modules
from vimoe.training.settle import settle

COMPARED = 24  # validation images that an exported model is compared on
TRUSTED = 20_000  # training images, at most, that familiarity is fitted on

logger = logging.getLogger(__name__)


class FinishedRun:
    """A run folder whose training is over, and all that can be done with it.

    Several processes may share the images of `score`, `predict` and `analyze`: each calls these, all get the results of
    one process to rounding, and the first alone logs and writes (masks of `predict` are written by the process that
    predicts them).

    Args:
        path: run folder.
        inference, flip_test: inference on whole images, as in `DataConfig`; by default the run's.
        process: this one of the processes that share the images; by default the only one.

    Raises:
        FolderError: if it is no run folder, or its training did not finish.
        ConfigError: if the run's task reads no such setting.
    """

    def __init__(
        self, path: str | Path, inference: Inference | None = None, flip_test: bool | None = None,
        process: Process | None = None,
    ) -> None:  # fmt: skip
        self.process = process or Alone()
        self.process.one_log()
        self.run = run_folder.open_run(path)
        settings = self.run.settings
        asked: dict[str, Any] = {"inference": inference, "flip_test": flip_test}
        given = {name: value for name, value in asked.items() if value is not None}
        for name, value in given.items():
            check_reads(settings.data.task, f"data.{name}", value)
        self.run = replace(self.run, settings=replace(settings, data=replace(settings.data, **given)))
        self.task = task_of(self.run.settings, self.process)

    @cached_property
    def model(self) -> nn.Module:
        """The trained model, on the GPU where there is one."""
        return self._fresh_model()

    @cached_property
    def data(self) -> Roles:
        """The images that it was trained on, with the validation split that decided then."""
        found: Roles = self.task.find(self.run.settings.data, label_names(self.model), self.run.validation())
        return found

    @property
    def reported(self) -> tuple[str, tuple[Any, ...]]:
        """The name and samples of the role that results are reported on: test, or validation where there is no test."""
        return ("test", self.data.test) if self.data.test else ("validation", self.data.val)

    def score(self, path: str | None = None, contours: bool = False) -> tuple[str, Score, dict[str, Any]]:
        """Return the name of the scored images, the model's score on them, and facts beside it.

        A run that was trained on cached features scores the images of `reported` on theirs: {"features": {"before":
        first block that runs}}. The figures are those on images up to rounding in float16; a path gives those.

        For a metric that `calibrates`, facts also are "temperature", fitted on the run's validation (one more pass if
        that is not reported itself), "loss_at_temperature" and "ece_at_temperature" of the scored images. A run whose
        own images cannot be read any more scores those of a path without them.

        Args:
            path: data path of other images; by default those of `reported`.
            contours: add J and F of masks (`vimoe.metrics.contours`).
        """
        loader: Batches
        if path is not None:
            split, loader = self.task.elsewhere(self.model, path)
        else:
            split, samples = self.reported
            self.task.check_scored(self.data, split, samples)
            loader = self.task.scored(self.model, self.data, samples)
        metric = metric_of(self.model, self.task.metric)
        kept = KeptLogits(metric, self.process) if metric.calibrates else None
        counts = metric.contours() if contours else kept
        score = self.task.evaluate(self.model, loader, "evaluating", counts, self.process)
        calibration = self._calibration(kept, path is not None) if kept else {}
        return split, score, {**facts_of(loader), **calibration}

    def predict(self, files: Sequence[Path], out: str | Path | None = None, top: int = 5) -> list[dict[str, Any]]:
        """Return the predictions for image files, as `vimoe.tasks.base.Task.predict`; with scores once `trust` ran."""
        fitted = self.run.path / run_folder.TRUST_WEIGHTS
        scores = {"trust": Trust.load(fitted)} if fitted.exists() else {}
        return self.task.predict(self.model, files, None if out is None else Path(out), top, **scores)

    def trust(self) -> dict[str, Any]:
        """Fit what says how far to trust a prediction, and write it into the run, where `predict` finds it.

        Familiarity is fitted on training images as they are evaluated, without augmentation: on `TRUSTED` of them at
        most, at equal distances. All the rest is of validation; see `vimoe.analysis.trust.fit_trust`.

        Returns:
            Content of trust.json.

        Raises:
            ConfigError: if the run's images do not have one class each.
        """
        task, data = self.task, self.run.settings.data
        if not task.trusts:
            raise ConfigError(f"a run of data.task={data.task!r}: expected 'classification'; name another run")
        self._try_to_write()
        train = self.data.train[:: -(-len(self.data.train) // TRUSTED)]
        seen = [
            see(self.model, task.scored(self.model, self.data, samples), f"looking at {what}", task.metric)
            for what, samples in (("train", train), ("validation", self.data.val))
        ]
        scores, facts = fit_trust(seen[0].features, seen[1], self.run.settings.train.seed)
        scores.save(self.run.path / run_folder.TRUST_WEIGHTS)
        facts = {"schema": run_folder.SCHEMA, "command": "trust", **facts}
        run_folder.write_json(self.run.path / run_folder.TRUST, facts)
        return facts

    def analyze(
        self, draws: int = DRAWS, overrule: int | None = OVERRULED_IMAGES, seed: int = 0, probe: bool = False
    ) -> Evidence:
        """Measure the routing on validation, and write routing.json, example images and the report."""
        self.process.once(self._try_to_write)
        loader, sequences = self.task.validation(self.model, self.data), self.task.sequences(self.data)
        evidence = analyze(
            self.model, loader, draws, overrule, seed, True, sequences, self.task.metric, None, probe, self.process
        )
        self.process.once(self._write_evidence, evidence)
        return evidence

    def diagnose(self, draws: int | None = None, overrule: int | None = OVERRULED_IMAGES, seed: int = 0) -> Diagnosis:
        """Say whether the routes matter and what to try next; write diagnosis.json and the report.

        Args:
            draws: permutations of a new analysis; by default the run's analysis is read, and made if there is none.
            overrule, seed: arguments of `vimoe.diagnose`, and of the analysis that is made.
        """
        check_overrule(overrule)
        check_exchangeable(self.model)  # before an analysis of minutes
        self._try_to_write()
        known = self.run.path / run_folder.ROUTING
        if draws is None and known.exists():
            evidence = _read_evidence(known)
        else:
            evidence = self.analyze(DRAWS if draws is None else draws, overrule, seed)
        loader, sequences = self.task.validation(self.model, self.data), self.task.sequences(self.data)
        found = diagnose(self.model, loader, evidence, overrule=overrule, seed=seed, progress=True, sequences=sequences)
        run_folder.write_json(self.run.path / run_folder.DIAGNOSIS, found.to_dict())
        write_run_report(self.run.path)
        return found

    def prune(
        self, out: str | Path, tolerance: float = PRUNE_TOLERANCE, experts: bool = False, recover: int = 0,
        recover_lr: float | None = None, merge_all: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Write a new run with the pruned model and a receipt. Analyses first where that was not done.

        Args:
            out: folder to make.
            tolerance, experts, merge_all: arguments of `vimoe.prune`.
            recover: number of epochs to train the pruned model, with the settings of the run.
            recover_lr: learning rate of these epochs; by default a tenth of the run's.

        Returns:
            Content of the new run's summary.json, and the paths of the run and its report.
        """
        run_folder.check_new(out)
        check_outside("--out", out, self.run.settings.data.path)
        recovery = self._recovery(recover, recover_lr)
        if merge_all:
            check_merge_all(self.model, tolerance, experts)  # before an analysis of minutes
        if experts:
            check_experts(self.model)
        options = {"tolerance": tolerance, "experts": experts, "merge_all": merge_all}
        with run_folder.made_whole(out) as folder:
            values = self._prune(folder, options, recovery)
        return {**values, "out": str(out), "report": str(write_run_report(Path(out)))}

    def export(self, out: str | Path | None = None, format: str = "onnx", int8: bool = False) -> dict[str, Any]:
        """Write a folder with the model as a file that runs without vimoe; see `vimoe.export`.

        It is compared on validation images, where these can be read. With int8 weights, both files are scored on the
        images of `reported`, and timed in turns on one image.

        Args:
            out: folder to make; by default one beside the run's model folder, named as the format.
            format, int8: arguments of `vimoe.export`.

        Returns:
            Content of export.json, and the path of the folder.

        Raises:
            ConfigError: if int8 weights of a segmenter would have to be scored on whole images.
        """
        FORMATS.find(format)().check(format, int8)
        data = self.run.settings.data
        path = self.run.path / format if out is None else Path(out)
        run_folder.check_new(path)
        check_outside("--out", path, data.path)
        if int8 and data.inference == "whole":
            raise ConfigError(
                "int8=True with data.inference='whole': expected 'slide', since an exported segmenter takes images of "
                "one size; set it"
            )
        export(
            self.model,
            path,
            format=format,
            int8=int8,
            images=self._few_images(),
            measure=self._measure_exported if int8 else None,
        )
        return {**json.loads(read_text(path / RECEIPT)), "out": str(path)}

    def _try_to_write(self) -> None:
        """Raise an error for a run folder that nothing can be written into, before all the work."""
        with temporary_folder(self.run.path):
            pass

    def _write_evidence(self, evidence: Evidence) -> None:
        """Write routing.json, example images and the report."""
        run_folder.write_json(self.run.path / run_folder.ROUTING, evidence.to_dict())
        self._write_examples(evidence)
        write_run_report(self.run.path)

    def _few_images(self) -> Tensor | None:
        """Return validation images of all classes, normalised; None where none can be read."""
        try:
            val = self.data.val
            spread = val[:: max(1, len(val) // COMPARED)][:COMPARED]
            images: Tensor = torch.cat([batch for batch, _ in self.task.one_size(self.model, self.data, spread)])
        except DataError as error:
            logger.info("compared on random images alone: %s", error)
            return None
        return images if images.shape[1:] == image_size(self.model) else None

    def _measure_exported(self, models: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return score and speed of exported models by their names."""
        split, samples = self.reported
        loader = self.task.loader(self.model, self.data, samples)
        scores = {name: self.task.evaluate(each, loader, f"scoring {name}") for name, each in models.items()}
        speeds = images_per_second(list(models.values()), torch.zeros(1, *image_size(self.model)))
        return {
            "split": split,
            "scores": {name: score.to_dict() for name, score in scores.items()},
            "images_per_second": dict(zip(models, speeds, strict=True)),
        }

    def _prune(self, folder: Path, options: dict[str, Any], recovery: TrainConfig | None) -> dict[str, Any]:
        """Prune, and write the files of the new run into a folder."""
        known = self.run.path / run_folder.ROUTING
        scanned = self.task.scan(self.data) if recovery else None  # a damaged image is told before all the work
        evidence = _read_evidence(known) if known.exists() else self.analyze()
        pruned = self._fresh_model()
        loader, sequences = self.task.validation(self.model, self.data), self.task.sequences(self.data)
        done = prune(pruned, evidence, loader, **options, progress=True, sequences=sequences)
        models, epochs = {"before": self.model, "after": pruned}, 0
        if recovery and scanned:
            models["recovered"] = copy.deepcopy(pruned)
            epochs = self._recover(models["recovered"], scanned, evidence, recovery, folder)
        split, samples = self.reported
        scored = self.task.scored(self.model, self.data, samples)  # all these models have its trunk
        measured = receipts(
            list(models.values()),
            scored,
            self.task.evaluate,
            self.task.timed(self.model, self.data, samples),
            f"scoring on {split} for the receipt",
        )
        left = moe_layers(pruned)
        summary = {
            **done.to_dict(),
            "kept": [{**asdict(step), "experts": left[step.layer].config.num_experts} for step in done.kept],
            "recovery_epochs": epochs,
            "recovery_lr": recovery.lr if recovery else None,
            "validation_images": len(self.data.val),
            "split": split,
            **facts_of(scored),
            **{when: receipt.to_dict() for when, receipt in zip(models, measured, strict=True)},
            "versions": run_folder.versions(),
        }
        run_folder.write_settings(folder, self.run.settings)
        run_folder.write_validation(folder, self.data.names(self.data.val) if self.data.split_off else [])
        final = models.get("recovered", pruned)
        save(final, folder / run_folder.MODEL, label_names=label_names(final))
        run_folder.write_json(folder / run_folder.ROUTING_BEFORE, evidence.to_dict())
        for sheet in (self.run.path / run_folder.FIGURES).glob(run_folder.EXAMPLES.format("*")):
            (folder / run_folder.FIGURES).mkdir(exist_ok=True)
            write_bytes(folder / run_folder.FIGURES / sheet.name, sheet.read_bytes())
        run_folder.write_json(folder / run_folder.SUMMARY, {"schema": run_folder.SCHEMA, "command": "prune", **summary})
        return {**summary, "text": str(done)}

    def _recover(
        self, model: nn.Module, scanned: Scanned, evidence: Evidence, config: TrainConfig, folder: Path
    ) -> int:
        """Train a pruned model in a folder, and return the number of epochs; fewer where it stopped early."""
        layers, prepared = [layer.name for layer in evidence.layers], preprocessing(model, self.run.settings.data)
        only_experts = config.trained.word == "experts" and not moe_layers(model)  # of which none is left
        trained = [] if only_experts else trained_modules(model, config.trained, layers)
        job = task_of(replace(self.run.settings, train=config)).job(model, self.data, scanned, prepared, trained)
        try:
            recovered = train(model, job, config, folder, trained)
        except Stopped as stopped:  # its checkpoint goes with the folder
            raise KeyboardInterrupt(stopped.status - 128) from None
        checkpoint.remove(folder)
        epochs: int = recovered["epochs"]
        return epochs

    def _calibration(self, scored: KeptLogits, elsewhere: bool) -> dict[str, float]:
        """Return the temperature of the run's validation, and what it makes of the scored images, as `KeptLogits.at`.

        Args:
            scored: logits of the scored images.
            elsewhere: True if they are not the run's own; then an unreadable validation leaves nothing to return.
        """
        decides, why = scored, ""
        try:
            if elsewhere or self.data.test:
                decides = KeptLogits(scored.metric, self.process)
                own = self.task.scored(self.model, self.data, self.data.val)
                self.task.evaluate(self.model, own, "calibrating", decides)  # of this process's share alone
        except DataError as error:
            if not elsewhere:
                raise
            why = str(error)
        if told := next(filter(None, self.process.gather(why)), ""):
            logger.info("without a temperature, which the run's own validation decides: %s", told)
            return {}
        if (temperature := decides.temperature()) is None:
            logger.info("without a temperature: all validation images are right, so the lower it is, the better")
            return {}
        return scored.at(temperature)

    def _write_examples(self, evidence: Evidence) -> None:
        """Write the contact sheet of each layer as figures/examples-LAYER.png."""
        folder = self.run.path / run_folder.FIGURES
        for layer, sheet in self.task.examples(self.model, self.data, evidence).items():
            folder.mkdir(exist_ok=True)
            write_bytes(folder / run_folder.EXAMPLES.format(layer), png(sheet))

    def _recovery(self, epochs: int, lr: float | None) -> TrainConfig | None:
        if epochs < 0:
            raise ConfigError(f"recover={epochs}: expected a number of epochs, 0 for none")
        if epochs and (tasks := self.run.settings.data.tasks):
            raise ConfigError(
                f"recover={epochs} of a run with data.tasks={tasks!r}: expected 0, since it would learn all tasks "
                f"at once"
            )
        config = self.run.settings.train.trainings[-1]
        lr = config.lr / 10 if lr is None else lr
        if not epochs:
            return None
        stopped = config.router_freeze_epochs or config.router_freeze_margin
        frozen = float(config.router_frozen == 1 or stopped)  # for good, or no more: what it starts from is trained
        config = replace(config, warmup_epochs=0, router_warmup_epochs=0, router_frozen=frozen)
        config = replace(config, router_freeze_epochs=0, router_freeze_margin=0.0)
        # one process prunes and recovers, however many have trained; what cannot be trained here is told at once
        config = replace(config, epochs=epochs, lr=lr, min_lr=min(config.min_lr, lr), parallel=ParallelConfig())
        return settle(config, len(self.data.train), self.model)

    def _fresh_model(self) -> nn.Module:
        return load(self.run.model, device(), self.run.settings.model.read)


def _read_evidence(path: Path) -> Evidence:
    try:
        return Evidence.from_dict(json.loads(read_text(path)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{path} cannot be read ({error}): expected what analyze wrote; run analyze again") from error
