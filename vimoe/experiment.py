"""One training from settings to a finished run folder: what `vimoe train`, the demo and every control go through."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from vimoe import checkpoint, runs
from vimoe.backbone import check_name, dense_segmenter
from vimoe.data import absolute
from vimoe.folder import save
from vimoe.loading import preprocessing
from vimoe.options import Settings
from vimoe.problem import Problem, problem_of
from vimoe.report import write_run_report
from vimoe.scan import Scan
from vimoe.segmentation.scene_scan import SceneScan
from vimoe.surgery import select
from vimoe.train import check, settle, train
from vimoe.upcycling import sites, upcycle

logger = logging.getLogger(__name__)


def run_training(settings: Settings, out: str | Path) -> dict[str, Any]:
    """Builds the model, upcycles it, trains it, and writes everything into a new run folder.

    Returns:
        What summary.json holds, and the paths of the run and its report.

    Raises:
        VimoeError: for a mistake in the settings, the data or the folder, before anything is trained.
    """
    check_name(settings.model, segmentation=settings.data.task == "segmentation")
    runs.check_new(out)
    problem = problem_of(settings)
    sketch = _sketch(problem)
    select(sites(sketch), settings.moe.layers)
    settings = replace(settings, train=settle(settings.train, len(problem.data.train), sketch))
    problem.settings = settings
    check(settings.train, len(problem.data.train))
    model = _model(problem)
    problem.check(model)
    scanned = problem.scan()
    folder = runs.new_run(out)
    with TemporaryDirectory(dir=folder, prefix=".proof-") as proof:  # what could not be saved should not be trained
        _save(problem, model, Path(proof) / runs.MODEL)
    absolute_path = replace(settings, data=replace(settings.data, path=absolute(settings.data.path)))
    runs.write_settings(folder, absolute_path)
    return _train(problem, scanned, model, folder)


def resume_training(path: str | Path) -> dict[str, Any]:
    """Goes on with a training that was killed or stopped, from its last checkpoint, as `run_training` would have.

    Raises:
        FolderError: where the folder is no run, or its training is finished.
    """
    run = runs.open_unfinished(path)
    settings = run.settings
    if checkpoint.exists(run.path):  # which has the weights
        settings = replace(settings, model=replace(settings.model, pretrained=False))
    problem = problem_of(settings, validation=run.validation())
    check(settings.train, len(problem.data.train))
    model = _model(problem)
    if settings.data.cache == "features" and (stored := checkpoint.read(run.path)):
        model.load_state_dict(stored["model"])  # whose trunk the features are of
    return _train(problem, problem.scan(), model, run.path)


def _sketch(problem: Problem) -> nn.Module:
    """The dense model without its weights, to see what is wrong before they are downloaded and loaded."""
    config = problem.settings.model
    if dense_segmenter(config):  # a folder, read at once
        return problem.dense_model()
    light = copy.copy(problem)  # whose data are found already
    light.settings = replace(problem.settings, model=replace(config, pretrained=False))
    with torch.device("meta"):
        return light.dense_model()


def _model(problem: Problem) -> nn.Module:
    set_seed(problem.settings.train.seed)
    return upcycle(problem.dense_model(), problem.settings.moe)


def _save(problem: Problem, model: nn.Module, path: Path) -> None:
    prepared = preprocessing(model, problem.settings.data)
    save(model, path, label_names=problem.data.classes, preprocessing=prepared, overwrite=True)


def _train(problem: Problem, scanned: Scan | SceneScan, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Trains in a run folder that has its settings, and finishes it."""
    settings = problem.settings
    write_validation(folder, problem)
    logger.info("%s", scanned)
    converted = [site.name for site in select(sites(model), settings.moe.layers)]
    task = problem.task(model, settings.train)
    summary = train(model, task, settings.train, folder, converted)
    _save(problem, model, folder / runs.MODEL)
    if settings.data.cache == "features":  # what was saved takes images
        summary["val"] = problem.evaluate(model, problem.deciding(model)).to_dict()
    summary = {
        **summary,
        **task.facts,
        **problem.limits(model),
        "classes": list(problem.data.classes),
        "scan": scanned.to_dict(),
        "versions": runs.versions(),
    }
    runs.write_json(folder / runs.SUMMARY, {"schema": runs.SCHEMA, "command": "train", **summary})
    for name, figure in problem.figures(model).items():
        (folder / runs.FIGURES).mkdir(exist_ok=True)
        figure.savefig(folder / runs.FIGURES / name, dpi=110)
    checkpoint.remove(folder)
    report = write_run_report(folder)
    return {**summary, "out": str(folder), "report": str(report)}


def write_validation(folder: Path, problem: Problem) -> None:
    """Lists the images that were split off train, so that every later verb decides on the same ones."""
    if names := problem.split_off:
        runs.write_text(folder / runs.VALIDATION, "\n".join(sorted(names)) + "\n")
