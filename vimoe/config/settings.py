"""Settings of a run, by section."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError

SECTIONS: dict[str, type] = {"model": ModelConfig, "moe": MoEConfig, "data": DataConfig, "train": TrainConfig}


# settings that not every task reads, by task; other tasks refuse them instead of ignoring them silently, and a task
# without an entry reads none of them
OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "classification": (
        "train.mixup", "train.cutmix", "train.auto_augment", "train.random_erasing", "train.min_crop",
        "data.images_per_class", "data.tasks", "data.cache", "data.views", "data.crop_pct", "data.interpolation",
        "data.skip_unreadable", "train.oracle_loss",
    ),
    "segmentation": (
        "model.decoder", "data.inference", "data.flip_test", "data.cache", "data.views", "train.min_scale",
        "train.max_scale", "train.dice_loss", "train.class_weights",
    ),
}  # fmt: skip

# settings of MoE layers that a training reads whose layers become one FFN, by `train.fuse`; there are no routers
_FUSE_READS = (
    "layers", "num_experts", "num_shared_experts", "experts", "init", "drop_ratio", "noise_std", "cluster_energy",
    "calibration_images", "expert_dropout",
)  # fmt: skip
_FUSE_READS_TOO = {"ewa": ("routing",), "exfusion": ()}
# settings of a training that are about MoE layers
_OF_MOE = (
    "router_lr_scale", "expert_lr_scale", "router_weight_decay", "router_frozen", "router_freeze_epochs",
    "router_freeze_margin", "router_warmup_epochs", "expert_weight_decay", "balance_loss", "z_loss", "importance_loss",
    "entropy_loss", "variance_loss", "orthogonal_loss", "mutual_loss", "locality_loss", "route_loss",
    "oracle_loss", "oracle_temperature",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run, by section.

    Raises:
        ConfigError: if the task does not read a setting, or cached features or fused layers do not go with it.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for full in dict.fromkeys(name for names in OWN_SETTINGS.values() for name in names):
            section, name = full.split(".")
            value, default = (getattr(each, name) for each in (getattr(self, section), SECTIONS[section]()))
            if value != default:
                check_reads(self.data.task, full, value)
        self._check_features()
        self._check_tasks()
        if self.train.fuse != "none":
            self._check_fuse()
        if self.moe.layers != "none" and self.trainings[-1].moe.layers == "none":
            raise ConfigError(
                f"train.stages={list(self.train.stages or ())} with moe.layers={self.moe.layers!r}: expected 'moe' or "
                f"'experts' among them, where the MoE layers come in; add it, or set moe.layers=none"
            )

    @property
    def trainings(self) -> list[Settings]:
        """Settings of each stage, in order, of a dense model until MoE layers come in; else these, for each task."""
        stages = self.train.trainings
        if self.train.stages is None:
            return [self] * self.data.task_count
        mixed = [any(s.trained.word in ("moe", "experts") for s in stages[: i + 1]) for i in range(len(stages))]
        dense = replace(self.moe, layers="none")
        return [replace(self, train=s, moe=self.moe if mix else dense) for s, mix in zip(stages, mixed, strict=True)]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain values for JSON and YAML, by section and name."""
        values: dict[str, dict[str, Any]] = json.loads(json.dumps(asdict(self)))
        return values

    def _check_features(self) -> None:
        cache, train = self.data.cache, self.train
        if cache != "features":
            if self.data.views != DataConfig().views:
                raise ConfigError(
                    f"data.views={self.data.views} with data.cache={cache!r}: expected it with data.cache=features "
                    f"only; leave it out"
                )
            if cache != "none" and self.data.task == "segmentation":
                raise ConfigError(
                    f"data.cache={cache!r} with data.task='segmentation': expected 'none' or 'features', since crops "
                    f"of scenes are drawn anew each epoch; leave it out"
                )
            return
        if any(each.trained.word == "all" for each in train.trainings):
            name = "train_only='all'" if train.stages is None else f"stages={list(train.stages)}"
            raise ConfigError(
                f"data.cache='features' with train.{name}: expected 'moe', 'last:2' or "
                f"another part, since training changes the features of all blocks; set it, or use another data.cache"
            )
        for name, value in (("mixup", train.mixup), ("cutmix", train.cutmix)):
            if value:
                raise ConfigError(
                    f"train.{name}={value:g} with data.cache='features': expected 0, since it mixes pixels; leave it "
                    f"out, or use another data.cache"
                )

    def _check_tasks(self) -> None:
        """Raise ConfigError for settings that a sequence of tasks does not go with, or a freeze that comes too late."""
        train, tasks = self.train, self.data.tasks
        for name, value in (("stages", train.stages), ("fuse", train.fuse), ("parallel", train.parallel.spreads)):
            if tasks and value not in (None, "none", False):
                raise ConfigError(
                    f"data.tasks={tasks!r} with train.{name}={getattr(train, name)}: expected one of them, since each "
                    f"task goes on with the whole model of the task before; leave one out"
                )
        epochs = train.epochs * len(self.trainings)
        if train.router_freeze_epochs >= epochs:
            raise ConfigError(
                f"train.router_freeze_epochs={train.router_freeze_epochs} of {epochs} epochs in all: expected less; "
                f"lower it"
            )

    def _check_fuse(self) -> None:
        """Raise ConfigError for settings of MoE layers that make no layers to fuse, or are not read."""
        moe, fuse = self.moe, self.train.fuse
        if self.train.stages or self.train.trained.word not in ("all", "moe"):
            stages, part = self.train.stages, self.train.train_only
            given = f"stages={list(stages)}" if stages else f"train_only={part!r}"
            raise ConfigError(
                f"train.fuse={fuse!r} with train.{given}: expected one training of whole layers, since they have no "
                f"router and no shared expert; leave it out"
            )
        if moe.layers == "none" or moe.num_experts < 2:
            found = "layers='none'" if moe.layers == "none" else f"num_experts={moe.num_experts}"
            raise ConfigError(
                f"train.fuse={fuse!r} with moe.{found}: expected MoE layers of at least 2 experts; set it"
            )
        if moe.num_shared_experts:
            raise ConfigError(
                f"train.fuse={fuse!r} with moe.num_shared_experts={moe.num_shared_experts}: expected 0, since the "
                f"layers become the mean of N equal experts; set it"
            )
        for name in _OF_MOE:
            value, default = getattr(self.train, name), getattr(TrainConfig, name)
            if value != default and (value or not name.endswith("_loss")):
                raise ConfigError(
                    f"train.{name}={value:g} with train.fuse={fuse!r}: expected {default}, since its layers have no "
                    f"router, and experts with the rate and decay of other weights; leave it out"
                )
        for each in fields(moe):
            value = getattr(moe, each.name)
            if each.name not in _FUSE_READS + _FUSE_READS_TOO[fuse] and value != each.default:
                raise ConfigError(
                    f"moe.{each.name}={value!r} with train.fuse={fuse!r}: expected {each.default!r}, since its layers "
                    f"have no router; leave it out"
                )


def check_reads(task: str, name: str, value: object) -> None:
    """Raise ConfigError for a setting that is in OWN_SETTINGS, and not there for this task.

    Args:
        task: name of the task.
        name: setting, such as "train.mixup".
        value: value that was given.
    """
    readers = [each for each, names in OWN_SETTINGS.items() if name in names]
    if readers and task not in readers:
        raise ConfigError(
            f"{name}={value!r} with data.task={task!r}: expected it with {' or '.join(readers)} only; leave it out"
        )


def flat(settings: Settings) -> dict[str, Any]:
    """Return plain values by the names of their flags, such as "train.lr"."""
    return {f"{section}.{name}": v for section, values in settings.to_dict().items() for name, v in values.items()}
