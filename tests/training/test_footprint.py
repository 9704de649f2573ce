"""The memory of a step by arithmetic is that of a real step: weights, state, activations and peak."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.memory import kept
from helpers.slow import one_in
from helpers.tiny import config, images, upcycle, vit
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import vimoe
from vimoe.bench.memory import largest
from vimoe.config.parallel import ParallelConfig
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError
from vimoe.models.frozen_trunk import Cut, check_cut
from vimoe.moe.layer import moe_layers
from vimoe.training.auxiliary_losses import auxiliary_losses
from vimoe.training.footprint import Footprint, _largest, footprint
from vimoe.training.gathering import spread_peak
from vimoe.training.parameter_groups import adamw, freeze_all_but, trained_modules

IMAGES = 16  # so many that what kernels allocate inside themselves, 85 kB in attention, is little beside the rest
PLAIN = TrainConfig(precision="no")


def model(checkpointed: bool = False, depth: int = 3, **moe: object) -> nn.Module:
    dense = vit(num_classes=7, depth=depth, embed_dim=48, img_size=64)
    made = upcycle(dense, config(**moe)) if moe else dense
    if checkpointed:
        made.set_grad_checkpointing(True)
    return made.train()


def loss_of(network: nn.Module, x: Tensor, settings: TrainConfig, forward: Callable[[Tensor], Tensor]) -> Tensor:
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16")
    with vimoe.record(network, outputs=settings.reads_outputs) as routings, autocast:
        logits = forward(x)
    return F.cross_entropy(logits.float(), torch.arange(len(x)) % 7) + auxiliary_losses(routings, settings)[0]


def assert_of_a_real_step(found: Footprint, network: nn.Module, settings: TrainConfig, forward=None, x=None) -> None:
    """The peak, and what is kept, as torch's allocator and autograd tell them."""
    forward, x = forward or network, images(network, IMAGES) if x is None else x
    optimizer = adamw(network, settings)
    earlier = 0

    def step() -> Tensor:
        batch = x.clone()
        loss_of(network, batch, settings, forward).backward()
        return batch

    def whole_step() -> None:
        held = step()  # as the loop holds its images
        optimizer.step()
        del held

    whole_step()
    optimizer.zero_grad()
    if settings.accumulation > 1:
        step()
        earlier = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
    assert found.peak == pytest.approx(largest(whole_step) + earlier, rel=0.03)
    state = [value for each in optimizer.state.values() for value in each.values()]
    assert sum(found.optimizer) == sum(value.nbytes for value in state)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert found.sum("trained_dense") + found.sum("trained_expert") == sum(g.nbytes for g in gradients)
    assert found.sum("dense") + found.sum("expert") == sum(p.nbytes for p in network.parameters())
    y = x.clone()
    kept_of_it = kept(network, lambda: loss_of(network, y, settings, forward), y)
    assert found.activations == pytest.approx(kept_of_it, rel=0.02)


CASES = {
    "dense": ({}, {}),
    "image routing": ({"routing": "image"}, {}),
    "token routing": ({"routing": "token"}, {}),
    "two experts and a loss of outputs": ({"routing": "token", "top_k": 2}, {"orthogonal_loss": 0.1}),
    "bfloat16": ({"routing": "token"}, {"precision": "bf16"}),
    "accumulation": ({"routing": "image"}, {"accumulation": 3}),
    "experts choose": ({"routing": "token", "router": "expert_choice"}, {}),
    "soft": ({"routing": "token", "router": "soft"}, {}),
    "merged experts": ({"router": "smear"}, {}),
    "a loss of outputs to their mean": ({"routing": "image", "top_k": 3}, {"mutual_loss": 0.1}),
    "orthogonal": ({"routing": "token", "experts": "lora", "rank": 2, "top_k": 2, "orthogonal": "outputs"}, {}),
    "low rank": ({"routing": "token", "experts": "lora", "rank": 2}, {}),
    "all read": ({"routing": "token", "layers": "last:1"}, {}),
}


@pytest.mark.parametrize("name", one_in(3, CASES))
def test_it_is_the_memory_of_a_real_step(name: str) -> None:
    moe, changes = CASES[name]
    network, settings = model(**moe), replace(PLAIN, **changes)
    assert_of_a_real_step(footprint(network, IMAGES, settings), network, settings)


def test_checkpointing_keeps_less_and_takes_it_as_temporary_tensors() -> None:
    network = model(checkpointed=True, routing="token")
    found = footprint(network, IMAGES, PLAIN)
    assert_of_a_real_step(found, network, PLAIN)
    plain = footprint(model(routing="token"), IMAGES, PLAIN)
    assert found.activations < plain.activations / 2
    assert found.temporary > plain.temporary


