"""Where a training is: what has been counted and logged, the best weights so far, and both in a checkpoint and back."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vimoe.errors import FolderError
from vimoe.files import write_text
from vimoe.metrics.base import Score
from vimoe.moe import MoE
from vimoe.training import checkpoint
from vimoe.training.routing_health import Health

logger = logging.getLogger(__name__)


class Best:
    """The weights of the epoch with the best score on validation, and that score as a dict."""

    def __init__(self) -> None:
        self.epoch, self.rank = 0, tuple[float, ...]()
        self.score, self.state = dict[str, Any](), dict[str, Tensor]()

    def offer(self, epoch: int, score: Score, model: nn.Module) -> None:
        if score.rank > self.rank:
            self.epoch, self.rank, self.score = epoch, score.rank, score.to_dict()
            self.state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


class Totals:
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


@dataclass
class State:
    """Where a training is: all that a checkpoint holds besides the states of model and optimizer."""

    images: int  # fingerprint of the training images
    settings: dict[str, Any]  # which the training began with, by name ("train.lr")
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

    def done(self, batches: int) -> int:
        """Steps that are done, of epochs with so many batches."""
        return (self.epoch - 1) * batches + self.step

    def stalled(self, patience: int | None) -> bool:
        """Whether that many epochs, the last ones, were all no better than one before; never without a patience."""
        return patience is not None and self.epoch - 1 - self.best.epoch >= patience

    def finish_epoch(self, score: Score, lr: float, layers: Mapping[str, MoE], out: Path) -> dict[str, Any]:
        """Writes the epoch's rows and raises its alarms; returns the row of metrics.csv."""
        row = {
            "lr": lr,
            **{f"train_{name}": value for name, value in self.totals.means().items()},
            **{f"val_{name}": value for name, value in score.columns.items()},
            "images_per_second": self.totals.images / self.totals.seconds,
        }
        self.metrics.append({"epoch": self.epoch, **row})
        self.shares += [
            {"epoch": self.epoch, "layer": layer, "expert": expert, "share": share}
            for layer, shares in self.health.shares().items()
            for expert, share in enumerate(shares)
        ]
        self.health_rows += [{"epoch": self.epoch, **row} for row in self.health.rows()]
        for alarm in self.health.alarms(layers):
            self.alarms.append(f"epoch {self.epoch}: {alarm}")
            logger.warning(self.alarms[-1])
        self.write_logs(out)
        return row

    def write_logs(self, out: Path) -> None:
        """Writes metrics.csv, load.csv and health.csv."""
        for name, rows in (("metrics.csv", self.metrics), ("load.csv", self.shares), ("health.csv", self.health_rows)):
            if rows:
                text = io.StringIO()
                writer = csv.DictWriter(text, rows[0])
                writer.writeheader()
                writer.writerows(rows)
                write_text(out / name, text.getvalue())

    def scalars(self) -> dict[str, float]:
        """Of this epoch's health, by a name for each."""
        load = {f"load/{layer}/{i}": s for layer, shares in self.health.shares().items() for i, s in enumerate(shares)}
        rows = ((f"{key}/{row['layer']}", value) for row in self.health.rows() for key, value in row.items())
        return load | {name: value for name, value in rows if not isinstance(value, str)}

    def next_epoch(self) -> None:
        self.epoch, self.step, self.totals, self.health = self.epoch + 1, 0, Totals(), Health()

    def stored(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """For a checkpoint, with the states of the parts: model, optimizer, ..."""
        self.saved = self.seconds
        return {
            "images": self.images,
            "settings": self.settings,
            **{name: getattr(self, name) for name in _PLAIN},
            **{name: vars(getattr(self, name)) for name in ("totals", "health")},
            "best": vars(self.best),
            **{name: part.state_dict() for name, part in parts.items()},
        }

    def restore(self, stored: dict[str, Any], parts: Mapping[str, Any], out: Path) -> None:
        """Goes back to what was stored, in the logs too."""
        checkpoint.check_settings(out, stored["settings"], self.settings)
        if stored["images"] != self.images:
            raise FolderError(
                f"{out}: its checkpoint is of other training images than those that are there now: expected the data "
                f"as it was; restore it, or train again in another folder"
            )
        for name in _PLAIN:
            setattr(self, name, stored[name])
        self.saved = self.seconds
        vars(self.totals).update(stored["totals"])
        self.health.sums = stored["health"]["sums"]
        vars(self.best).update(stored["best"])
        for name, part in parts.items():
            part.load_state_dict(stored[name])
        self.write_logs(out)


_PLAIN = ("epoch", "step", "updates", "seconds", "metrics", "shares", "health_rows", "alarms")
