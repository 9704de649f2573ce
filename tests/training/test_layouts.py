"""Layouts over devices: shares by the mesh, bytes by the ring's formulas, and the smallest that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.tiny import config, upcycle, vit

from vimoe.config.parallel import ParallelConfig
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError
from vimoe.training.footprint import Exchange, Footprint, Weights, footprint
from vimoe.training.gathering import spread_peak
from vimoe.training.layouts import layout, plan_size
from vimoe.training.stages import Stage

FOUND = Footprint(
    images=4,
    weights=(
        Weights("blocks.0", dense=100, trained_dense=100),
        Weights("blocks.1", dense=60, expert=800, trained_dense=60, trained_expert=800),
        Weights("", dense=40, trained_dense=40),
    ),
    buffers=8,
    optimizer=(400, 1600),
    ema=True,
    activations=1000,
    peak=1740,
    temporary=0,
    stages=(
        Stage("forward", "", False, (0, 0, 0), ((500, 0, 0),)),
        Stage("backward", "", False, (1000, 0, 0), ((900, 40, 800), (300, 200, 800))),
    ),
    accumulates=False,
    experts=(8,),
    exchanges=(Exchange("blocks.1.mlp", bytes=64, times=4),),
)


def mesh(data: int = 1, fsdp: int = 1, expert: int = 1) -> ParallelConfig:
    return ParallelConfig(data=data, fsdp=fsdp, expert=expert)


def test_one_device_holds_all_and_sends_nothing() -> None:
    alone = layout(FOUND, mesh())
    assert alone.memory == {
        "weights": 1008, "optimizer": 2000, "ema": 1008, "step": 1740, "gradients": 1000, "activations": 1000,
        "temporary": 0,
    }  # fmt: skip
    assert alone.total == 1008 + 2000 + 1008 + 1740
    assert alone.sent == {"data": 0, "fsdp": 0, "expert": 0}


def test_data_parallel_reduces_all_gradients_and_has_them_twice() -> None:
    four = layout(FOUND, mesh(data=4))
    assert four.sent == {"data": 2 * 3 / 4 * 1000, "fsdp": 0, "expert": 0}
    assert four.total == layout(FOUND, mesh()).total + 1000


def test_expert_parallel_divides_experts_alone_and_exchanges_tokens() -> None:
    four = layout(FOUND, mesh(expert=4))
    assert four.memory["weights"] == 200 + 800 / 4 + 8 and four.memory["optimizer"] == 400 + 1600 / 4
    assert four.memory["gradients"] == 200 + 800 / 4
    assert four.memory["step"] == spread_peak(FOUND, mesh(expert=4))
    assert four.sent == {"data": 2 * 3 / 4 * 200, "fsdp": 0, "expert": 3 / 4 * 4 * 64}


def test_fsdp_divides_everything_and_gathers_blocks() -> None:
    two = layout(FOUND, mesh(fsdp=2))
    assert two.memory["weights"] == 1000 / 2 + 8 and two.memory["gradients"] == 1000 / 2
    assert two.memory["step"] == spread_peak(FOUND, mesh(fsdp=2))
    gathered = 100 + 860 + 40 + 100 + 860  # what is outside of blocks stays
    assert two.sent == {"data": 0, "fsdp": (gathered + 1000) / 2, "expert": 0}


def test_all_three_divide_what_is_left() -> None:
    both = layout(FOUND, mesh(2, 2, 2))
    assert both.memory["weights"] == 200 / 2 + 800 / 4 + 8
    assert both.sent["data"] == 2 * (3 / 4 * 200 / 2 + 1 / 2 * 800 / 4)
    assert both.sent["fsdp"] == (100 + 460 + 40 + 100 + 460 + 200 + 400) / 2
    assert both.sent["expert"] == 4 * 64 / 2


def test_frozen_blocks_are_gathered_once_and_have_no_gradients() -> None:
    frozen = replace(
        FOUND,
        weights=(
            Weights("blocks.0", dense=100),
            Weights("blocks.1", dense=60, expert=800, trained_expert=800),
            Weights("", dense=40, trained_dense=40),
        ),
    )
    two = layout(frozen, mesh(fsdp=2))
    assert two.sent["fsdp"] == (100 + 860 + 40 + 860 + 840) / 2
    assert layout(frozen, mesh(data=2)).sent["data"] == 840


def test_the_smallest_that_fits_divides_weights_among_the_fewest_devices() -> None:
    limit = layout(FOUND, mesh(data=8)).total
    assert plan_size(FOUND, ParallelConfig(), 8, limit, "no").chosen.mesh == mesh(data=8)
    less = plan_size(FOUND, ParallelConfig(), 8, limit - 1, "no")
    assert less.chosen.mesh == mesh(data=4, expert=2) and less.chosen.total < limit
    assert len(less.layouts) == 10 and "train.parallel={data: 4, fsdp: 1, expert: 2} fits" in str(less)
    none = plan_size(FOUND, ParallelConfig(), 8, 10, "no")
    assert none.chosen is None and none.to_dict()["layout"] is None
    assert none.shown.total == min(each.total for each in none.layouts)
    assert "the smallest, and it does not fit" in str(none) and "  fits" not in str(none)


def test_a_layout_that_is_asked_for_is_the_only_one() -> None:
    asked = plan_size(FOUND, ParallelConfig(fsdp=2), 8, 1e9, "bf16")
    assert [each.mesh for each in asked.layouts] == [mesh(data=4, fsdp=2)]
    with pytest.raises(ConfigError, match="whose product is 8"):
        plan_size(FOUND, ParallelConfig(fsdp=3), 8, 1e9, "bf16")
    with pytest.raises(ConfigError, match="train.parallel.expert=16: expected 1, or a divisor"):
        plan_size(FOUND, ParallelConfig(expert=16), 16, 1e9, "bf16")


@pytest.mark.parametrize("moe", [{}, {"router": "smear"}, {"num_experts": 3}])
def test_experts_are_divided_only_where_they_can_be(moe: dict) -> None:
    model = upcycle(vit(), config(**moe)) if moe else vit()
    found = footprint(model, 2, TrainConfig(precision="no"))
    assert {each.mesh.expert for each in plan_size(found, ParallelConfig(), 4, 1e9, "no").layouts} == {1}
