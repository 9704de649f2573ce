"""The training loop: one page on Accelerate, for dense models and MoE models alike."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data import Mixup
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vimoe.config import TrainConfig
from vimoe.data import Data, eval_loader, train_loader
from vimoe.errors import ConfigError, VimoeError
from vimoe.evaluate import Score, evaluate
from vimoe.losses import balance_loss, importance_loss, router_z_loss
from vimoe.moe.routing import Routing, record
from vimoe.optim import adamw, freeze_all_but
from vimoe.upcycling import moe_layers

logger = logging.getLogger(__name__)


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    prepared: dict[str, Any],
    out: Path,
    workers: int | None = None,
    converted: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Trains in place; the model ends with the weights of the epoch that was best on validation, in eval mode.

    Writes, as they come, metrics.csv (a row an epoch), load.csv (the share of each expert in each epoch) and
    TensorBoard events into `out`. Under `precision="bf16"` metrics.csv is of bfloat16, what is returned is not.

    Args:
        model: a classifier, dense or with MoE layers.
        data: only train and val are read.
        config: how.
        prepared: preprocessing, as `vimoe.data.preprocessing` gives it.
        out: an existing folder.
        workers: processes that decode images, as `DataConfig.workers`.
        converted: names of the layers that `config.train_only="moe"` trains; by default the MoE layers.

    Returns:
        {"epochs", "best_epoch", "val": the Score of the returned model as a dict, "seconds", "train_images"}.

    Raises:
        ConfigError: for settings that contradict the data or the machine, before anything is trained.
        VimoeError: where the loss is no longer finite.
    """
    check(config, data)
    set_seed(config.seed)
    loader = train_loader(data.train, prepared, config, workers)
    val_loader = eval_loader(data.val, prepared, 2 * config.batch_size, workers)
    if config.train_only == "moe":
        freeze_all_but(model, list(moe_layers(model)) if converted is None else converted)
    accelerator = _accelerator(config, out)
    optimizer = adamw(model, config)
    schedule = _schedule(optimizer, config, math.ceil(len(loader) / config.accumulation))
    mixup = _mixup(config, len(data.classes))
    plain = model
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ema = ModelEmaV3(plain, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
    judged = ema.module if ema else plain

    best, start = _Best(), time.perf_counter()
    steps = _Steps(accelerator, model, plain, optimizer, schedule, mixup, ema, config)
    try:
        with _progress(config.epochs * len(loader)) as step_done, _rows(out / "metrics.csv") as write_row:
            for epoch in range(1, config.epochs + 1):
                totals, load = steps.epoch(loader, partial(step_done, f"epoch {epoch}/{config.epochs}"))
                score = evaluate(judged, val_loader)
                row = {
                    "lr": max(group["lr"] for group in optimizer.param_groups),
                    **{f"train_{name}": value for name, value in totals.means().items()},
                    **{f"val_{name}": getattr(score, name) for name in ("loss", "top1", "top5")},
                    "images_per_second": totals.images / totals.seconds,
                }
                write_row({"epoch": epoch, **row})
                load.append_to(out / "load.csv", epoch)
                load.warn_of_idle(epoch)
                accelerator.log(row | load.scalars(), step=epoch)
                if not math.isfinite(row["train_loss"] + score.loss):
                    remedy = "lower train.lr, or set train.clip_grad"
                    losses = f"{row['train_loss']} in training and {score.loss} on validation"
                    raise VimoeError(f"the loss is {losses} in epoch {epoch}: {remedy}")
                logger.info("epoch %d of %d: %s", epoch, config.epochs, score)
                best.offer(epoch, score, judged)
    finally:  # whatever happens, the caller's model is to be as it computes, without autocast around its forward
        accelerator.end_training()
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    plain.load_state_dict(best.state)
    return {
        "epochs": config.epochs,
        "best_epoch": best.epoch,
        "val": (best.score if config.precision == "no" else evaluate(plain, val_loader)).to_dict(),
        "seconds": time.perf_counter() - start,
        "train_images": len(data.train),
    }


@dataclass
class _Steps:
    """The steps of an epoch: forward, losses, backward, clip, update."""

    accelerator: Accelerator
    model: nn.Module  # as Accelerate prepared it
    plain: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    mixup: Mixup | None
    ema: ModelEmaV3 | None
    config: TrainConfig
    updates: int = 0

    def epoch(self, loader: Iterable[tuple[Tensor, Tensor]], step_done: Callable[[], None]) -> tuple[_Totals, _Load]:
        start, totals, load = time.perf_counter(), _Totals(), _Load()
        self.model.train()
        for images, labels in loader:
            with self.accelerator.accumulate(self.model):
                images, targets = self.mixup(images, labels) if self.mixup else (images, labels)
                with record(self.plain) as routings:
                    logits = self.model(images)
                smoothing = 0.0 if self.mixup else self.config.label_smoothing
                task = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
                extra, parts = auxiliary_losses(routings, self.config)
                self.accelerator.backward(task + extra)
                if self.accelerator.sync_gradients:
                    if self.config.clip_grad:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
                    self.schedule.step_update(self.updates + 1)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.updates += 1
                if self.ema:
                    self.ema.update(self.plain, step=self.updates)
            totals.add(len(images), loss=task, **parts)
            load.add(routings)
            step_done()
        totals.seconds = time.perf_counter() - start
        return totals, load


def check(config: TrainConfig, data: Data) -> None:
    """Raises ConfigError for settings that contradict the data, one another or the machine."""
    if PartialState().num_processes > 1:
        raise ConfigError(f"{PartialState().num_processes} processes: expected 1, training in more is not there yet")
    if config.batch_size > len(data.train):
        raise ConfigError(
            f"train.batch_size={config.batch_size} with {len(data.train)} training images: expected at most that many"
        )
    if config.warmup_epochs >= config.epochs:
        raise ConfigError(
            f"train.warmup_epochs={config.warmup_epochs:g} of train.epochs={config.epochs}: expected less; lower it"
        )
    if config.precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError("train.precision='fp16': expected a GPU, there is none; use 'bf16' or 'no'")


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


class _Best:
    """The weights of the epoch with the best top-1 on validation; of equal ones that with the lower loss."""

    def __init__(self) -> None:
        self.epoch, self.score, self.state = 0, Score(-1.0, 0.0, 0.0, 0), dict[str, Tensor]()

    def offer(self, epoch: int, score: Score, model: nn.Module) -> None:
        if (score.top1, -score.loss) > (self.score.top1, -self.score.loss):
            self.epoch, self.score = epoch, score
            self.state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


class _Totals:
    """Means over an epoch of what each batch reports, without waiting for the device at each step."""

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self.sums: dict[str, Tensor] = {}

    def add(self, images: int, **values: Tensor) -> None:
        self.images += images
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + images * value.detach()

    def means(self) -> dict[str, float]:
        return {name: float(total) / self.images for name, total in self.sums.items()}


class _Load:
    """How many images or tokens each expert of each layer received in an epoch."""

    def __init__(self) -> None:
        self.units: dict[str, Tensor] = {}

    def add(self, routings: list[Routing]) -> None:
        for routing in routings:
            self.units[routing.layer] = self.units.get(routing.layer, 0) + routing.load

    def shares(self) -> dict[str, list[float]]:
        return {layer: (units / units.sum()).tolist() for layer, units in self.units.items()}

    def scalars(self) -> dict[str, float]:
        return {f"load/{layer}/{i}": s for layer, shares in self.shares().items() for i, s in enumerate(shares)}

    def warn_of_idle(self, epoch: int) -> None:
        idle = {name: [i for i, share in enumerate(shares) if share == 0] for name, shares in self.shares().items()}
        named = [f"expert {i} of {name}" for name, experts in idle.items() for i in experts]
        if named:
            remedy = "raise train.balance_loss, or use fewer experts"
            logger.warning("idle for the whole of epoch %d: %s; %s", epoch, ", ".join(named), remedy)

    def append_to(self, path: Path, epoch: int) -> None:
        if not self.units:
            return
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["epoch", "layer", "expert", "share"])
            for layer, shares in self.shares().items():
                writer.writerows([epoch, layer, expert, share] for expert, share in enumerate(shares))


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
    return CosineLRScheduler(
        optimizer, t_initial=total - warmup, lr_min=config.min_lr, warmup_t=warmup, warmup_prefix=True,
        t_in_epochs=False,
    )  # fmt: skip


def _mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes)


@contextmanager
def _progress(steps: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=steps)
        yield lambda description: progress.update(task, advance=1, description=description)


@contextmanager
def _rows(path: Path) -> Iterator[Any]:
    """A CSV file that takes its header from the first row and is whole after each row."""
    with path.open("w", newline="") as file:
        writer: csv.DictWriter | None = None

        def write(row: dict[str, Any]) -> None:
            nonlocal writer
            if writer is None:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)
            file.flush()

        yield write
