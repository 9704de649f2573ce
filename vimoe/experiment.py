"""One training from settings to a finished run folder: what `vimoe train`, the demo and every control go through."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.utils import set_seed
from torch import nn

from vimoe import checkpoint, runs
from vimoe.backbone import check_name, create
from vimoe.data import Data, absolute, load_data
from vimoe.errors import ConfigError
from vimoe.folder import save
from vimoe.loading import preprocessing, train_loader
from vimoe.options import Settings
from vimoe.report import write_run_report
from vimoe.scan import Scan, scan
from vimoe.surgery import select
from vimoe.task import classification
from vimoe.train import check, train
from vimoe.upcycling import sites, upcycle

logger = logging.getLogger(__name__)


def run_training(settings: Settings, out: str | Path) -> dict[str, Any]:
    """Builds the model, upcycles it, trains it, and writes everything into a new run folder.

    Returns:
        What summary.json holds, and the paths of the run and its report.

    Raises:
        VimoeError: for a mistake in the settings, the data or the folder, before anything is trained.
    """
    check_name(settings.model)
    runs.check_new(out)
    data = load_data(settings.data)
    check(settings.train, len(data.train))
    if settings.model.num_classes not in (None, len(data.classes)):
        raise ConfigError(
            f"model.num_classes={settings.model.num_classes}: the data has {len(data.classes)} classes; leave it out"
        )
    model = _model(settings, data)
    prepared = preprocessing(model, settings.data)
    train_loader(data.train, prepared, settings.train, workers=0)  # refuses an augmentation that timm does not know
    scanned = scan(data)
    folder = runs.new_run(out)
    settings = replace(settings, data=replace(settings.data, path=absolute(settings.data.path)))
    runs.write_settings(folder, settings)
    with TemporaryDirectory(dir=folder, prefix=".proof-") as proof:  # what could not be saved should not be trained
        save(model, Path(proof) / runs.MODEL, label_names=data.classes, preprocessing=prepared)
    return _train(settings, data, scanned, model, prepared, folder)


def resume_training(path: str | Path) -> dict[str, Any]:
    """Goes on with a training that was killed or stopped, from its last checkpoint, as `run_training` would have.

    Raises:
        FolderError: where the folder is no run, or its training is finished.
    """
    run = runs.open_unfinished(path)
    data = load_data(run.settings.data, validation=run.validation())
    check(run.settings.train, len(data.train))
    settings = run.settings
    if checkpoint.exists(run.path):  # which has the weights
        settings = replace(settings, model=replace(settings.model, pretrained=False))
    model = _model(settings, data)
    scanned = scan(data)
    return _train(run.settings, data, scanned, model, preprocessing(model, settings.data), run.path)


def _model(settings: Settings, data: Data) -> nn.Module:
    set_seed(settings.train.seed)
    return upcycle(create(settings.model, len(data.classes)), settings.moe)


def _train(
    settings: Settings, data: Data, scanned: Scan, model: nn.Module, prepared: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Trains in a run folder that has its settings, and finishes it."""
    write_validation(folder, data)
    logger.info("%s", scanned)
    converted = [site.name for site in select(sites(model), settings.moe.layers)]
    task = classification(data, prepared, settings.train, settings.data.workers, settings.data.cache)
    summary = train(model, task, settings.train, folder, converted)
    save(model, folder / runs.MODEL, label_names=data.classes, preprocessing=prepared, overwrite=True)
    summary = {**summary, "scan": scanned.to_dict(), "versions": runs.versions()}
    runs.write_json(folder / runs.SUMMARY, {"schema": runs.SCHEMA, "command": "train", **summary})
    checkpoint.remove(folder)
    report = write_run_report(folder)
    return {**summary, "out": str(folder), "report": str(report)}


def write_validation(folder: Path, data: Data) -> None:
    """Lists the images that were split off train, so that every later verb decides on the same ones."""
    if data.split_off:
        runs.write_text(folder / runs.VALIDATION, "\n".join(sorted(data.names(data.val))) + "\n")
