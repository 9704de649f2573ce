"""Parameters and multiply-adds: the paper's figures, formulas by hand, and what really runs."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
from helpers.flops import macs
from helpers.slow import one_in
from helpers.tiny import FAMILIES, config, images, upcycle, vit
from torch import nn

import vimoe


def imagenet(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, img_size=224, num_classes=1000)


def paper(layers: str) -> vimoe.MoEConfig:
    return vimoe.MoEConfig(layers=layers, num_experts=8, top_k=1, routing="image", num_shared_experts=1)


@pytest.mark.parametrize(
    ("layers", "activated", "macs"), [("none", 22.01e6, 6.12e9), ("last:2", 24.38e6, 6.73e9), ("all", 36.2e6, 9.76e9)]
)
def test_vit_small_costs_what_table_1_of_vimoe_says(layers: str, activated: float, macs: float) -> None:
    cost = vimoe.count(vimoe.upcycle(imagenet("vit_small_patch14_dinov2"), paper(layers)))
    assert cost.activated_params == pytest.approx(activated, rel=0.005)
    assert cost.macs == pytest.approx(macs, rel=0.005)


def test_vit_base_costs_what_its_shapes_say() -> None:
    model = imagenet("vit_base_patch14_dinov2")
    dense = vimoe.count(model)
    assert dense.params == dense.activated_params == pytest.approx(86.5e6, rel=0.005)
    assert dense.macs == pytest.approx(23.2e9, rel=0.005)
    assert dense.moe_layers == ()
    moe = vimoe.count(vimoe.upcycle(model, paper("last:2")))
    ffn, router = 768 * 3072 * 2 + 3072 + 768, 768 * 8
    assert moe.params == dense.params + 2 * (8 * ffn + router)
    assert moe.activated_params == dense.params + 2 * (ffn + router)
    assert moe.macs == dense.macs + 2 * (257 * 768 * 3072 * 2 + router)
    assert moe.moe_layers == ("blocks.10.mlp", "blocks.11.mlp")


def assert_counted(model: nn.Module) -> None:
    """What is computed, and what would be if all tokens were."""
    cost = vimoe.count(model)
    x = images(model, batch=1)
    assert cost.computed_macs == macs(model, x)
    assert cost.macs == macs(vimoe.set_reading(copy.deepcopy(model), "all"), x)


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("combine", ["mix", "sum"])
def test_counted_macs_are_those_that_run(combine: str, routing: str, k: int, shared: int) -> None:
    settings = config(layers="last:1", routing=routing, top_k=k, num_shared_experts=shared, combine=combine)
    model = upcycle(vit(), settings)
    assert_counted(model)


@pytest.mark.parametrize(("family", "routing"), one_in(3, itertools.product(FAMILIES, ["image", "token"])))
def test_counted_macs_are_those_that_run_in_every_family(family: str, routing: str) -> None:
    model = vit(family)
    assert_counted(model)
    upcycle(model, config(routing=routing, top_k=2, num_shared_experts=2))
    assert_counted(model)


@pytest.mark.parametrize("k", [1, 2])
def test_activated_parameters_are_all_but_the_experts_that_were_not_chosen(k: int) -> None:
    model = upcycle(vit("inner norm"), config(top_k=k, num_shared_experts=2))
    cost = vimoe.count(model)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.activated_params == cost.params - experts * (4 - k) // 4


def test_a_dense_control_activates_all_that_it_has() -> None:
    control = vimoe.count(upcycle(vit(), config(num_experts=0, num_shared_experts=2)))
    mixture = vimoe.count(upcycle(vit(), config(num_experts=4, top_k=1, num_shared_experts=1)))
    assert control.activated_params == control.params
    # as wide as one shared expert and one routed expert: apart from the router and one last bias a layer
    assert mixture.activated_params - control.activated_params == 2 * (4 * 24 + 24)
    assert mixture.macs - control.macs == 2 * 4 * 24


def test_macs_follow_the_input_size() -> None:
    model = upcycle(vit(dynamic_img_size=True), config(routing="token"))
    small, large = vimoe.count(model), vimoe.count(model, input_size=(3, 64, 64))
    assert small.params == large.params
    assert large.macs > 3 * small.macs


def test_counting_changes_nothing() -> None:
    model = upcycle(vit(), config()).train()
    before, output = copy.deepcopy(model.state_dict()), model(images(model))
    vimoe.count(model)
    assert model.training
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(images(model)), output)


def test_a_cost_prints_in_readable_units() -> None:
    assert str(vimoe.count(imagenet("vit_small_patch14_dinov2"))).startswith("22.0")


def test_an_adapted_shared_expert_counts_and_is_not_averaged() -> None:
    model = vimoe.upcycle(vit(depth=2), vimoe.MoEConfig(layers="last:1"))
    plain = vimoe.count(model).macs
    nn.utils.parametrizations.weight_norm(model.blocks[1].mlp.shared.fc1)
    assert vimoe.count(model).macs == plain
    with pytest.raises(vimoe.VimoeError, match=r"blocks\.1\.mlp \(block 1\): fc1 is a .*remove quantisation or param"):
        vimoe.densify(model, how="merge")
