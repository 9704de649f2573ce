"""The settings of a training as they are used: for its images, its model and this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from accelerate.utils import parse_flag_from_env
from torch import nn

from vimoe.config.parallel import ParallelConfig
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError, counted
from vimoe.models.precision import resolve, warn_of_slow_bfloat16
from vimoe.moe.layer import moe_layers
from vimoe.moe.router import Router
from vimoe.parallel.parallelize import check as check_model
from vimoe.process import Process
from vimoe.training.compiled import check_compiler

_OF_SCORES = (  # losses of a router's scores
    "z_loss", "importance_loss", "entropy_loss", "variance_loss", "locality_loss",
)  # fmt: skip
_OF_OUTPUTS = {  # losses of the outputs of a token's experts, and what one output lacks
    "orthogonal_loss": "none to be orthogonal to",
    "mutual_loss": "no other to learn from",
}
_OF_WHOLE_MODELS = {  # settings that go with whole models alone, and why
    "fuse": "experts become one FFN where a process has them all",
    "compile": "compiled blocks do not gather their weights",
    "stages": "each stage begins with a whole model",
    "locality_loss": "distances are of whole experts",
    "precision": "gradients are not scaled over shards, and bf16 needs no scaling",
}

logger = logging.getLogger(__name__)


def settle(config: TrainConfig, images: int, model: nn.Module) -> TrainConfig:
    """Return settings with no batch larger than the training images, and no precision left open.

    A setting that is changed is logged. Settled settings stay as they are.

    Args:
        config: settings as the user gave them.
        images: number of training images.
        model: model to be trained; its weights do not matter.

    Raises:
        ConfigError: if settings contradict one another or the machine.
    """
    process = Process()
    if config.batch_size > images:
        even = images - images % _unit(config, process.count)
        logger.warning("train.batch_size=%d is lowered to %d, of %d training images", config.batch_size, even, images)
        config = replace(config, batch_size=even)
    check_shares(config, process)
    _check_layers(config, model, process)
    config = resolve(config, model)
    if config.warmup_epochs >= config.epochs:
        raise ConfigError(
            f"train.warmup_epochs={config.warmup_epochs:g} of train.epochs={config.epochs}: expected less; lower it"
        )
    if config.router_warmup_epochs > config.epochs:
        raise ConfigError(
            f"train.router_warmup_epochs={config.router_warmup_epochs:g} of train.epochs={config.epochs}: expected at "
            f"most as many; lower it"
        )
    _check_routers(config, model)
    if config.oracle_loss and process.count > 1:
        raise ConfigError(
            f"train.oracle_loss={config.oracle_loss:g} over {process.count} processes: expected one, since the halves "
            f"of a batch have no equal shares; leave one of them out"
        )
    if config.precision == "fp16" and process.device.type == "cpu":
        raise ConfigError("train.precision='fp16': expected a GPU, there is none; use 'auto' or 'no'")
    if config.compile:
        check_compiler()
    if config.precision == "bf16":
        warn_of_slow_bfloat16("train.precision=bf16", "use train.precision=auto or no")
    return config


def check_shares(config: TrainConfig, process: Process) -> None:
    """Raise ConfigError if the processes of the job cannot have equal shares of a batch, or are to share more."""
    for name in ("DeepSpeed", "FSDP", "Megatron_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}"):
            raise ConfigError(
                f"accelerate launch with {name}: expected processes that begin with the whole model; start it with "
                f"--multi_gpu, or by torchrun, and set train.parallel to divide the model"
            )
    check_parallel(config, process)
    check_batch(config, process.count)


def check_batch(config: TrainConfig, count: int) -> None:
    """Raise ConfigError if so many processes cannot have equal shares of a batch."""
    unit = _unit(config, count)
    if config.batch_size % unit or not config.batch_size:
        pairs = ", since images are mixed in pairs" if unit > count else ""
        raise ConfigError(
            f"train.batch_size={config.batch_size} over {count} processes: expected a multiple of {unit}{pairs}; set "
            f"it to {max(unit, config.batch_size - config.batch_size % unit)}, or start another number of processes"
        )


def check_parallel(config: TrainConfig, process: Process) -> None:
    """Raise ConfigError if the sizes of the mesh are not those of the job, or the settings need whole models."""
    _check_whole(config, config.parallel.over(process.count))


def check_spread(config: TrainConfig, mesh: ParallelConfig, model: nn.Module, count: int) -> None:
    """Raise VimoeError if the settings, or a layer of the model, need whole models, which this mesh spreads."""
    _check_whole(config, mesh)
    if mesh.spreads:
        check_model(model, mesh.expert, count)


def _check_whole(config: TrainConfig, mesh: ParallelConfig) -> None:
    for name, why in _OF_WHOLE_MODELS.items() if mesh.spreads else ():
        value, default = getattr(config, name), getattr(TrainConfig, name)
        if value != default and (name != "precision" or value == "fp16"):
            raise ConfigError(
                f"train.{name}={value} with train.parallel={config.parallel}: {why}; leave one of them out"
            )


def check_evaluated(images: int, config: TrainConfig, process: Process) -> None:
    """Raise ConfigError if a process of a spread model would have none of the images of validation."""
    if config.parallel.spreads and images < process.count:
        raise ConfigError(
            f"{counted(images, 'image')} for validation over {process.count} processes with "
            f"train.parallel={config.parallel}: expected at least {process.count}; raise data.val_fraction, or use "
            f"fewer processes"
        )


def _check_layers(config: TrainConfig, model: nn.Module, process: Process) -> None:
    """Raise VimoeError if the model cannot be spread over the mesh."""
    mesh = config.parallel.over(process.count)
    if mesh.spreads:
        for number in {layer.config.num_experts for layer in moe_layers(model).values()} or {0}:
            mesh.check(config.batch_size, number)
        check_model(model, mesh.expert, process.count)


def _unit(config: TrainConfig, count: int) -> int:
    """Return the number that a batch is a multiple of, so that all processes get the same share of it."""
    return count * (2 if config.mixup or config.cutmix else 1)


def _check_routers(config: TrainConfig, model: nn.Module) -> None:
    """Raise ConfigError for settings that the routers of the model do not go with."""
    routers = [layer.router for layer in moe_layers(model).values()]
    kinds = {router.config.router for router in routers if not router.adjustable}
    if config.router_warmup_epochs and kinds:
        raise ConfigError(
            f"train.router_warmup_epochs={config.router_warmup_epochs:g} with moe.router={min(kinds)!r}: expected 0, "
            f"its decisions cannot be random; leave it out"
        )
    _check_read(config, routers)
    untaught = {router.config.router for router in routers if not router.supervised}
    if config.route_loss != TrainConfig.route_loss and untaught:
        raise ConfigError(
            f"train.route_loss={config.route_loss:g} with moe.router={min(untaught)!r}: expected it with 'superclass' "
            f"only; leave it out"
        )
    for router in routers if config.oracle_loss else ():
        if router.config.routing != "image" or not router.overrulable:
            raise ConfigError(
                f"train.oracle_loss={config.oracle_loss:g} with moe.routing={router.config.routing!r} and "
                f"moe.router={router.config.router!r}: expected a router that sends images to experts; set "
                f"moe.routing='image'"
            )
    for name, why in _OF_OUTPUTS.items():
        value = getattr(config, name)
        if value and (mixing := {router.config.router for router in routers if router.mixes}):
            raise ConfigError(
                f"train.{name}={value:g} with moe.router={min(mixing)!r}: expected 0, since no token has outputs of "
                f"chosen experts; leave it out"
            )
        if value and any(router.slots < 2 for router in routers):
            raise ConfigError(
                f"train.{name}={value:g} with moe.top_k=1: expected at least 2, since a single output has {why}; set "
                f"moe.top_k=2, or leave the loss out"
            )
    of_all = {router.config.router for router in routers if router.slots >= router.config.num_experts}
    if config.router_freeze_margin and of_all:
        raise ConfigError(
            f"train.router_freeze_margin={config.router_freeze_margin:g} with moe.router={min(of_all)!r} and all "
            f"experts chosen: expected 0, since no score is behind the last chosen one; use train.router_freeze_epochs"
        )


def _check_read(config: TrainConfig, routers: Sequence[Router]) -> None:
    """Raise ConfigError for a setting that trains nothing, because nothing in these routers can learn from it.

    A random router learns nothing, but losses of its scores train the blocks before it.
    """
    unread: dict[str, Callable[[Router], bool]] = {
        "router_frozen": lambda router: not router.routes,
        "router_freeze_epochs": lambda router: not router.routes,
        "router_freeze_margin": lambda router: not router.routes,
        "oracle_loss": lambda router: not router.routes,
        "router_lr_scale": lambda router: not list(router.parameters()),
        "router_weight_decay": lambda router: not list(router.parameters()),
        "balance_loss": lambda router: router.even or router.constant,
        **dict.fromkeys(_OF_SCORES, lambda router: router.constant),
    }
    for name, never in unread.items():
        value, default = getattr(config, name), getattr(TrainConfig, name)
        kinds = {router.config.router for router in routers if never(router)}
        if kinds and value != default and (value or not name.endswith("_loss")):  # a loss may be switched off
            raise ConfigError(
                f"train.{name}={value:g} with moe.router={min(kinds)!r}: expected {default:g}, since it has nothing "
                f"that this could train; leave it out"
            )
