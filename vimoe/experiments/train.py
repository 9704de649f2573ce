"""One training, from settings to a finished run folder: the path of `vimoe train`, the demo and every control."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn

from vimoe import run_folder
from vimoe.analysis.figures import png
from vimoe.config.moe import ROUTERS
from vimoe.config.settings import Settings, flat
from vimoe.data.data_path import absolute, local
from vimoe.data.loaders import preprocessing
from vimoe.data.order import mix
from vimoe.data.splits import is_split
from vimoe.data.tasks import classes_of
from vimoe.errors import ConfigError, DataError
from vimoe.experiments.task_sequence import TaskSequence
from vimoe.files import discard_leftovers, temporary_folder, write_bytes
from vimoe.metrics.registry import METRICS
from vimoe.models.calibration import check_count, no_classes
from vimoe.models.continued import own_layers, with_own_layers
from vimoe.models.cost import meta_copy
from vimoe.models.model_folder import save
from vimoe.models.names import check_name
from vimoe.models.upcycling import build_layers, convert, needs_images
from vimoe.process import Process
from vimoe.report.run_report import write_run_report
from vimoe.tasks.base import Roles, Scanned, Task, task_class
from vimoe.training import checkpoint, fuse
from vimoe.training.loop import train
from vimoe.training.parameter_groups import trained_modules
from vimoe.training.settle import check_evaluated, check_parallel, check_shares, settle

logger = logging.getLogger(__name__)


def run_training(settings: Settings, out: str | Path) -> dict[str, Any]:
    """Build the model, upcycle it, train it, and write everything into a new run folder.

    Returns:
        Content of summary.json, and the paths of the run and its report.

    Raises:
        VimoeError: if the settings, the data or the folder are mistaken, before anything is trained.
    """
    process = Process()
    process.one_log()
    check_parallel(settings.train, process)
    check_name(settings.model, segmentation=True)
    process.once(run_folder.check_new, out)  # before another process makes it
    check_outside("--out", out, settings.data.path)
    settings = with_own_layers(settings)
    kind = task_class(settings)
    data = process.first_then_all(kind.find, settings.data)  # the others find what it has opened in the cache
    check_evaluated(len(data.val), settings.train, process)
    _check_start(kind, data, settings)
    if settings.model.pretrained and not settings.model.name.startswith("local-dir:"):
        settings = _check_architecture(kind, data, settings)  # before its weights are downloaded
    set_seed(settings.train.seed)
    model = process.first_then_all(kind.dense_model, settings.model, data)  # which may download weights
    converted, scanned = _convert(kind, model, data, settings.trainings[0])
    fuse.warn_of_copies(model)
    stages = list(_stages(model, converted, settings))
    settings = replace(settings, train=settle(settings.train, _images(kind, data, settings), stages[-1][0]))
    task, prepared = kind(settings), preprocessing(model, settings.data)
    _check_stages(kind, settings, stages, prepared)
    scanned = scanned or process.once(task.scan, data)
    folder = process.once(run_folder.new_run, out)
    with ExitStack() as held:
        process.once(held.enter_context, run_folder.locked(folder))
        process.once(discard_leftovers, folder)  # of a training that was killed before it began
        process.once(checkpoint.check_space, folder, stages[-1][0], bool(settings.train.ema_decay))
        process.once(_try_to_save, model, data, prepared, folder)
        return _train(task, model, data, scanned, prepared, converted, folder, _from_anywhere(settings))


def check_training(settings: Settings, data: Roles | None = None) -> Roles:
    """Raise VimoeError for settings that contradict one another, their images or the model; train nothing.

    No weight is read, and no image is opened but for `data.skip_unreadable`, so it takes a second.

    Args:
        settings: settings of a training.
        data: images that they name, if they have been listed.

    Returns:
        The listed images.
    """
    check_name(settings.model, segmentation=True)
    settings, kind = with_own_layers(settings), task_class(settings)
    found: Roles = kind.find(settings.data) if data is None else data
    _check_start(kind, found, settings)
    _check_architecture(kind, found, settings)
    return found


def resume_training(path: str | Path) -> dict[str, Any]:
    """Go on with a training that was killed or stopped, from its last checkpoint, as `run_training` would have.

    Raises:
        FolderError: if the folder is no run, its training is finished, going on in another process, or began with
            other settings.
    """
    process = Process()
    process.one_log()
    run = process.once(run_folder.open_unfinished, path)  # before another process locks it
    settings = run.settings
    with ExitStack() as held:
        process.once(held.enter_context, run_folder.locked(run.path))
        stored = checkpoint.read(run.path, mapped=True)
        checkpoint.check_shared(run.path, stored is not None, process)
        assert stored is not None, "the first process has seen it"
        checkpoint.check_settings(run.path, stored["settings"], flat(settings))
        check_shares(settings.train, process)
        process.once(
            discard_leftovers,
            run.path,
            *(run.path / name for name in (run_folder.CHECKPOINT.parent, run_folder.FIGURES)),
        )
        kind = task_class(settings)
        data = process.first_then_all(partial(kind.find, settings.data, validation=run.validation()))
        check_evaluated(len(data.val), settings.train, process)
        random = replace(settings.model, pretrained=False)  # the checkpoint has the weights
        set_seed(settings.train.seed)
        model = kind.dense_model(random, data)
        number = stored.get("stage") or 0
        converted = _made(model, settings.trainings[number], build_layers)
        checkpoint.load_weights(run.path, stored, model)  # cached features are of its trunk
        del stored
        task, prepared = kind(settings), preprocessing(model, settings.data)
        scanned = process.once(task.scan, data)
        return _train(task, model, data, scanned, prepared, converted, run.path, settings, number)


def _from_anywhere(settings: Settings) -> Settings:
    """Return settings whose paths mean the same from any working directory."""
    name, prompts = settings.model.name, settings.model.prompts
    kind, _, folder = name.partition(":")
    if kind in ("local-dir", "transformers") and Path(folder).is_dir():  # transformers' may be a name on the hub
        name = f"{kind}:{Path(folder).resolve()}"
    return replace(
        settings,
        data=replace(settings.data, path=absolute(settings.data.path)),
        model=replace(settings.model, name=name, prompts=prompts and str(Path(prompts).resolve())),
    )


def check_outside(option: str, out: str | Path, data: str | Path) -> None:
    """Raise ConfigError for `out` inside the folder `data`, whose images its pictures would be taken for."""
    folder, place = local(str(data)), Path(os.path.realpath(out))
    if folder is None or not folder.is_dir():
        return
    roles = [inside for inside in folder.iterdir() if inside.is_dir() and is_split(inside.name)]
    linked = [inside for each in (folder, *roles) for inside in each.iterdir() if inside.is_symlink()]
    # realpath, because a link to itself is an error for Path.resolve
    if any(place.is_relative_to(os.path.realpath(each)) for each in (folder, *linked)):
        raise ConfigError(
            f"{option} {out} lies in {data}, where its pictures would be taken for data: expected another place; name "
            f"one beside it"
        )


def _check_start(kind: type[Task[Any]], data: Roles, settings: Settings) -> None:
    """Raise VimoeError if these images can start no such experts or router, before any is opened.

    Stages before MoE layers come in would be trained for nothing.
    """
    moe = settings.moe
    if moe.layers == "none" or not moe.num_experts or not _starts_from_images(settings):
        return
    first = kind(settings).divided(data)[0]
    check_count(min(moe.calibration_images, len(first.train)), moe.num_experts)
    router = ROUTERS.find(moe.router)
    if router.supervised and settings.data.tasks and len(classes_of(first)) < len(data.classes):
        raise ConfigError(
            f"data.tasks={settings.data.tasks!r} with moe.router={moe.router!r}: expected a router that no classes "
            f"train, since the first task does not have them all; use another, such as 'centroids'"
        )
    if router.supervised:
        if METRICS.find(kind.metric).by_patch:
            raise no_classes(moe.router)
        router.check_classes(moe, len(data.classes))


def _check_architecture(kind: type[Task[Any]], data: Roles, settings: Settings) -> Settings:
    """Return settings that are settled for an architecture, of which no weight is there.

    Raises:
        VimoeError: if its layers cannot be converted, or settings contradict it or one another.
    """
    with torch.device("meta"):
        architecture = kind.dense_model(replace(settings.model, pretrained=False), data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model with weights warns
            converted = _made(architecture, settings.trainings[0], build_layers)
    stages = list(_stages(architecture, converted, settings))
    settled = replace(settings, train=settle(settings.train, _images(kind, data, settings), stages[-1][0]))
    _check_stages(kind, settled, stages, preprocessing(architecture, settings.data))
    return settled


def _check_stages(
    kind: type[Task[Any]], settings: Settings, stages: Sequence[tuple[nn.Module, list[str] | None]],
    prepared: dict[str, Any],
) -> None:  # fmt: skip
    """Raise VimoeError for a stage whose settings contradict its model."""
    for stage, (model, trained) in zip(settings.trainings, stages, strict=True):
        kind(stage).check(model, prepared, trained)


def _images(kind: type[Task[Any]], data: Roles, settings: Settings) -> int:
    """Return the number of training images, of the smallest task where there are several."""
    return min(len(part.train) for part in kind(settings).divided(data))


class CalibrationImages:
    """Batches of training images that experts or routers start from (`vimoe.models.upcycling.convert`), of one size.

    Iteration opens all images of the data before the first batch, as each training does before it begins.

    Attributes:
        scanned: what was found by opening them; None before.

    Args:
        task: task, of which `one_size` gives the batches.
        model: dense model, on its device.
        data: images, of which those of train (of the first task) are taken: `moe.calibration_images` of them, drawn by
            `train.seed`.
        scanned: what was found, if they have been opened.
    """

    def __init__(self, task: Task[Any], model: nn.Module, data: Roles, scanned: Scanned | None = None) -> None:
        train = task.divided(data)[0].train
        count = min(task.settings.moe.calibration_images, len(train))
        random = np.random.default_rng(task.settings.train.seed)
        chosen = np.sort(random.choice(len(train), count, replace=False))
        self.task, self.data, self.scanned = task, data, scanned
        self.batches = lambda: task.one_size(model, data, [train[i] for i in chosen])

    def __iter__(self) -> Iterator[Any]:
        if self.scanned is None:
            self.scanned = Process().once(self.task.scan, self.data)
        return iter(self.batches())


def _stages(
    model: nn.Module, converted: Sequence[str], settings: Settings
) -> Iterator[tuple[nn.Module, list[str] | None]]:
    """Yield the model of each stage, without weights once MoE layers have come in, and the names of what it trains.

    Raises:
        VimoeError: if layers cannot be converted when they come in, or nothing is there to be trained.
    """
    stages = settings.trainings
    for number, stage in enumerate(stages):
        if number and stage.moe != stages[number - 1].moe:
            model = meta_copy(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the model with weights warns
                converted = _made(model, stage, build_layers)
        yield model, trained_modules(model, stage.train.trained, converted)


def _convert(
    kind: type[Task[Any]], model: nn.Module, data: Roles, settings: Settings, scanned: Scanned | None = None
) -> tuple[list[str], Scanned | None]:
    """Upcycle a dense model; return the names of the converted FFNs, and what was found if images have been opened."""
    if not _starts_from_images(settings):
        return _made(model, settings, convert), scanned
    images = CalibrationImages(kind(settings), model.to(Process().device), data, scanned)
    return _made(model, settings, convert, images), images.scanned


def _starts_from_images(settings: Settings) -> bool:
    """Return True if new experts or routers are computed from images."""
    return needs_images(settings.moe) and not own_layers(settings.model)


def _made(model: nn.Module, settings: Settings, make: Callable[..., list[str]], *images: Any) -> list[str]:
    """Make the layers that the settings ask for, by `convert` or `build_layers`, and return their names.

    A model that is the content of a model folder with MoE layers keeps these.
    """
    with warnings.catch_warnings():
        if settings.train.fuse != "none":  # routers stay behind, so it matters to nobody that nothing trains them
            warnings.filterwarnings("ignore", "the only gate is always 1")
        names = list(own_layers(settings.model)) or make(model, settings.moe, *images)
    fuse.begin(model, settings.train)
    return names


def _try_to_save(model: nn.Module, data: Roles, prepared: dict[str, Any], folder: Path) -> None:
    """Save a model and discard it, because a model that could not be saved should not be trained."""
    with temporary_folder(folder) as proof:
        _save(model, data, prepared, proof / run_folder.MODEL)


def _save(model: nn.Module, data: Roles, prepared: dict[str, Any], path: Path) -> None:
    save(fuse.fused(model), path, label_names=data.classes, preprocessing=prepared, overwrite=True)


def _train(
    task: Task[Any], model: nn.Module, data: Roles, scanned: Scanned, prepared: dict[str, Any],
    converted: Sequence[str], folder: Path, noted: Settings, first: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Train in a run folder, which notes these settings, and write all that belongs to a finished run.

    Args:
        first: number of the stage to begin with; the model is as it was in it.
    """
    logger.info("%s", scanned)
    process, kind, settings = Process(), type(task), task.settings
    stages, parts = settings.trainings, task.divided(data)
    sequence = TaskSequence(task, parts, folder) if settings.data.tasks else None
    frozen = [p for p in model.parameters() if not p.requires_grad]  # whatever is trained
    for number in range(first, len(stages)):
        stage = stages[number]
        if number > first:
            for p in model.parameters():
                p.requires_grad_(all(p is not other for other in frozen))
            if stage.moe != stages[number - 1].moe:
                set_seed(mix(settings.train.seed, number))  # as it is in a training that was resumed
                converted, _ = _convert(kind, model, data, stage, scanned)
        if settings.train.stages:
            logger.info("stage %d of %d: %s", number + 1, len(stages), stage.train.train_only)
        trained = trained_modules(model, stage.train.trained, converted)
        # may compute features for minutes: the folder is ours
        job = kind(stage).job(model, parts[number] if sequence else data, scanned, prepared, trained)
        if len(set(process.gather((job.fingerprint, len(data.val))))) > 1:  # else each would wait for steps of others
            raise DataError(
                f"data.path={settings.data.path}: the processes found different images: expected the same in each; "
                f"check that all of them can read every image, or leave data.skip_unreadable out"
            )
        process.once(run_folder.write_validation, folder, data.names(data.val) if data.split_off else [])
        process.once(run_folder.write_settings, folder, noted)
        staged = number if settings.train.stages or sequence else None
        named = f"task {number + 1}" if sequence else None
        summary = train(model, job, stage.train, folder, trained, flat(noted), staged, named)
        if sequence:
            summary = process.once(sequence.measured, model, number, summary)
    process.once(_save, model, data, prepared, folder / run_folder.MODEL)
    summary |= fuse.facts(model)
    model = fuse.fused(model)
    summary = {
        **summary,
        **job.facts,
        **process.once(task.limits, model, data),
        "classes": list(data.classes),
        "scan": scanned.to_dict(),
        "versions": run_folder.versions(),
    }
    report = process.once(_finish, folder, summary, task, model, data)
    return {**summary, "out": str(folder), "report": str(report)}


def _finish(folder: Path, summary: dict[str, Any], task: Task[Any], model: nn.Module, data: Roles) -> Path:
    """Write the figures, summary and report of a finished run, forget its checkpoint, and return the report's path."""
    for name, figure in task.figures(model, data).items():
        (folder / run_folder.FIGURES).mkdir(exist_ok=True)
        write_bytes(folder / run_folder.FIGURES / name, png(figure))
    run_folder.write_json(folder / run_folder.SUMMARY, {"schema": run_folder.SCHEMA, "command": "train", **summary})
    checkpoint.remove(folder)
    return write_run_report(folder)