@pytest.mark.parametrize("cached", [False, True])
def test_a_frozen_trunk_keeps_nothing_of_its_blocks_and_cached_features_do_not_run_it(cached: bool) -> None:
    network = model(layers="last:1", routing="token")
    trained = trained_modules(network, TrainConfig(train_only="moe").trained)
    freeze_all_but(network, trained)
    found = footprint(network, IMAGES, PLAIN, trained if cached else None)
    forward, x = network, images(network, IMAGES)
    if cached:
        cut = Cut(("blocks.0", "blocks.1", "blocks.2"), check_cut(network, trained), (3, 64, 64))
        assert cut.start == 2
        forward, x = (lambda features: cut.rest(network, features)), torch.randn(IMAGES, 17, 48)
    assert_of_a_real_step(found, network, PLAIN, forward, x)
    assert found.activations < footprint(model(layers="last:1", routing="token"), IMAGES, PLAIN).activations / 2


def test_a_moving_average_is_a_second_copy() -> None:
    network = model(routing="token")
    found = footprint(network, IMAGES, replace(PLAIN, ema_decay=0.9))
    average = ModelEmaV3(network, decay=0.9).module
    assert found.ema and not footprint(network, IMAGES, PLAIN).ema
    copied = sum(tensor.nbytes for tensor in (*average.parameters(), *average.buffers()))
    assert found.sum("dense") + found.sum("expert") + found.buffers == copied


def test_weights_stand_with_their_block_and_those_of_experts_apart() -> None:
    network = model(layers="last:1", routing="token")
    found = {each.name: each for each in footprint(network, 2, PLAIN).weights}
    assert list(found) == ["blocks.0", "blocks.1", "blocks.2", ""]
    layer = next(iter(moe_layers(network).values()))
    assert found["blocks.2"].expert == sum(p.nbytes for p in layer.experts.parameters())
    assert found["blocks.1"].expert == found[""].expert == 0
    assert found["blocks.0"].dense == sum(p.nbytes for p in network.blocks[0].parameters())
    delta = footprint(model(layers="last:1", experts="lora", rank=2), 2, PLAIN)  # a base that all share is dense
    assert 0 < delta.sum("expert") < found["blocks.2"].expert / 2


def test_the_tokens_of_all_slots_are_exchanged_four_times_a_layer_and_less_where_no_gradient_goes() -> None:
    network = model(layers="last:2", routing="token", top_k=2)
    first, last = footprint(network, IMAGES, PLAIN).exchanges
    assert (first.layer, first.times, first.bytes) == ("blocks.1.mlp", 4, 4 * IMAGES * 17 * 2 * 48)
    assert last.bytes == 4 * IMAGES * 1 * 2 * 48  # the head reads one token of the last block
    half = footprint(network, IMAGES, replace(PLAIN, precision="bf16")).exchanges[0]
    assert half.bytes == first.bytes / 2
    checkpointed = model(routing="token")
    checkpointed.set_grad_checkpointing()
    found = footprint(checkpointed, IMAGES, PLAIN).exchanges
    assert [(each.layer, each.times) for each in found] == [(f"blocks.{i}.mlp", 6) for i in range(3)]
    freeze_all_but(network, ["blocks.2.mlp"])
    assert [each.times for each in footprint(network, IMAGES, PLAIN).exchanges] == [2, 3]
    assert footprint(model(router="smear"), 2, PLAIN).exchanges == ()


def test_it_takes_no_memory_and_leaves_the_model_alone() -> None:
    with torch.device("meta"):
        network = vit(num_classes=7)
    state, hooks = copy.deepcopy(network.state_dict()), len(network._forward_hooks)
    found = footprint(network.eval(), 10**6, PLAIN)
    assert found.activations > 2e10
    assert not network.training and list(network.state_dict()) == list(state) and len(network._forward_hooks) == hooks
    assert all(p.is_meta and p.grad is None for p in network.parameters())


class Peeks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_model_whose_sizes_depend_on_values_is_refused() -> None:
    network = vit(num_classes=7)
    network.norm = Peeks()
    with pytest.raises(ConfigError, match="the memory of VisionTransformer cannot be counted, since sizes depend on"):
        footprint(network, 2, PLAIN)


@pytest.mark.parametrize("shares", [(1, 1), (2, 2), (1, 8), (4, 32)])
def test_the_moments_that_are_left_out_are_never_the_largest(shares: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    moments = [tuple(moment) for moment in random.integers(0, 1000, (200, 3)).tolist()]
    left = _largest(moments)
    assert len(left) < len(moments)
    of_left, of_all = ((np.array(each) / (1, *shares)).sum(axis=1).max() for each in (left, moments))
    assert of_left == of_all


def test_a_gradient_of_experts_is_divided_before_it_is_complete() -> None:
    """So twice the experts on twice the devices have the same peak."""
    few, many = (footprint(model(layers="last:1", routing="token", num_experts=n), 2, PLAIN) for n in (64, 128))
    two, four = (ParallelConfig(data=1, expert=count) for count in (2, 4))
    assert spread_peak(many, four) == pytest.approx(spread_peak(few, two), rel=0.02)


def test_the_runs_that_were_measured_are_within_a_tenth() -> None:
    """What torch allocates; of the process there is one exception, which the benchmark's table tells."""
    measured = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "memory.json").read_text("utf-8"))
    assert len(measured["rows"]) >= 8
    for row in measured["rows"].values():
        for name in ("weights", "gradients", "optimizer", "activations", "peak"):
            assert row["predicted"][name] == pytest.approx(row["measured"][name], rel=0.1)
