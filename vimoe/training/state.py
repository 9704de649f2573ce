"""Progress of a training: counts, logs and the best weights so far, to a checkpoint and back."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vimoe.config.train import TrainConfig
from vimoe.errors import VimoeError
from vimoe.files import write_text
from vimoe.metrics.base import Score
from vimoe.moe import MoE
from vimoe.process import Process
from vimoe.training import checkpoint
from vimoe.training.routing_health import Health

logger = logging.getLogger(__name__)


class Best:
    """Weights of the epoch with the best score on validation, on the CPU, and that score as a dict."""

    def __init__(self) -> None:
        self.epoch, self.rank = 0, tuple[float, ...]()
        self.last = 0  # the last epoch that was validated
        self.score, self.state = dict[str, Any](), dict[str, Tensor]()

    def offer(self, epoch: int, score: Score, weights: Callable[[], dict[str, Tensor]], before: int = 0) -> None:
        """Keep the weights of an epoch whose score is better than all before.

        Args:
            epoch: number of the epoch.
            score: its score on validation, the same in all processes.
            weights: function that returns a copy of the weights on the CPU.
            before: number of epochs of the stages before, which a message counts too.

        Raises:
            VimoeError: if the loss is not finite.
        """
        if not math.isfinite(loss := score.columns["loss"]):
            raise VimoeError(
                f"the loss is {loss} on validation in epoch {before + epoch}: lower train.lr, or set train.clip_grad; "
                f"the last checkpoint is from before this epoch's end"
            )
        self.last = epoch
        if score.rank > self.rank:
            self.epoch, self.rank, self.score = epoch, score.rank, score.to_dict()
            self.state = weights()


class Totals:
    """Means over an epoch of the losses of its batches, summed on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self.sums: dict[str, Tensor] = {}

    def add(self, images: int, **values: Tensor) -> None:
        """Count a batch."""
        self.images += images
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + images * value.detach()

    def over(self, process: Process) -> Totals:
        """Return the totals of all processes."""
        totals = Totals()
        totals.images, totals.seconds = int(process.sum(torch.tensor(self.images))), self.seconds
        totals.sums = {name: process.sum(value) for name, value in self.sums.items()}
        return totals

    def clear(self) -> None:
        """Set all sums to 0."""
        self.images, self.sums = 0, {name: 0 * value for name, value in self.sums.items()}

    def means(self) -> dict[str, float]:
        """Return the mean of each loss over the images, by name."""
        return {name: float(total) / self.images for name, total in self.sums.items()}


