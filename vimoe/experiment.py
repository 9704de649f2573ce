"""One training from settings to a finished run folder: what `vimoe train`, the demo and every control go through."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.utils import set_seed

from vimoe import runs
from vimoe.backbone import check_name, create
from vimoe.data import Data, load_data, preprocessing, train_loader
from vimoe.errors import ConfigError
from vimoe.folder import save
from vimoe.options import Settings
from vimoe.report import write_run_report
from vimoe.surgery import select
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
    check(settings.train, data)
    if settings.model.num_classes not in (None, len(data.classes)):
        raise ConfigError(
            f"model.num_classes={settings.model.num_classes}: the data has {len(data.classes)} classes; leave it out"
        )
    set_seed(settings.train.seed)
    model = upcycle(create(settings.model, len(data.classes)), settings.moe)
    prepared = preprocessing(model, settings.data)
    train_loader(data.train, prepared, settings.train, workers=0)  # refuses an augmentation that timm does not know
    converted = [site.name for site in select(sites(model), settings.moe.layers)]
    folder = runs.new_run(out)
    runs.write_settings(folder, _with_absolute_path(settings))
    write_validation(folder, settings, data)
    with TemporaryDirectory(dir=folder) as nowhere:  # what could not be saved should not be trained first
        save(model, Path(nowhere) / runs.MODEL, label_names=data.classes, preprocessing=prepared)
    logger.info("%s", data)
    summary = train(model, data, settings.train, prepared, folder, settings.data.workers, converted)
    save(model, folder / runs.MODEL, label_names=data.classes, preprocessing=prepared)
    summary = {**summary, "versions": runs.versions()}
    runs.write_json(folder / runs.SUMMARY, {"schema": runs.SCHEMA, "command": "train", **summary})
    report = write_run_report(folder)
    return {**summary, "out": str(folder), "report": str(report)}


def write_validation(folder: Path, settings: Settings, data: Data) -> None:
    """Lists the files that were split off train, so that every later verb decides on the same ones."""
    if data.split_off:
        root = Path(settings.data.path)
        names = sorted(str(source.relative_to(root)) for source, _ in data.val if isinstance(source, Path))
        runs.write_text(folder / runs.VALIDATION, "\n".join(names) + "\n")


def _with_absolute_path(settings: Settings) -> Settings:
    """So that later verbs find the data from any working directory."""
    path = Path(settings.data.path)
    if not path.exists():  # the embedded digits
        return settings
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, path=str(path.resolve())))
