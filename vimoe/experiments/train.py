"""One training from settings to a finished run folder: what `vimoe train`, the demo and every control go through."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from vimoe import run_folder
from vimoe.analysis.figures import png
from vimoe.config.settings import Settings, flat
from vimoe.data.data_path import absolute, local
from vimoe.data.loaders import preprocessing
from vimoe.data.scan import Scan
from vimoe.data.scene_scan import SceneScan
from vimoe.data.splits import is_split
from vimoe.errors import ConfigError
from vimoe.files import discard_leftovers, temporary_folder, write_bytes
from vimoe.models.create import check_name, dense_segmenter
from vimoe.models.model_folder import save
from vimoe.models.upcycling import convert, sites
from vimoe.report.run_report import write_run_report
from vimoe.tasks.registry import Problem, problem_of
from vimoe.training import checkpoint
from vimoe.training.loop import check, settle, train

logger = logging.getLogger(__name__)


def run_training(settings: Settings, out: str | Path) -> dict[str, Any]:
    """Builds the model, upcycles it, trains it, and writes everything into a new run folder.

    Returns:
        What summary.json holds, and the paths of the run and its report.

    Raises:
        VimoeError: for a mistake in the settings, the data or the folder, before anything is trained.
    """
    check_name(settings.model, segmentation=settings.data.task == "segmentation")
    run_folder.check_new(out)
    check_outside("--out", out, settings.data.path)
    problem = problem_of(settings)
    sketch = _sketch(problem)
    settings.moe.selection.select(sites(sketch))
    settings = replace(settings, train=settle(settings.train, len(problem.data.train), sketch))
    problem.settings = settings
    check(settings.train, len(problem.data.train))
    model, converted = _model(problem)
    problem.check(model, converted)
    scanned = problem.scan()
    folder = run_folder.new_run(out)
    with run_folder.locked(folder):
        discard_leftovers(folder)  # of one that was killed before it began
        checkpoint.check_space(folder, model, bool(settings.train.ema_decay))
        with temporary_folder(folder) as proof:  # what could not be saved should not be trained
            _save(problem, model, proof / run_folder.MODEL)
        data = replace(settings.data, path=absolute(settings.data.path))
        return _train(problem, scanned, model, converted, folder, replace(settings, data=data))


def resume_training(path: str | Path) -> dict[str, Any]:
    """Goes on with a training that was killed or stopped, from its last checkpoint, as `run_training` would have.

    Raises:
        FolderError: where the folder is no run, its training is finished, going on in another process, or began with
            other settings.
    """
    run = run_folder.open_unfinished(path)
    with run_folder.locked(run.path):
        stored = checkpoint.read(run.path, mapped=True)
        assert stored is not None
        checkpoint.check_settings(run.path, stored["settings"], flat(run.settings))
        discard_leftovers(run.path, *(run.path / name for name in (run_folder.CHECKPOINT.parent, run_folder.FIGURES)))
        model_settings = replace(run.settings.model, pretrained=False)  # the checkpoint has the weights
        problem = problem_of(replace(run.settings, model=model_settings), validation=run.validation())
        model, converted = _model(problem)
        if run.settings.data.cache == "features":
            model.load_state_dict(stored["model"])  # whose trunk the features are of
        del stored
        return _train(problem, problem.scan(), model, converted, run.path, run.settings)


def check_outside(option: str, out: str | Path, data: str | Path) -> None:
    """Raise ConfigError where `out` lies in the folder `data`, whose images its pictures would be taken for."""
    folder, place = local(str(data)), Path(out).resolve()
    if folder is None or not folder.is_dir():
        return
    roles = [inside for inside in folder.iterdir() if inside.is_dir() and is_split(inside.name)]
    linked = [inside for each in (folder, *roles) for inside in each.iterdir() if inside.is_symlink()]
    if any(place.is_relative_to(each.resolve()) for each in (folder, *linked)):
        raise ConfigError(
            f"{option} {out} lies in {data}, where its pictures would be taken for data: expected another place; name "
            f"one beside it"
        )


def _sketch(problem: Problem) -> nn.Module:
    """The dense model without its weights, to see what is wrong before they are downloaded and loaded."""
    config = problem.settings.model
    if dense_segmenter(config):  # a folder, read at once
        return problem.dense_model()
    light = copy.copy(problem)  # whose data are found already
    light.settings = replace(problem.settings, model=replace(config, pretrained=False))
    with torch.device("meta"):
        return light.dense_model()


def _model(problem: Problem) -> tuple[nn.Module, list[str]]:
    """Return the upcycled model, and the names of the FFNs that were converted."""
    set_seed(problem.settings.train.seed)
    model = problem.dense_model()
    return model, convert(model, problem.settings.moe)


def _save(problem: Problem, model: nn.Module, path: Path) -> None:
    prepared = preprocessing(model, problem.settings.data)
    save(model, path, label_names=problem.data.classes, preprocessing=prepared, overwrite=True)


def _train(
    problem: Problem,
    scanned: Scan | SceneScan,
    model: nn.Module,
    converted: Sequence[str],
    folder: Path,
    told: Settings,
) -> dict[str, Any]:
    """Trains in a run folder, which notes what it was told, and finishes it."""
    settings = problem.settings
    logger.info("%s", scanned)
    task = problem.task(model, settings.train, converted)
    run_folder.write_validation(folder, problem.split_off)
    run_folder.write_settings(folder, told)
    summary = train(model, task, settings.train, folder, converted, flat(told))
    _save(problem, model, folder / run_folder.MODEL)
    if settings.data.cache == "features":  # what was saved takes images
        summary["val"] = problem.evaluate(model, problem.deciding(model)).to_dict()
    summary = {
        **summary,
        **task.facts,
        **problem.limits(model),
        "classes": list(problem.data.classes),
        "scan": scanned.to_dict(),
        "versions": run_folder.versions(),
    }
    for name, figure in problem.figures(model).items():
        (folder / run_folder.FIGURES).mkdir(exist_ok=True)
        write_bytes(folder / run_folder.FIGURES / name, png(figure))
    run_folder.write_json(folder / run_folder.SUMMARY, {"schema": run_folder.SCHEMA, "command": "train", **summary})
    checkpoint.remove(folder)
    report = write_run_report(folder)
    return {**summary, "out": str(folder), "report": str(report)}
