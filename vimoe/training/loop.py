"""The training loop: one page on Accelerate, for dense models and MoE models alike."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vimoe.config.train import TrainConfig
from vimoe.data.order import Shuffled, mix, seed_everything
from vimoe.errors import ConfigError, Stopped, VimoeError
from vimoe.models.precision import resolve, warn_of_slow_bfloat16
from vimoe.moe import Routing, record
from vimoe.moe.balancing import set_random_share, update_bias
from vimoe.moe.layer import moe_layers
from vimoe.moe.losses import balance_loss, importance_loss, router_z_loss
from vimoe.terminal import progress
from vimoe.training import checkpoint
from vimoe.training.job import Job
from vimoe.training.parameter_groups import adamw, freeze_all_but
from vimoe.training.state import State

logger = logging.getLogger(__name__)


def train(
    model: nn.Module,
    task: Job,
    config: TrainConfig,
    out: Path,
    converted: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains in place; the model ends with the weights of the epoch that was best on validation, in eval mode.

    Writes into `out`, as they come, metrics.csv (a row an epoch), load.csv (the share of each expert in each epoch),
    TensorBoard events, and a checkpoint at every epoch's end and every `config.checkpoint_minutes`. Where a checkpoint
    is there, it goes on from it to the weights that it would have reached without a stop, on the same device with the
    same threads and versions (`vimoe.training.checkpoint.remove` forgets it). Under `precision="bf16"` metrics.csv is
    of bfloat16, what is returned is not.

    Args:
        model: dense or with MoE layers.
        task: what to learn.
        config: how.
        out: an existing folder.
        converted: names of the layers that `config.train_only="moe"` trains; by default the MoE layers.
        settings: what checkpoints note, by name ("model.name"), so that a training does not go on with others; by
            default those of `config`.

    Returns:
        {"epochs": those that were trained, "stopped_early": whether they are fewer than asked for, "best_epoch", "val":
        the score of the returned model as a dict, "seconds", "train_images", "alarms"}.

    Raises:
        ConfigError: for settings that contradict the data or the machine, before anything is trained.
        FolderError: where the disk has no room for checkpoints, or the one that is there is damaged, of other images,
            or of other settings.
        VimoeError: where the loss is no longer finite.
        Stopped: after SIGTERM or Ctrl-C, with a checkpoint written.
    """
    order = task.loader.sampler
    assert isinstance(order, Shuffled)
    config = resolve(config, model)
    check(config, len(task.names))
    if config.train_only == "moe":
        freeze_all_but(model, list(moe_layers(model)) if converted is None else converted)
    accelerator = _accelerator(config, out)
    optimizer = adamw(model, config)
    schedule = _schedule(optimizer, config, math.ceil(len(task.loader) / config.accumulation))
    checkpoint.check_space(out, model, bool(config.ema_decay))
    plain = model
    model, optimizer, loader = accelerator.prepare(model, optimizer, task.loader)
    ema = ModelEmaV3(plain, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
    judged = ema.module if ema else plain
    batches = len(loader)
    steps = _Steps(accelerator, model, plain, optimizer, schedule, ema, task, config, order, batches)
    state = State(images=task.fingerprint, settings=plain_settings(config) if settings is None else dict(settings))

    def save() -> None:
        checkpoint.write(out, state.stored(steps.stateful()))

    if stored := checkpoint.read(out):
        state.restore(stored, steps.stateful(), out)
        logger.info("going on in epoch %d, after %d steps", state.epoch, state.step)
    else:
        save()  # so that there is one to go on from whenever it is killed
    started, total = time.perf_counter() - state.seconds, config.epochs * batches
    try:
        with checkpoint.stopping() as stop, progress("training", total, state.done(batches), stays=True) as show:
            while state.epoch <= config.epochs and not state.stalled(config.early_stopping):
                order.start(state.epoch, state.step * config.batch_size)
                for _ in steps.epoch(loader, state):
                    show(f"epoch {state.epoch}/{config.epochs}", 1)
                    state.seconds = time.perf_counter() - started
                    if steps.synced and (stop.signal or state.seconds - state.saved > 60 * config.checkpoint_minutes):
                        save()
                    if steps.synced and stop.signal:
                        raise Stopped(out, stop.signal)
                score = task.evaluate(judged)
                rate = max(group["lr"] for group in optimizer.param_groups)
                row = state.finish_epoch(score, rate, moe_layers(plain), out)
                accelerator.log({**row, **state.scalars()}, step=state.epoch)
                if not math.isfinite(row["val_loss"]):
                    remedy = (
                        "lower train.lr, or set train.clip_grad; the last checkpoint is from before this epoch's end"
                    )
                    raise VimoeError(f"the loss is {row['val_loss']} on validation in epoch {state.epoch}: {remedy}")
                logger.info("epoch %d of %d: %s", state.epoch, config.epochs, score)
                state.best.offer(state.epoch, score, judged)
                state.next_epoch()
                save()
            if stopped_early := state.epoch <= config.epochs:
                why = f"stopped after epoch {state.epoch - 1}, the best is {state.best.epoch}"
                show(why, 0)
                logger.info("%s: none of the last %d was better", why, config.early_stopping)
    finally:  # whatever happens, the caller's model is to be as it computes, without autocast around its forward
        set_random_share(plain, 0)
        accelerator.end_training()
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    best = state.best
    plain.load_state_dict(best.state)
    plain.eval()
    return {
        "epochs": state.epoch - 1,
        "stopped_early": stopped_early,
        "best_epoch": best.epoch,
        "val": best.score if config.precision == "no" else task.evaluate(plain).to_dict(),
        "seconds": time.perf_counter() - started,
        "train_images": len(task.names),
        "alarms": state.alarms,
    }


@dataclass
class _Steps:
    """The steps of an epoch: forward, losses, backward, clip, update."""

    accelerator: Accelerator
    model: nn.Module  # as Accelerate prepared it
    plain: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    ema: ModelEmaV3 | None
    task: Job
    config: TrainConfig
    order: Shuffled
    batches: int  # of an epoch
    decided: list[Routing] = field(default_factory=list)  # since the last update of the weights

    def epoch(self, loader: Iterable[tuple[Any, Tensor]], state: State) -> Iterator[None]:
        """Yields after each step."""
        start, before, layers = time.perf_counter(), state.totals.seconds, moe_layers(self.plain)
        self.model.train()
        for inputs, targets in loader:
            seed_everything(mix(self.config.seed, state.epoch, state.step))
            if self.config.router_warmup_epochs:
                set_random_share(self.plain, random_share(self.config, state.done(self.batches) / self.batches))
            with self.accelerator.accumulate(self.model):
                images, targets = self.task.prepare(inputs, targets)
                with record(self.plain) as routings:
                    outputs = self.task.forward(self.model, images)
                task = self.task.loss(outputs, targets)
                extra, parts = auxiliary_losses(routings, self.config)
                loss = task + extra
                if not loss.isfinite():
                    raise VimoeError(self._not_finite(loss.item(), state, len(images)))
                self.accelerator.backward(loss * (self.config.accumulation / self._window(state)))
                if self.synced:
                    state.health.add_gradients(layers)
                    if self.config.clip_grad:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
                    self.schedule.step_update(state.updates + 1)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.decided += [routing.detach() for routing in routings]
            if self.synced:
                state.updates += 1
                update_bias(self.plain, self.decided)
                self.decided.clear()
                if self.ema:
                    self.ema.update(self.plain, step=state.updates)
            state.step += 1
            state.totals.add(len(images), loss=task, **parts)
            state.health.add(routings)
            state.totals.seconds = before + time.perf_counter() - start
            yield

    def _not_finite(self, loss: float, state: State, batch: int) -> str:
        names = [self.task.names[i] for i in self.order.images_at(state.step * batch, batch)]
        return (
            f"the loss is {loss} in epoch {state.epoch}, step {state.step + 1}, of {', '.join(names[:8])}"
            f"{', ...' if batch > 8 else ''}: expected a number; look at these images, lower train.lr, or set "
            f"train.clip_grad; the last checkpoint is from before"
        )

    def _window(self, state: State) -> int:
        """Number of steps whose gradients this step's are added to; Accelerate divides by `accumulation` anyway."""
        first = state.step - state.step % self.config.accumulation
        return min(self.config.accumulation, self.batches - first)

    @property
    def synced(self) -> bool:
        """Whether no gradient waits to be added to."""
        return bool(self.accelerator.sync_gradients)

    def stateful(self) -> dict[str, Any]:
        """What has a state, by the name that a checkpoint gives it."""
        parts = {"model": self.plain, "optimizer": self.optimizer}
        return (
            parts
            | ({"ema": self.ema.module} if self.ema else {})
            | ({"scaler": self.accelerator.scaler} if self.accelerator.scaler else {})
        )


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings by name ("train.lr"), as a checkpoint notes them."""
    return {f"train.{name}": value for name, value in asdict(config).items()}


def settle(config: TrainConfig, images: int, model: nn.Module) -> TrainConfig:
    """Return the settings as they are used: no batch of more than there are images, and no precision left open.

    A setting that is changed is logged. What was settled once stays as it is.

    Args:
        config: as the user gave it.
        images: number of training images.
        model: to be trained; its weights do not matter.
    """
    if config.batch_size > images:
        even = images - images % 2 if config.mixup or config.cutmix else images
        logger.warning("train.batch_size=%d is lowered to %d, of %d training images", config.batch_size, even, images)
        config = replace(config, batch_size=even)
    return resolve(config, model)


def check(config: TrainConfig, images: int) -> None:
    """Raises ConfigError for settings that contradict the number of training images, one another or the machine."""
    if PartialState().num_processes > 1:
        raise ConfigError(f"{PartialState().num_processes} processes: expected 1, training in more is not there yet")
    if config.batch_size > images:
        raise ConfigError(
            f"train.batch_size={config.batch_size} with {images} training images: expected at most that many; "
            f"lower it, as vimoe.training.loop.settle does"
        )
    if config.warmup_epochs >= config.epochs:
        raise ConfigError(
            f"train.warmup_epochs={config.warmup_epochs:g} of train.epochs={config.epochs}: expected less; lower it"
        )
    if config.router_warmup_epochs > config.epochs:
        raise ConfigError(
            f"train.router_warmup_epochs={config.router_warmup_epochs:g} of train.epochs={config.epochs}: expected at "
            f"most as many; lower it"
        )
    if config.precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError("train.precision='fp16': expected a GPU, there is none; use 'auto' or 'no'")
    if config.precision == "bf16":
        warn_of_slow_bfloat16("train.precision=bf16", "use train.precision=auto or no")


def random_share(config: TrainConfig, epochs: float) -> float:
    """The share of the decisions that is random after so many epochs: from 1 to 0 over the routers' warm-up."""
    return max(0.0, 1 - epochs / config.router_warmup_epochs) if config.router_warmup_epochs else 0.0


def auxiliary_losses(routings: list[Routing], config: TrainConfig) -> tuple[Tensor | float, dict[str, Tensor]]:
    """The weighted sum of the routers' losses, and each by name (the balance loss always, as a sign of health)."""
    if not routings:
        return 0.0, {}
    parts = {"balance_loss": (balance_loss(routings), config.balance_loss)}
    if config.z_loss:
        parts["z_loss"] = (router_z_loss(routings), config.z_loss)
    if config.importance_loss:
        parts["importance_loss"] = (importance_loss(routings), config.importance_loss)
    total = sum(weight * loss for loss, weight in parts.values())
    return total, {name: loss for name, (loss, _) in parts.items()}


def _accelerator(config: TrainConfig, out: Path) -> Accelerator:
    # Accelerate keeps one precision a process; a later training in the same process may ask for another
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulation,
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=out,
    )
    accelerator.init_trackers("tensorboard")
    return accelerator


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, updates: int) -> CosineLRScheduler:
    total, warmup = config.epochs * updates, math.floor(config.warmup_epochs * updates)
    cosine = max(total - warmup, 2)  # of one update alone, the rate would be that of its end
    return CosineLRScheduler(
        optimizer, t_initial=cosine, lr_min=min(config.min_lr, config.lr), warmup_t=warmup, warmup_prefix=True,
        t_in_epochs=False,
    )  # fmt: skip
