"""The training loop: one page on Accelerate, for dense models and MoE models alike."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import convert_outputs_to_fp32
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vimoe.config.train import TrainConfig
from vimoe.data.order import Shuffled, mix, seed_everything
from vimoe.errors import ConfigError, Stopped, VimoeError
from vimoe.files import one_line
from vimoe.models.frozen_trunk import replaced_forward
from vimoe.moe import Routing
from vimoe.moe.balancing import set_random_share, update_bias
from vimoe.moe.ensemble import all_experts
from vimoe.moe.layer import moe_layers
from vimoe.moe.losses import distill_loss
from vimoe.moe.routing import part_detached
from vimoe.process import Process
from vimoe.stopping import Stop, stopping
from vimoe.terminal import progress
from vimoe.training import checkpoint
from vimoe.training.auxiliary_losses import auxiliary_losses, route_loss
from vimoe.training.batch_norm import shared_norms
from vimoe.training.compiled import compiled_blocks
from vimoe.training.distributed import Copies, Recorded, held
from vimoe.training.fuse import check_begun, pull
from vimoe.training.job import Job
from vimoe.training.locality import Locality
from vimoe.training.oracle import Oracle, teaching
from vimoe.training.parameter_groups import adamw, freeze_all_but, trained_modules
from vimoe.training.settle import settle
from vimoe.training.state import State

logger = logging.getLogger(__name__)


def train(
    model: nn.Module,
    job: Job,
    config: TrainConfig,
    out: Path,
    trained: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    stage: int | None = None,
    part: str | None = None,
) -> dict[str, Any]:
    """Train a model in place; it ends with the weights of the best epoch on validation, in eval mode.

    Writes into `out` while it trains: metrics.csv (a row an epoch), load.csv (the share of each expert by epoch),
    health.csv (`vimoe.training.routing_health`), TensorBoard events, and a checkpoint at the end of each epoch and
    every `config.checkpoint_minutes`. If `out` has a checkpoint, training resumes from it. On the same device, threads
    and versions the result equals an uninterrupted training. `vimoe.training.checkpoint.remove` deletes it. Under
    `precision="bf16"` the scores in metrics.csv are computed in bfloat16, and the returned score is not.

    In a job of several processes each calls it with a model of its own. They train as one process would: each has its
    share of every batch, and its gradients are averaged with those of the others. What is drawn at random in the model
    (dropout, stochastic depth, noise and chance of routers) is drawn anew in each process. With fsdp or expert above 1
    in `config.parallel` they spread a copy of the first process's model; of the models, its own alone gets the weights.

    Args:
        model: dense model or one with MoE layers.
        job: batches, loss and score.
        config: settings of the training.
        out: existing folder.
        trained: names of the modules to train beside the head; by default those of `config.train_only`.
        settings: settings by name ("model.name") that a checkpoint notes, so that a training does not go on with
            others; by default those of `config`.
        stage: number of the stage of `TrainConfig.stages` that `config` is the settings of, or of the task of a
            sequence that `job` is. A checkpoint of the stage before is gone on from with its logs; the model has its
            weights already.
        part: name of the stage in the logs; by default `config.train_only`.

    Returns:
        {"epochs": number of trained epochs, "stopped_early": True where they are fewer than asked for, "best_epoch",
        "val": score of the returned model as a dict, "seconds", "train_images", "alarms"}, "stages" with a
        dict for each stage until now, and "router_freeze" with the last epoch of each router that changes no more.

    Raises:
        ConfigError: if settings contradict the data or the machine, before anything is trained.
        FolderError: if the disk has no room for checkpoints, or the checkpoint in `out` is damaged, or of other
            images or settings.
        VimoeError: if the loss is no longer finite, in one process or more.
        Stopped: after SIGTERM or Ctrl-C, with a checkpoint written.
    """
    _check(config, job)
    check_begun(model, config)
    process = Process()
    process.one_log()
    config = settle(config, len(job.names), model)
    trained = trained_modules(model, config.trained) if trained is None else trained
    if trained is not None:
        freeze_all_but(model, trained)
    process.once(checkpoint.check_space, out, model, bool(config.ema_decay))
    state = State(job.fingerprint, plain_settings(config) if settings is None else dict(settings), process)
    state.stage, state.part = stage, str(config.train_only) if part is None else part
    with _prepared(model, job, config, out, process) as steps, stopping() as stop:
        stored = checkpoint.read(out)
        checkpoint.check_shared(out, stored is not None, process)
        resumed = state.goes_on(stored, steps.load, out)
        del stored
        if not resumed:
            steps.save(state)  # so that there is one to go on from whenever it is killed
        started, last = time.perf_counter() - state.seconds, state.before + config.epochs
        with progress("training", config.epochs * steps.batches, state.done(steps.batches), stays=True) as show:
            while state.epoch <= config.epochs and not state.stalled(config.early_stopping):
                for _ in steps.epoch(state):
                    show(f"epoch {state.number}/{last}", 1)
                    state.seconds = time.perf_counter() - started
                    if steps.synced and process.any(bool(stop.signal) or state.save_due(config.checkpoint_minutes)):
                        steps.save(state)
                        _end_if_asked(stop, out, process)
                due = state.epoch % config.val_interval == 0 or state.epoch == config.epochs
                score = job.evaluate(steps.judged) if due else None
                row = state.finish_epoch(score, steps.rate, moe_layers(steps.plain), out)
                steps.accelerator.log({**row, **state.scalars()}, step=state.number)
                state.freeze_routers(config, [name for name, params in steps.routers.items() if params])
                if score:
                    state.best.offer(state.epoch, score, lambda: steps.held.weights(steps.judged), state.before)
                logger.info(
                    "epoch %d of %d: %s", state.number, last, score or f"loss {row['train_loss']:.4f} in training"
                )
                state.next_epoch()
                steps.save(state)
                _end_if_asked(stop, out, process)  # during the validation, of which the last has no step after it
            if stopped_early := state.epoch <= config.epochs:
                why = f"stopped after epoch {state.number - 1}, the best is {state.before + state.best.epoch}"
                show(why, 0)
                logger.info("%s: none of the last %d was better", why, config.early_stopping)
    ended = steps.held.end(state.best.state)
    return {
        "epochs": state.number - 1,
        "stopped_early": stopped_early,
        "best_epoch": state.before + state.best.epoch,
        "val": state.best.score if config.precision == "no" else job.evaluate(ended).to_dict(),
        "seconds": time.perf_counter() - started,
        "train_images": len(job.names),
        "alarms": state.alarms,
        **state.stages,
        **({"router_freeze": state.frozen} if state.frozen else {}),
    }


@dataclass
class _Steps:
    """The steps of a training: forward, losses, backward, clip, update."""

    accelerator: Accelerator
    process: Process
    held: Copies
    model: nn.Module  # as it was prepared: images to outputs and routings
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    ema: ModelEmaV3 | None
    loader: DataLoader
    job: Job
    config: TrainConfig
    out: Path
    batches: int  # of an epoch
    routes: list[nn.Parameter]  # those of all routers that are trained, except while they are frozen
    routers: dict[str, list[nn.Parameter]]  # all trained parameters of each layer's router
    locality: Locality | None
    oracle: Oracle | None
    decided: list[Routing] = field(default_factory=list)  # of layers with a bias, since the last update of the weights

    def epoch(self, state: State) -> Iterator[None]:
        """Train the rest of an epoch, and yield after each step."""
        start, layers = time.perf_counter(), moe_layers(self.plain)
        learning = {name for name, layer in layers.items() if any(p.requires_grad for p in layer.parameters())}
        biased = {n for n in learning if layers[n].router.choice_bias is not None and n not in state.frozen}
        whole = all(layer.config.balance_over == "global" for layer in layers.values())
        over = self.process if whole and self.process.count > 1 else None
        self.order.start(state.number, state.step * self.config.batch_size)
        self.model.train()
        for inputs, targets in self.loader:
            seed_everything(mix(self.config.seed, state.number, state.step))
            if self.config.router_warmup_epochs:
                set_random_share(self.plain, random_share(self.config, state.done(self.batches) / self.batches))
            self._freeze_routers(state)
            with self.accelerator.accumulate(self.model):
                images, targets = self.job.prepare(inputs, targets)
                if self.process.rank:  # all mix images alike, and each draws what it drops
                    seed_everything(mix(self.config.seed, state.number, state.step, self.process.rank))
                outputs, routings = self.model(images)
                teaches = self._teaching(state, len(images))
                task_loss = self._task_loss(outputs, targets, teaches)
                learnt = routings if teaches is None else [r.without_gradient(teaches) for r in routings]
                extra, parts = auxiliary_losses(learnt, self.config, route_loss(learnt, layers, targets), over)
                for name, part in self._further_losses(images, targets, outputs, learnt, teaches, state):
                    parts[name] = part
                    extra = extra + getattr(self.config, name) * part
                loss = task_loss + extra
                finite = bool(loss.isfinite())
                if self.process.any(not finite):
                    told = self.process.gather("" if finite else self._not_finite(loss.item(), state, len(images)))
                    raise VimoeError(next(filter(None, told)))
                self.accelerator.backward(loss * (self.config.accumulation / self._window(state)))
                if self.synced:
                    self.accelerator.unscale_gradients()  # those of fp16, which is done once for health and clipping
                    state.health.add_gradients({name: layers[name] for name in layers if name in learning})
                    if self.config.clip_grad:
                        self.held.clip(self.config.clip_grad)
                    self.schedule.step_update(state.updates + 1)
                scale = self._scale
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.decided += [routing.detach() for routing in routings if routing.layer in biased]
            if self.synced:
                self._updated(state, skipped=self._scale < scale)
            state.step += 1
            state.totals.add(len(images), loss=task_loss, **parts)
            state.health.add(routings)
            state.totals.seconds += time.perf_counter() - start
            yield
            start = time.perf_counter()  # without the checkpoint that was written meanwhile

    def _freeze_routers(self, state: State) -> None:
        """Let those routers learn in the next step that are not frozen at the beginning, nor to the end."""
        for p in self.routes:
            p.requires_grad_(state.updates >= self.config.router_frozen * self._updates)
        for name in state.frozen:
            for p in self.routers[name]:
                p.requires_grad_(False)

    def _further_losses(
        self, images: Tensor, targets: Tensor, outputs: Tensor, routings: list[Routing], teaches: Tensor | None,
        state: State,
    ) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
        """Yield the losses that need more than routings, by the setting that is the weight."""
        if self.config.distill_loss:
            own = outputs if teaches is None else part_detached(outputs, teaches)
            yield "distill_loss", distill_loss(own, self._taught(images))
        if self.oracle and teaches is not None:
            yield "oracle_loss", self.oracle.loss(images[teaches], targets[teaches], self._pupils(state))
        if self.locality:
            yield "locality_loss", self.locality.loss(routings)

    def _pupils(self, state: State) -> list[str]:
        """Return the layers whose routers the oracle teaches now: those that are trained, until they are frozen."""
        return [name for name, params in self.routers.items() if self.oracle and params and name not in state.frozen]

    def _teaching(self, state: State, batch: int) -> Tensor | None:
        """Return which (B,) of the images of the step teach routers, and nothing else; None if there is no pupil."""
        places = self._images_of(state, batch) if self._pupils(state) else None
        return None if places is None else teaching(places).to(self.accelerator.device)

    def _task_loss(self, outputs: Tensor, targets: Tensor, teaches: Tensor | None) -> Tensor:
        """Return the loss of the images of a batch that do not teach routers; without a mask (B,) of these, of all."""
        if teaches is None:
            return self.job.loss(outputs, targets)
        own = ~teaches
        return self.job.loss(outputs[own], targets[own]) if own.any() else outputs.sum() * 0

    @property
    def _scale(self) -> float:
        """The scale of gradients in fp16, which falls with each update that is skipped because they overflowed.

        Accelerate's `optimizer_step_was_skipped` says False for fused optimizers, which skip it inside of their step.
        """
        scaler = self.accelerator.scaler
        return 0.0 if scaler is None else float(scaler.get_scale())

    def _updated(self, state: State, skipped: bool) -> None:
        """Let all that follows the weights follow an update of them; one that was skipped counts for the schedule."""
        state.updates += 1
        if skipped:
            self.decided.clear()
            return
        if self.decided:  # the first two look through all modules
            update_bias(self.plain, self.decided, self.process)
            self.decided.clear()
        if self.config.fuse != "none":
            pull(self.plain, self.config, state.updates / self._updates)
        if self.ema:
            # averages in bfloat16 are rounded at random, by a generator that is in no checkpoint
            seed = mix(self.config.seed, state.updates)
            self.ema._sr_generator = torch.Generator(self.process.device).manual_seed(seed)
            self.ema.update(self.plain, step=state.updates)

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor:
        """Return the logits of the teacher: the moving average with all experts at work."""
        assert self.ema is not None  # TrainConfig refuses a distill_loss without it
        with all_experts(self.ema.module):
            return self.job.forward(self.ema.module, images)

    def _not_finite(self, loss: float, state: State, batch: int) -> str:
        names = [one_line(self.job.names[i]) for i in self._images_of(state, batch)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"the loss is {loss} in epoch {state.number}, step {state.step + 1}, of {', '.join(names[:3])}{more}: "
            f"expected a number; look at these images, lower train.lr, or set train.clip_grad; the last checkpoint is "
            f"from before"
        )

    def _images_of(self, state: State, batch: int) -> list[int]:
        """Return the numbers of the images of this process's share, of so many, of the step."""
        return self.order.images_at(state.step * self.config.batch_size + self.process.rank * batch, batch)

    def _window(self, state: State) -> int:
        """Number of steps whose gradients this step's are added to; Accelerate divides by `accumulation` anyway."""
        first = state.step - state.step % self.config.accumulation
        return min(self.config.accumulation, self.batches - first)

    @property
    def _updates(self) -> int:
        """Number of updates of the weights in the whole training."""
        return self.config.epochs * math.ceil(self.batches / self.config.accumulation)

    @property
    def order(self) -> Shuffled:
        """The sampler of the training images."""
        return _order(self.job.loader)

    @property
    def synced(self) -> bool:
        """True after a step that updated the weights, so that no gradient waits to be added to."""
        return bool(self.accelerator.sync_gradients)

    @property
    def plain(self) -> nn.Module:
        """The model itself."""
        return self.held.model

    @property
    def judged(self) -> nn.Module:
        """The model that is evaluated: the moving average, where there is one."""
        return self.ema.module if self.ema else self.plain

    @property
    def rate(self) -> float:
        """The largest learning rate of the parameter groups."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def save(self, state: State) -> None:
        """Write a checkpoint."""
        self.held.save(self.out, state.stored(), self._stateful)

    def load(self, stored: dict[str, Any]) -> None:
        """Load the states of model and optimizer from a checkpoint."""
        self.held.load(self.out, stored, self._stateful)

    @property
    def _stateful(self) -> dict[str, Any]:
        """All parts that have a state, by their name in a checkpoint."""
        parts = {"model": self.plain, "optimizer": self.optimizer}
        return (
            parts
            | ({"ema": self.ema.module} if self.ema else {})
            | ({"locality": self.locality} if self.locality else {})
            | ({"scaler": self.accelerator.scaler} if self.accelerator.scaler else {})
        )


@contextmanager
def _prepared(model: nn.Module, job: Job, config: TrainConfig, out: Path, process: Process) -> Iterator[_Steps]:
    """Yield the steps of a training; at the end the model computes as before, without autocast around its forward."""
    # Accelerate keeps one precision a process; a later training in the same process may ask for another
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.precision:
        AcceleratorState._reset_state()
    _order(job.loader).start(epoch=1)  # an interrupted training has left it inside of an epoch, whose rest is shorter
    holding = held(model, config, process)
    model = holding.model
    recorded = Recorded(model, job.forward, outputs=config.reads_outputs)
    optimizer = adamw(model, config)
    schedule = _schedule(optimizer, config, math.ceil(len(job.loader) / config.accumulation))
    layers = moe_layers(model)
    routes = [p for layer in layers.values() for p in layer.router.routes if p.requires_grad]
    routers = {name: [p for p in layer.router.parameters() if p.requires_grad] for name, layer in layers.items()}
    accelerator, prepared, optimizer, loader = holding.prepare(recorded, optimizer, job.loader, out)
    accelerator.init_trackers("tensorboard")
    locality = Locality(layers) if config.locality_loss and layers else None  # on the device by now
    oracle = None
    if config.oracle_loss and layers:
        oracle = Oracle(model, accelerator.autocast()(job.forward), config.oracle_temperature)
    ema = holding.average()
    steps = _Steps(
        accelerator, process, holding, prepared, optimizer, schedule, ema, loader, job, config, out, len(loader),
        routes, routers, locality, oracle,
    )  # fmt: skip
    steps.order.divide(config.batch_size, process.count)
    judged, plain = steps.judged, config.precision == "no"
    try:
        # after the moving average was copied
        with (
            shared_norms(model, process),
            compiled_blocks(model) if config.compile else nullcontext(),
            replaced_forward(
                [] if plain else [judged], convert_outputs_to_fp32(accelerator.autocast()(judged.forward))
            ),
        ):
            yield steps
    finally:
        set_random_share(model, 0)
        for p in (p for params in routers.values() for p in params):
            p.requires_grad_(True)
        for tracker in accelerator.trackers:
            tracker.finish()


def _order(loader: DataLoader) -> Shuffled:
    order = loader.sampler
    assert isinstance(order, Shuffled)
    return order


def _end_if_asked(stop: Stop, out: Path, process: Process) -> None:
    """Raise Stopped in all processes if one of them got a signal; the checkpoint is written."""
    if process.any(bool(stop.signal)):
        raise Stopped(out, stop.signal or signal.SIGTERM)


def _check(config: TrainConfig, job: Job) -> None:
    if config.batch_size > len(job.names):  # the loader would give no batch
        raise ConfigError(
            f"train.batch_size={config.batch_size} with {len(job.names)} training images: expected at most that many; "
            f"lower it, as vimoe.training.settle does"
        )
    if config.batch_size != job.loader.batch_size:  # a resumed training would skip other images than it has seen
        raise ConfigError(
            f"train.batch_size={config.batch_size} with a job of batches of {job.loader.batch_size}: expected the "
            f"same; make the job with these settings"
        )
    if config.stages is not None:
        raise ConfigError(
            f"train.stages={list(config.stages)} in vimoe.training.loop.train: expected the settings of one stage; use "
            f"vimoe train, or vimoe.experiments.train.run_training"
        )


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings by name ("train.lr"), as a checkpoint notes them."""
    return {f"train.{name}": value for name, value in asdict(config).items()}


def random_share(config: TrainConfig, epochs: float) -> float:
    """Return the share of decisions that is random after so many epochs: from 1 to 0 over the routers' warm-up."""
    return max(0.0, 1 - epochs / config.router_warmup_epochs) if config.router_warmup_epochs else 0.0


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, updates: int) -> CosineLRScheduler:
    total, warmup = config.epochs * updates, math.floor(config.warmup_epochs * updates)
    cosine = max(total - warmup, 2)  # of one update alone, the rate would be that of its end
    return CosineLRScheduler(
        optimizer, t_initial=cosine, lr_min=min(config.min_lr, config.lr), warmup_t=warmup, warmup_prefix=True,
        t_in_epochs=False,
    )  # fmt: skip
