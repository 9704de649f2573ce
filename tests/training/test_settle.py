"""Settings of a training that nothing in the model reads are refused, and those that something reads are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from helpers.trainings import model

from vimoe.config.parallel import ParallelConfig
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError
from vimoe.training.settle import check_evaluated, check_parallel, settle

if TYPE_CHECKING:
    from vimoe.process import Process

HASH, RANDOM = {"router": "hash", "routing": "token"}, {"router": "random"}
CHOICE = {"router": "expert_choice", "routing": "token"}
UNREAD = [
    (HASH, "router_frozen", 0.5),
    (RANDOM, "router_frozen", 1.0),
    (HASH, "router_lr_scale", 2.0),
    (RANDOM, "router_lr_scale", 0.0),
    (RANDOM, "router_weight_decay", 0.1),
    (HASH, "entropy_loss", 0.1),
    (HASH, "z_loss", 0.1),
    (HASH, "balance_loss", 0.5),
    (CHOICE, "balance_loss", 0.5),
    ({"router": "smear"}, "balance_loss", 0.5),
    ({"router": "soft", "routing": "token"}, "balance_loss", 0.5),
]


@pytest.mark.parametrize(("moe", "name", "value"), UNREAD)
def test_what_could_train_nothing_is_refused(moe: dict, name: str, value: float) -> None:
    kind, default = moe["router"], getattr(TrainConfig, name)
    with pytest.raises(ConfigError) as caught:
        settle(TrainConfig(**{name: value}), 100, model(**moe))
    assert str(caught.value).startswith(f"train.{name}={value:g} with moe.router='{kind}': expected {default:g}, since")
    settle(TrainConfig(**{name: value}), 100, model())  # a router that learns
    settle(TrainConfig(**{name: value}), 100, model(layers="none"))  # the dense arm of a comparison


def test_what_could_train_something_is_not_refused() -> None:
    """A random router's scores train the blocks before it, and a gate of its own has a rate and a bias."""
    for loss in ("balance_loss", "entropy_loss", "z_loss"):
        settle(TrainConfig(**{loss: 0.5}), 100, model(**RANDOM))
    settle(TrainConfig(router_lr_scale=2.0), 100, model(**HASH, gate="sigmoid"))
    settle(TrainConfig(entropy_loss=0.1), 100, model(**CHOICE))
    settle(TrainConfig(balance_loss=0.0), 100, model(**HASH))


MESH = ParallelConfig(fsdp=2)
TWO = cast("Process", SimpleNamespace(count=2))


@pytest.mark.parametrize(
    ("name", "value"),
    [("fuse", "ewa"), ("compile", True), ("stages", ("head", "all")), ("precision", "fp16"), ("locality_loss", 0.5)],
)
def test_what_goes_with_whole_models_alone_is_refused_over_shards(name: str, value: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"^train\.{name}=.* with train\.parallel={{data: open, fsdp: 2, expert: 1}}: "
    ):
        check_parallel(TrainConfig(**{name: value}, parallel=MESH), TWO)
    check_parallel(TrainConfig(**{name: value}, parallel=ParallelConfig(data=2)), TWO)  # copies


def test_a_mesh_is_of_as_many_processes_as_there_are() -> None:
    with pytest.raises(ConfigError, match="with 1 process: expected sizes whose product is 1"):
        settle(TrainConfig(parallel=MESH), 100, model())
    check_parallel(TrainConfig(parallel=MESH, precision="bf16", ema_decay=0.5), TWO)


def test_each_process_of_shards_has_an_image_to_evaluate() -> None:
    with pytest.raises(ConfigError, match=r"^1 image for validation over 2 processes"):
        check_evaluated(1, TrainConfig(parallel=MESH), TWO)
    check_evaluated(2, TrainConfig(parallel=MESH), TWO)
    check_evaluated(1, TrainConfig(), TWO)