@dataclass
class State:
    """Progress of a training: all that a checkpoint holds besides the states of model and optimizer."""

    images: int  # fingerprint of the training images
    settings: dict[str, Any]  # which the training began with, by name ("train.lr")
    process: Process
    epoch: int = 1
    step: int = 0  # batches of this epoch that are done
    updates: int = 0
    seconds: float = 0.0
    saved: float = 0.0  # seconds at the last checkpoint
    metrics: list[dict[str, Any]] = field(default_factory=list)
    shares: list[dict[str, Any]] = field(default_factory=list)
    health_rows: list[dict[str, Any]] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    health: Health = field(default_factory=Health)
    alarms: list[str] = field(default_factory=list)
    best: Best = field(default_factory=Best)
    stage: int | None = None  # number of this stage; None for a training without stages
    part: str = ""  # that is trained in this stage
    before: int = 0  # epochs of the stages before
    ended: list[dict[str, Any]] = field(default_factory=list)  # the stages before, for summary.json
    frozen: dict[str, int] = field(default_factory=dict)  # layers whose routers change no more, and their last epochs

    @property
    def number(self) -> int:
        """Number of this epoch, counted over all stages."""
        return self.before + self.epoch

    @property
    def stages(self) -> dict[str, Any]:
        """The stages until now, for summary.json; empty for a training without stages."""
        if self.stage is None:
            return {}
        best = {"best_epoch": self.before + self.best.epoch, "val": self.best.score}
        return {"stages": [*self.ended, {"train_only": self.part, "epochs": self.epoch - 1, **best}]}

    def done(self, batches: int) -> int:
        """Return the number of steps that are done, in epochs of so many batches."""
        return (self.epoch - 1) * batches + self.step

    def stalled(self, patience: int | None) -> bool:
        """Return True where so many epochs up to the last validation gave no better score; never without a patience."""
        return patience is not None and self.best.last - self.best.epoch >= patience

    def save_due(self, minutes: float) -> bool:
        """Return True where the last checkpoint is older than this."""
        return self.seconds - self.saved > 60 * minutes

    def finish_epoch(self, score: Score | None, lr: float, layers: Mapping[str, MoE], out: Path) -> dict[str, Any]:
        """Write the epoch's rows, log its alarms, and return the row of metrics.csv: val_* only with a score."""
        self.totals, self.health = self.totals.over(self.process), self.health.over(self.process)
        row = {
            "lr": lr,
            **{f"train_{name}": value for name, value in self.totals.means().items()},
            **{f"val_{name}": value for name, value in (score.columns if score else {}).items()},
            "images_per_second": self.totals.images / self.totals.seconds,
        }
        stage = {} if self.stage is None else {"stage": self.part}
        self.metrics.append({"epoch": self.number, **stage, **row})
        self.shares += [
            {"epoch": self.number, "layer": layer, "expert": expert, "share": share}
            for layer, shares in self.health.shares().items()
            for expert, share in enumerate(shares)
        ]
        self.health_rows += [{"epoch": self.number, **row} for row in self.health.rows()]
        for alarm in self.health.alarms(layers, self.frozen):
            self.alarms.append(f"epoch {self.number}: {alarm}")
            logger.warning(self.alarms[-1])
        self.write_logs(out)
        return row

    def freeze_routers(self, config: TrainConfig, trained: Collection[str]) -> None:
        """Note the layers whose routers change no more after this epoch.

        Early termination of the router's updates: Li et al., arXiv 2406.16437, there for a linear router of tasks.

        Args:
            config: settings, of which `router_freeze_epochs` and `router_freeze_margin` are read.
            trained: names of the layers whose routers are trained in this stage.
        """
        late = 0 < config.router_freeze_epochs <= self.number
        for row in self.health.rows() if config.router_freeze_margin or late else ():
            name, sure = row["layer"], 0 < config.router_freeze_margin < row["router_margin"]
            if name in trained and name not in self.frozen and (late or sure):
                self.frozen[name] = self.number
                logger.info("epoch %d: the router of %s is frozen from now on", self.number, name)

    def write_logs(self, out: Path) -> None:
        """Write metrics.csv, load.csv and health.csv."""
        self.process.once(self._write_logs, out)

    def _write_logs(self, out: Path) -> None:
        for name, rows in (("metrics.csv", self.metrics), ("load.csv", self.shares), ("health.csv", self.health_rows)):
            if rows:
                text = io.StringIO()
                # the first stage may have fewer columns, as a dense model has, and an epoch without a score
                writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row))
                writer.writeheader()
                writer.writerows(rows)
                write_text(out / name, text.getvalue())

    def scalars(self) -> dict[str, float]:
        """Return the figures of this epoch's health by name, for TensorBoard."""
        load = {f"load/{layer}/{i}": s for layer, shares in self.health.shares().items() for i, s in enumerate(shares)}
        rows = ((f"{key}/{row['layer']}", value) for row in self.health.rows() for key, value in row.items())
        return load | {name: value for name, value in rows if not isinstance(value, str)}

    def next_epoch(self) -> None:
        """Begin to count the next epoch."""
        self.epoch, self.step, self.totals, self.health = self.epoch + 1, 0, Totals(), Health()

    def stored(self) -> dict[str, Any]:
        """Return the content of a checkpoint, but for the states of model and optimizer."""
        self.saved = self.seconds
        return {
            "images": self.images,
            "settings": self.settings,
            **{name: getattr(self, name) for name in _PLAIN},
            **{name: vars(getattr(self, name).over(self.process)) for name in ("totals", "health")},
            "best": vars(self.best),
        }

    def goes_on(self, stored: dict[str, Any] | None, load: Callable[[dict[str, Any]], None], out: Path) -> bool:
        """Go back to the last checkpoint of this stage and return True, or go on after that of the stage before.

        Args:
            stored: the last checkpoint; None if there is none.
            load: function that loads the states of model and optimizer from it.
            out: the run folder.
        """
        if stored and stored.get("stage") == self.stage:
            self.restore(stored, load, out)
            logger.info("going on in epoch %d, after %d steps", self.number, self.step)
            return True
        if stored:
            self.follow(stored, out)
        return False

    def restore(self, stored: dict[str, Any], load: Callable[[dict[str, Any]], None], out: Path) -> None:
        """Go back to a checkpoint, in the logs too.

        Raises:
            FolderError: if the checkpoint is of other images or settings.
        """
        self._take(stored, out, *_PLAIN)
        vars(self.totals).update(stored["totals"])
        self.health.sums = stored["health"]["sums"]
        if not self.process.first:  # the sums are of all processes; they are counted once
            self.totals.clear()
            self.health.clear()
        vars(self.best).update(stored["best"])
        load(stored)
        self.write_logs(out)

    def follow(self, stored: dict[str, Any], out: Path) -> None:
        """Go on after the last checkpoint of the stage before, with its logs. Raises as `restore`."""
        earlier = State(self.images, self.settings, self.process)
        earlier._take(stored, out, *_PLAIN)
        vars(earlier.best).update(stored["best"])
        self._take(stored, out, *_LOGS, "frozen")
        self.before, self.ended = earlier.number - 1, earlier.stages["stages"]

    def _take(self, stored: dict[str, Any], out: Path, *names: str) -> None:
        checkpoint.check_settings(out, stored["settings"], self.settings)
        if stored["images"] != self.images:
            raise checkpoint.other_images(out)
        for name in names:
            if name in stored:  # what is newer than the checkpoint has its default
                setattr(self, name, stored[name])
        self.saved = self.seconds


_LOGS = ("seconds", "metrics", "shares", "health_rows", "alarms")
_PLAIN = (*_LOGS, "epoch", "step", "updates", "stage", "part", "before", "ended", "frozen")
