"""`vimoe plan --devices`: the settings of a training decide, nothing has memory, and mistakes are one line."""

from __future__ import annotations

import pytest
from helpers.commands import TINY, call, refused

from vimoe.cli import main
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.experiments.size import size_of
from vimoe.models.create import create_without_weights
from vimoe.models.upcycling import build_layers
from vimoe.training.footprint import footprint

MODEL = [*TINY, "--model.num_classes=5", "--moe.layers=all", "--moe.num_experts=4", "--moe.routing=token"]
EIGHT = ["--devices=8", "--memory=1GB", "--train.batch_size=32"]


def test_the_plan_gives_every_layout_and_the_one_to_take(capsys: pytest.CaptureFixture[str]) -> None:
    size = call(capsys, "plan", *MODEL, *EIGHT)["size"]
    assert (size["devices"], size["limit"], size["images"], size["precision"]) == (8, 1e9, 4, "bf16")
    assert size["layout"] == size["layouts"][0]
    assert {name: size["layout"][name] for name in ("data", "fsdp", "expert")} == {"data": 8, "fsdp": 1, "expert": 1}
    assert {each["expert"] for each in size["layouts"]} == {1, 2, 4} and len(size["layouts"]) == 9
    assert set(size["layout"]["memory"]) == {
        "weights", "optimizer", "ema", "step", "gradients", "activations", "temporary", "total",
    }  # fmt: skip
    assert size["layout"]["sent"]["data"] == pytest.approx(2 * 7 / 8 * size["layout"]["memory"]["gradients"])


def test_weights_are_those_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    values = call(capsys, "plan", *MODEL, *EIGHT)
    assert values["size"]["layout"]["memory"]["weights"] == 4 * values["moe"]["params"]


CHANGES = {  # settings, the figure that they change, and whether that becomes more
    "a moving average": ({"train": {"ema_decay": 0.9}}, "ema", True),
    "a frozen trunk": ({"train": {"train_only": "moe"}}, "gradients", False),
    "float32": ({"train": {"precision": "no"}}, "activations", False),  # casts of weights are more than these tokens
    "more images": ({"train": {"batch_size": 64}}, "activations", True),
    "more experts": ({"moe": {"num_experts": 8}}, "optimizer", True),
    "accumulation": ({"train": {"accumulation": 2}}, "step", True),
}
TINY_VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def memory(moe: dict | None = None, train: dict | None = None, **data: str) -> dict[str, float]:
    settings = Settings(
        model=ModelConfig(name="vit_tiny_patch16_224", img_size=16, num_classes=5, args=TINY_VIT),
        moe=MoEConfig(**{"layers": "last:1", "num_experts": 4, "routing": "token", **(moe or {})}),
        data=DataConfig(**data),
        train=TrainConfig(**{"batch_size": 32, **(train or {})}),
    )
    (asked,) = size_of(settings, 4, 1e9).layouts[-1:]
    return asked.memory


@pytest.mark.parametrize("change", CHANGES)
def test_the_settings_of_the_training_change_the_figures(change: str) -> None:
    settings, name, more = CHANGES[change]
    before, after = memory()[name], memory(**settings)[name]
    assert (after > before) == more and after != before


def test_cached_features_leave_the_trunk_out() -> None:
    frozen, cached = (memory(train={"train_only": "moe"}, cache=cache) for cache in ("none", "features"))
    assert cached["activations"] < frozen["activations"] and cached["weights"] == frozen["weights"]


def test_fused_layers_are_the_one_ffn_of_each_step() -> None:
    moe = {"num_shared_experts": 0, "routing": "image"}
    assert memory(moe, {"fuse": "exfusion"})["weights"] != memory(moe)["weights"]


def test_text_and_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *MODEL, *EIGHT, "--train.parallel.expert=4"]) == 0
    text = capsys.readouterr().out
    assert "before: " in text and "train.parallel={data: 2, fsdp: 1, expert: 4} fits: " in text
    wrong = {
        ("--devices=8",): "--memory is required",
        ("--memory=80GB",): "--devices is required",
        ("--devices=0", "--memory=80GB"): "--devices 0: expected at least 1",
        ("--devices=8", "--memory=80"): "memory='80': expected the memory of a device",
        ("--devices=8", "--memory=1GB", "--train.batch_size=20"): "train.batch_size=20 over 8 processes",
        (*EIGHT, "--train.parallel.fsdp=3"): "expected sizes whose product is 8",
        (*EIGHT, "--train.parallel.expert=8"): "train.parallel.expert=8 with moe.num_experts=4",
        (*EIGHT, "--train.precision=fp16", "--train.parallel.expert=2"): "train.precision=fp16 with train.parallel",
        (*EIGHT, "--data.task=segmentation"): "data.task='segmentation' with --devices: expected 'classification'",
        (*EIGHT, "--train.locality_loss=0.5"): "train.locality_loss=0.5 with --devices: expected 0",
        (*EIGHT, "--train.stages=[head,all,experts]"): "with --devices: expected one training",
        ("--train.lr=1",): "unknown option --train.lr",
    }
    for argv, message in wrong.items():
        assert message in refused(capsys, "plan", *MODEL, *argv)
    assert "unknown option --devices" in refused(capsys, "count", *MODEL, "--devices=8")


@pytest.mark.parametrize(
    "setting", ["--train.compile=true", "--train.precision=fp16", "--moe.router_gradient=default_vectors"]
)
def test_a_layout_that_a_training_refuses_is_not_recommended(capsys: pytest.CaptureFixture[str], setting: str) -> None:
    size = call(capsys, "plan", *MODEL, "--devices=2", "--memory=1MB", "--train.batch_size=32", setting)["size"]
    assert [(each["data"], each["fsdp"], each["expert"]) for each in size["layouts"]] == [(2, 1, 1)]


def test_a_batch_that_a_training_refuses_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", *MODEL, "--devices=8", "--memory=1GB", "--train.batch_size=8", "--train.mixup=0.5"]
    assert "over 8 processes: expected a multiple of 16, since images are mixed in pairs" in refused(capsys, *command)


def test_a_giant_with_128_experts_has_no_memory_until_it_is_planned() -> None:
    name = "vit_giant_patch14_dinov2"
    model = create_without_weights(ModelConfig(name=name, num_classes=1000, args={"depth": 2}))
    build_layers(model, MoEConfig(layers="last:1", num_experts=128))
    found = footprint(model, 64, TrainConfig())
    assert found.sum("expert") > 9e9 and found.activations > 1e9
