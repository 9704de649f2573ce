"""What a plan says of the start: a measured change, nothing where nothing changes, or why it was not measured."""

from __future__ import annotations

import copy
from pathlib import Path

import helpers.kinds  # noqa: F401  it registers kinds of routers and experts
import pytest
import timm
import torch
from helpers.commands import TINY, call
from helpers.tiny import config, images, randomise, vit
from torch import Tensor, nn

import vimoe
from vimoe.cli import main

CHANGES = {
    "drop": {"init": "drop"},
    "noise": {"init": "noise"},
    "split": {"init": "split", "num_shared_experts": 0, "top_k": 2},
    "narrow": {"expert_width": 48, "num_experts": 4},
    "sum": {"combine": "sum"},
}
KEPT = {"copy": {}, "two shared": {"num_shared_experts": 2}, "alone": {"num_shared_experts": 0, "top_k": 2}}


def last_output(model: nn.Module, x: Tensor) -> Tensor:
    found = []
    model.blocks[-1].register_forward_hook(lambda _m, _a, y: found.append(y.double()))
    with torch.no_grad():
        model(x)
    return found[0]


@pytest.mark.parametrize("start", CHANGES)
def test_the_change_is_that_of_the_last_blocks_output(start: str) -> None:
    model, x = vit(), images(vit(), 6)
    settings, given = config(**CHANGES[start]), [(x, torch.zeros(6))]
    found = vimoe.plan(model, settings, images=given)
    before = last_output(copy.deepcopy(model), x)
    torch.manual_seed(0)
    after = last_output(vimoe.upcycle(copy.deepcopy(model), settings), x)
    expected = (after - before).square().mean().sqrt() / before.square().mean().sqrt()
    assert found.start.change == pytest.approx(expected.item(), rel=1e-4) and expected > 1e-3
    line = f"start:  the last block's output changes by {expected:.2%} (root mean square, 6 images)"
    assert line in str(found).splitlines()


@pytest.mark.parametrize("start", KEPT)
def test_nothing_is_said_where_nothing_changes_by_construction(start: str) -> None:
    found = vimoe.plan(vit(), config(**KEPT[start]))
    assert found.start is None and "start:" not in str(found)
    assert vimoe.plan(vit(), config(layers="none")).start is None


def test_what_a_user_registers_is_measured_though_it_should_change_nothing() -> None:
    found = vimoe.plan(vit(), config(experts="low_rank"))
    assert found.start.change == pytest.approx(0, abs=1e-6)
    alone = vimoe.plan(vit(), config(router="expert_choice", num_shared_experts=0, routing="token"))
    assert alone.start.change > 1e-3  # tokens without an expert get nothing
    assert vimoe.plan(vit(), config(router="threshold")).start is None


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_numbers_stay(training: bool) -> None:
    model = vit(drop_path_rate=0.1).train(training)
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    state = torch.get_rng_state()
    first, second = (vimoe.plan(model, config(init="drop")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and first.start == second.start
    assert "8 images of standard normal values" in str(first)
    assert all(new is old for new, old in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training == training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_split_of_which_all_are_chosen_changes_nothing_but_rounding() -> None:
    settings = config(init="split", num_shared_experts=0, top_k=4, gate="choice")
    assert vimoe.plan(vit(), settings).start.change < 1e-5


def test_what_cannot_be_measured_says_why() -> None:
    cluster = config(init="cluster")
    assert "training images, which vimoe train has and vimoe.plan takes as images" in str(vimoe.plan(vit(), cluster))
    given = [(images(vit(), 12), torch.zeros(12, dtype=torch.long))]
    assert vimoe.plan(vit(), cluster, images=given).start.change > 1e-3
    found = vimoe.plan(vit().to("meta"), config(init="drop"))
    assert found.start.change is None and "the model has no weights here" in str(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "no images to measure a start on"), (torch.zeros(2, 3, 32, 32), "type Tensor: expected .images, labels.")],
)
def test_images_that_are_none_are_refused(given: object, message: str) -> None:
    with pytest.raises(vimoe.VimoeError, match=message):
        vimoe.plan(vit(), config(init="drop"), images=given)


def test_the_command_measures_where_weights_are_at_hand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    values = call(capsys, "plan", *TINY, "--moe.layers=all", "--moe.init=drop")
    assert values["moe"]["change"] is None
    assert call(capsys, "plan", *TINY, "--moe.layers=all")["moe"]["change"] is None
    model = vit()
    vimoe.save(model, tmp_path / "m")
    named = [f"--model.name=local-dir:{tmp_path / 'm'}", "--moe.layers=all", "--moe.num_experts=4"]
    drop = [*named, "--moe.init=drop"]
    expected = vimoe.plan(model, config(init="drop")).start.change
    assert call(capsys, "plan", *drop)["moe"]["change"] == pytest.approx(expected, rel=1e-4)
    assert main(["plan", *drop]) == 0 and f"output changes by {expected:.2%}" in capsys.readouterr().out
    assert call(capsys, "count", *drop)["moe"]["change"] is None  # which loads no weights
    assert main(["plan", *named, "--moe.init=cluster"]) == 0
    assert "vimoe train has" in capsys.readouterr().out
    assert main(["plan", *TINY, "--moe.layers=all", "--moe.init=noise"]) == 0
    assert "no weights here" in capsys.readouterr().out


def test_a_plan_names_gate_and_start_where_they_are_set() -> None:
    line = str(vimoe.plan(vit(), vimoe.MoEConfig(layers="last:1", gate="choice", init="noise"))).splitlines()[-1]
    assert line.endswith("1 shared, mix, gate=choice, init=noise")
    assert str(vimoe.plan(vit(), vimoe.MoEConfig(layers="last:1"))).endswith("1 shared, mix")


def test_the_last_block_of_a_model_of_stages_is_the_last_that_is_called() -> None:
    arguments = {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64)}
    model = randomise(timm.create_model("twins_svt_small", **arguments), scale=0.3).eval()
    assert vimoe.plan(model, config(init="noise", layers="last:1")).start.change > 1e-3


def test_where_the_last_block_is_not_known_the_change_is_not_measured() -> None:
    model = timm.create_model("coat_lite_tiny", img_size=64)
    found = vimoe.plan(model, config(init="noise", layers="serial_blocks4.1.mlp", routing="token"))
    assert found.start.change is None and "not known which block comes last" in str(found)


def test_the_last_block_of_a_model_of_transformers_may_return_more_than_tokens() -> None:
    pytest.importorskip("transformers")
    from helpers.tiny_transformers import vit as of_transformers

    planned = vimoe.plan(of_transformers("data2vec, split"), config(init="noise", layers="last:1"))
    assert planned.start.change > 1e-3
