"""What a mesh gathers beside a step: the walk over its stages by hand, and the memory of real steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import mesh_memory
from helpers.processes import run
from helpers.tiny import config, images, upcycle, vit

from vimoe.config.parallel import ParallelConfig
from vimoe.training.footprint import Exchange, Footprint, Weights, footprint
from vimoe.training.gathering import spread_peak
from vimoe.training.stages import Phase, Stage, marked


def stage(phase: Phase, block: str, experts: bool, *moments: tuple[int, int, int]) -> Stage:
    return Stage(phase, block, experts, moments[0], moments)


def of(*stages: Stage) -> Footprint:
    """A block of 100 bytes, one of 60 with experts of 800, and 40 bytes outside; all are trained."""
    return Footprint(
        images=4,
        weights=(
            Weights("a", dense=100, trained_dense=100),
            Weights("b", dense=60, expert=800, trained_dense=60, trained_expert=800, largest_expert=500),
            Weights("", dense=40, trained_dense=40),
        ),
        buffers=0,
        optimizer=(0, 0),
        ema=False,
        activations=0,
        peak=0,
        temporary=0,
        stages=stages,
        accumulates=False,
        experts=(8,),
        exchanges=(Exchange("b.mlp", bytes=7, times=4),),
    )


START = stage("forward", "", False, (0, 0, 0))
A = stage("forward", "a", False, (10, 0, 0), (5, 0, 0))
B = stage("forward", "b", False, (10, 0, 0))
EXPERTS = stage("forward", "b", True, (20, 0, 0))
FORWARD = (START, A, stage("forward", "", False, (10, 0, 0)), B, EXPERTS, B, stage("forward", "", False, (30, 0, 0)))
BACKWARD = (
    stage("backward", "", False, (30, 0, 0), (30, 5, 0)),
    stage("backward", "b", False, (30, 30, 0)),
    stage("backward", "b", True, (20, 30, 0), (20, 30, 800)),
    stage("backward", "b", False, (10, 30, 800), (10, 90, 800)),
    stage("backward", "a", False, (10, 90, 800), (5, 180, 800)),
    stage("backward", "", False, (5, 190, 800), (0, 200, 800)),
)
END = stage("update", "", False, (0, 200, 800), (5000, 200, 800))


@pytest.mark.parametrize(
    ("stages", "peak"),
    [
        ((START, A), 40 + 10 + 2 * 100),  # the block in its buffer, and copied from it
        ((START, A, FORWARD[2]), 250),  # then its copy is freed
        ((*FORWARD[:4],), 40 + 10 + 2 * 860),
        (
            (*FORWARD, *BACKWARD[:2]),
            30 + 30 + 40 + 2 * 860,
        ),  # copied from its buffer again
        ((*FORWARD, *BACKWARD[:3]), 20 + 30 + 800 + 40 + 860 + 100),  # gradients whole, the next block in its buffer
        # the block's gradients in their buffer, and before they are divided; then a half of them, and the next block
        ((*FORWARD, *BACKWARD[:5]), 10 + 90 + 800 + 40 + 100 + 860),
    ],
)
def test_fsdp_has_buffers_of_weights_and_of_gradients(stages: tuple[Stage, ...], peak: float) -> None:
    assert spread_peak(of(*stages), ParallelConfig(data=1, fsdp=2)) == peak


def test_experts_are_gathered_apart_and_hold_the_tokens_that_came() -> None:
    mesh = ParallelConfig(data=1, expert=2)
    there = 40 + 60 + 400 + 7  # what is outside, the block, half of the experts and tokens
    assert spread_peak(of(*FORWARD[:5]), mesh) == 20 + there - 7 + 2 * 7  # no backward pass will want them
    much = replace(EXPERTS, moments=((9000, 0, 0),))
    assert spread_peak(of(*FORWARD[:4], much, *BACKWARD), mesh) == 9000 + there + 2 * 7
    assert (
        spread_peak(of(*FORWARD, *BACKWARD[:3]), mesh) == 20 + 30 + 400 + there + 500 / 2
    )  # and once more before it is divided
    freed = stage("backward", "b", False, (400, 30, 800))  # the experts, whose gradients are in a buffer too
    assert spread_peak(of(*FORWARD, *BACKWARD[:3], freed), mesh) == 400 + 30 + 400 + 40 + 60 + 400


def test_tokens_are_kept_for_a_backward_pass_alone() -> None:
    """Of experts to which no gradient comes they are there while these compute."""
    ends = stage("forward", "", False, (3000, 0, 0))
    assert spread_peak(of(*FORWARD[:6], ends), ParallelConfig(data=1, expert=2)) == 3000 + 40


def test_nothing_is_gathered_when_weights_are_updated() -> None:
    whole = of(*FORWARD, *BACKWARD, END)
    assert spread_peak(whole, ParallelConfig(data=1, fsdp=2)) == 5000 + (200 + 800) / 2
    assert spread_peak(whole, ParallelConfig(data=1, fsdp=2, expert=2)) == 5000 + 200 / 2 + 800 / 4


def test_gradients_of_earlier_steps_are_divided_already() -> None:
    """And take in those of this step when the backward pass is over."""
    one, later = of(*FORWARD, *BACKWARD, END), replace(of(*FORWARD, *BACKWARD, END), accumulates=True)
    mesh, early, late = ParallelConfig(data=1, fsdp=2), (*FORWARD, *BACKWARD[:3]), (*FORWARD, *BACKWARD, END)
    half = (200 + 800) / 2
    assert spread_peak(replace(later, stages=early), mesh) == spread_peak(replace(one, stages=early), mesh) + half
    assert spread_peak(replace(later, stages=late), mesh) == spread_peak(replace(one, stages=late), mesh)


def test_the_stages_of_a_step_are_those_of_its_blocks() -> None:
    network, seen = upcycle(vit(), config(layers="last:1", routing="token")), list[tuple[str, str, bool]]()
    with marked(network, lambda phase, block, experts: seen.append((phase, block, experts))):
        network(images(network, 2)).sum().backward()
    *others, last = (f"blocks.{i}" for i in range(len(network.blocks)))
    forward = [each for block in others for each in (("forward", block, False), ("forward", "", False))]
    forward += [("forward", last, inside) for inside in (False, True, False)] + [("forward", "", False)]
    backward = [("backward", last, inside) for inside in (False, True, False)]
    backward += [("backward", block, False) for block in (*reversed(others), "")]
    assert seen == forward + backward
    seen.clear()
    network(images(network, 2))
    assert not seen


EVEN: dict[str, Any] = {"routing": "token", "router": "expert_choice"}  # loads, as the plan takes them
CASES: dict[str, dict[str, Any]] = {
    "weights": {"depth": 8, "size": 32, "images": 8, "moe": {"layers": "every:2", "num_experts": 8, **EVEN}},
    "tokens": {
        "depth": 4, "size": 96, "images": 32,
        "moe": {"layers": "every:2", "num_experts": 8, "top_k": 2, **EVEN},
    },
    "images": {"depth": 4, "size": 96, "images": 32, "moe": {"layers": "last:2", "num_experts": 4, "top_k": 4}},
    "frozen": {
        "depth": 6, "size": 64, "images": 16, "train": {"train_only": "moe"},
        "moe": {"layers": "last:2", "num_experts": 8, **EVEN},
    },
    "checkpointed": {
        "depth": 6, "size": 96, "images": 32, "checkpointed": True,
        "moe": {"layers": "every:2", "num_experts": 4, **EVEN},
    },
    "accumulation": {
        "depth": 4, "size": 64, "images": 16, "train": {"accumulation": 2},
        "moe": {"layers": "every:2", "num_experts": 8, **EVEN},
    },
    "bfloat16": {
        "depth": 4, "size": 64, "images": 16, "train": {"precision": "bf16"},
        "moe": {"layers": "every:2", "num_experts": 8, **EVEN},
    },
}  # fmt: skip
MESHES = [{"expert": 2}, {"fsdp": 2}, {"fsdp": 2, "expert": 2}, {"expert": 4}, {"data": 2, "expert": 2},
          {"data": 2, "fsdp": 2}, {"fsdp": 4}]  # fmt: skip
QUICK = ("weights", "{'expert': 2}")


@pytest.mark.parametrize(
    ("case", "parallel"),
    [
        pytest.param(name, mesh, marks=[] if (name, str(mesh)) == QUICK else [pytest.mark.slow], id=f"{name} {mesh}")
        for name in CASES
        for mesh in MESHES
    ],
)
def test_it_is_the_memory_of_a_real_step(case: str, parallel: dict[str, int]) -> None:
    settings, count = CASES[case], int(np.prod([*parallel.values()]))
    measured = min(run(mesh_memory.peak_of_a_step, count, settings, parallel, timeout=300))
    found = footprint(mesh_memory.model(settings), settings["images"] // count, mesh_memory.training(settings))
    assert spread_peak(found, ParallelConfig(**parallel).over(count)) == pytest.approx(measured, rel=0.07)
