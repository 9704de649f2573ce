"""The memory of a training over devices, from its settings: nothing is trained and no weight has memory."""

from __future__ import annotations

import warnings
from dataclasses import replace

from vimoe.config.parallel import ParallelConfig
from vimoe.config.settings import Settings
from vimoe.errors import ConfigError, VimoeError
from vimoe.models.continued import own_layers
from vimoe.models.create import create_without_weights
from vimoe.models.upcycling import build_layers
from vimoe.training import fuse
from vimoe.training.footprint import footprint
from vimoe.training.layouts import SizePlan, plan_size
from vimoe.training.parameter_groups import freeze_all_but, trained_modules
from vimoe.training.settle import check_batch, check_spread


def size_of(settings: Settings, devices: int, limit: float) -> SizePlan:
    """Return what `vimoe train` with these settings would take on each of so many devices.

    Args:
        settings: settings of one training of image classification; `train.precision` "auto" counts as "bf16".
        devices: number of devices, one to a process.
        limit: memory of each in bytes.

    Raises:
        VimoeError: if the settings contradict one another, the batch cannot be divided, or it is another task.
    """
    train = settings.train
    if settings.data.task != "classification":
        raise ConfigError(
            f"data.task={settings.data.task!r} with --devices: expected 'classification', whose step the plan takes; "
            f"leave it out"
        )
    if train.stages is not None:
        raise ConfigError(
            f"train.stages={list(train.stages)} with --devices: expected one training; plan each stage by "
            f"train.train_only"
        )
    for name in ("distill_loss", "locality_loss", "oracle_loss"):
        if getattr(train, name):
            raise ConfigError(
                f"train.{name}={getattr(train, name):g} with --devices: expected 0, since the plan has no second "
                f"forward pass and no second copy of experts; leave it out"
            )
    mixture = settings.moe.layers != "none" and train.fuse != "exfusion"
    train.parallel.over(devices).check(train.batch_size, settings.moe.num_experts if mixture else 0)
    check_batch(train, devices)
    if train.precision == "auto":
        train = replace(train, precision="bf16")
    model = create_without_weights(settings.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training warns
        converted = list(own_layers(settings.model)) or build_layers(model, settings.moe)
    fuse.begin(model, train)
    trained = trained_modules(model, train.trained, converted)
    if trained is not None:
        freeze_all_but(model, trained)
    cached = trained if settings.data.cache == "features" else None
    found = footprint(model, train.batch_size // devices, train, cached)
    check_spread(train, train.parallel.over(devices), model, devices)

    def trains(mesh: ParallelConfig) -> bool:
        try:
            check_spread(train, mesh, model, devices)
        except VimoeError:
            return False
        return True

    return plan_size(found, train.parallel, devices, limit, train.precision, trains)
