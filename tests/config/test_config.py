"""MoEConfig: what it refuses, its round trip through JSON, and that it needs no torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from vimoe.config.bench import LayerBench
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError, VimoeError, nearest

REFUSED = {
    "no layers": ({"layers": ""}, "expected one of all, none, last:N, every:N"),
    "empty list": ({"layers": []}, "expected one of all, none, last:N, every:N"),
    "last nothing": ({"layers": "last:0"}, "layers='last:0'.*expected.*last:N"),
    "last negative": ({"layers": "last:-1"}, "layers='last:-1'.*expected.*last:N"),
    "unknown word": ({"layers": "first:2"}, "layers='first:2'.*last:N"),
    "a bare index": ({"layers": 3}, r"block indices such as \[3, 4\]"),
    "a truth value as index": ({"layers": [True]}, "layers="),
    "a fraction as index": ({"layers": [0.5]}, "layers="),
    "misspelt routing": ({"routing": "imgae"}, "did you mean 'image'"),
    "misspelt combine": ({"combine": "mux"}, "did you mean 'mix'"),
    "negative experts": ({"num_experts": -1}, "num_experts=-1: expected a whole number of at least 0"),
    "experts as text": ({"num_experts": "8"}, "num_experts='8'"),
    "half an expert": ({"num_experts": 2.5}, "num_experts=2.5"),
    "true experts": ({"num_experts": True}, "num_experts=True"),
    "no choice": ({"top_k": 0}, "top_k=0: expected a whole number of at least 1"),
    "more choices than experts": ({"num_experts": 2, "top_k": 3}, "top_k=3: expected at most num_experts=2"),
    "negative shared": ({"num_shared_experts": -1}, "num_shared_experts=-1"),
    "dense of the parent's width": ({"num_experts": 0}, "num_shared_experts of at least 2, got 1"),
    "negative noise": ({"router_noise": -0.5}, "router_noise=-0.5: expected at least 0"),
    "noise as text": ({"router_noise": "1"}, "router_noise='1': expected at least 0"),
    "no number as noise": ({"router_noise": float("nan")}, "router_noise=nan: expected at least 0"),
    "negative bias rate": ({"bias_update_rate": -0.001}, "bias_update_rate=-0.001: expected 0 to 1"),
    "true bias rate": ({"bias_update_rate": True}, "bias_update_rate=True: expected 0 to 1"),
    "a bias rate above all probabilities": ({"bias_update_rate": 2}, "bias_update_rate=2: expected 0 to 1"),
    "negative dropout": ({"expert_dropout": -0.1}, "expert_dropout=-0.1: expected 0 to 0.99"),
    "dropout of everything": ({"expert_dropout": 1.0}, "expert_dropout=1.0: expected 0 to 0.99"),
    "normalised soft": (
        {"normalize_gates": True, "combine": "sum", "router": "soft", "routing": "token"},
        "normalize_gates=True with router",
    ),
    "normalised mix": ({"normalize_gates": True}, "normalize_gates=True with combine='mix'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_settings_are_refused_with_their_value_and_the_remedy(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(VimoeError, match=message):
        MoEConfig(**settings)


REFUSED_IN_TRAINING = {
    "negative router warm-up": ({"router_warmup_epochs": -1}, "router_warmup_epochs=-1: expected at least 0"),
    "negative expert decay": ({"expert_weight_decay": -0.1}, "expert_weight_decay=-0.1: expected at least 0"),
    "true expert decay": ({"expert_weight_decay": True}, "expert_weight_decay=True: expected at least 0"),
    "jitter beside a policy": (
        {"color_jitter": 0.4, "auto_augment": "rand-m9"},
        "color_jitter=0.4 with auto_augment='rand-m9': expected one",
    ),
    "no teacher": ({"distill_loss": 0.5}, "distill_loss=0.5 with ema_decay=0: expected a moving average.*set ema"),
    "no such word": ({"train_only": "lst:2"}, "train_only='lst:2': expected one of all, moe, experts, head.*'last:N'"),
    "no stage": ({"stages": ()}, r"stages=\(\): expected a list of parts, such as \[head, all, experts\]"),
    "no such stage": ({"stages": ("head", "lst:2")}, "stages='lst:2': expected one of all, moe, experts, head"),
    "a part beside stages": (
        {"stages": ("head", "all"), "train_only": "head"},
        r"train_only='head' with stages=\['head', 'all'\]: expected one of them.*leave train_only out",
    ),
    "a bare block": ({"train_only": 2}, "train_only=2: expected one of all.*block indices such as"),
    "no patience": ({"early_stopping": 0}, "early_stopping=0: expected a whole number of at least 1"),
    "half an epoch of patience": ({"early_stopping": 1.5}, "early_stopping=1.5: expected a whole number"),
}


@pytest.mark.parametrize("case", REFUSED_IN_TRAINING)
def test_impossible_settings_of_the_training_are_refused(case: str) -> None:
    settings, message = REFUSED_IN_TRAINING[case]
    with pytest.raises(VimoeError, match=message) as raised:
        TrainConfig(**settings)
    assert "\n" not in str(raised.value)


NAN, INF = math.nan, math.inf
SEEDS, FLAGS = [-1, 2**32, 0.5, True], ["no", 1, None]
COUNTS, SHARES = [0, -1, 1.5, True, "3"], [-0.1, 1.1, NAN, "0.5", True]
RATES = [-0.1, NAN, INF, "1", True, [1]]
# values that a setting cannot have; no list for what is free text, or is checked against the data or the model
OUT_OF_RANGE: dict[type, dict[str, list[Any] | None]] = {
    MoEConfig: {
        "layers": ["", [], "last:0", 3], "num_experts": COUNTS[1:], "top_k": COUNTS, "routing": ["imgae"],
        "num_shared_experts": COUNTS[1:], "combine": ["mux"], "normalize_gates": FLAGS, "router_noise": RATES,
        "bias_update_rate": SHARES, "balance_over": ["local", None], "expert_dropout": [*SHARES, 1.0],
        "router": ["sofmax", ["softmax"], None],
        "experts": ["fnn", {}], "gate": ["chioce", 1], "gate_weight": [*RATES, 0], "router_gradient": ["all", None],
        "init": ["cpoy", None], "drop_ratio": SHARES, "noise_std": RATES, "cluster_energy": [*SHARES, 0],
        "calibration_images": [*COUNTS, 1], "rank": COUNTS, "delta_density": SHARES, "expert_width": COUNTS,
        "slots_per_expert": COUNTS, "orthogonal": ["normalised", True],
        "groups": [[], 8, [0, 8], [2.0, 6], [True, 7], "8"], "capacity_factor": [*RATES, 0],
    },
    ModelConfig: {
        "name": None, "pretrained": FLAGS, "img_size": COUNTS, "num_classes": COUNTS, "drop_path_rate": [*SHARES, 1.0],
        "decoder": ["linaer"], "prompts": None, "prompt_mlp": FLAGS, "prompt_attention": ["level", None],
        "read": ["al"], "args": [[8], "depth", {"img_size": 8}],
    },
    DataConfig: {
        "path": None, "image_column": None, "label_column": None,
        "task": ["detection"], "train_split": ["val", "test"], "val_split": ["train", "test"],
        "test_split": ["train", "val"], "val_fraction": [*SHARES, 0, 1], "images_per_class": [*COUNTS, 1],
        "tasks": [*COUNTS, 1],
        "seed": SEEDS, "skip_unreadable": FLAGS, "cache": ["ram"], "views": COUNTS, "workers": [-1, 1.5, "2"],
        "crop_pct": [*SHARES, 0], "interpolation": ["bicubc"],
        "mean": [(123.675, 116.28, 103.53), (0.5, 0.5), (), 0.5, (-0.1, 0.5, 0.5), (NAN, 0.5, 0.5), ("a", "b", "c")],
        "std": [(58.395, 57.12, 57.375), (0.5,) * 4, 0.5, (0.0, 0.5, 0.5), (0.5, 0.5, INF), (0.5, 0.5, True)],
        "inference": ["windows"], "flip_test": FLAGS,
    },
    TrainConfig: {
        "epochs": COUNTS, "batch_size": COUNTS, "accumulation": COUNTS, "lr": RATES, "min_lr": RATES,
        "warmup_epochs": RATES, "weight_decay": RATES, "layer_decay": [*SHARES, 0], "router_lr_scale": RATES,
        "expert_lr_scale": RATES, "entropy_loss": RATES, "variance_loss": RATES, "orthogonal_loss": RATES,
        "mutual_loss": RATES,
        "distill_loss": [*RATES, 1.0],
        "router_weight_decay": RATES, "router_warmup_epochs": RATES, "expert_weight_decay": RATES,
        "train_only": ["", [], "last:0", 3, None, "first:2"], "stages": ["head", [], 3, [3], ["head", "last:0"]],
        "fuse": ["eva"], "fuse_rate": SHARES, "router_frozen": SHARES, "route_loss": RATES,
        "router_freeze_epochs": COUNTS[1:], "router_freeze_margin": RATES, "locality_loss": RATES,
        "balance_loss": RATES, "z_loss": RATES,
        "importance_loss": RATES, "oracle_loss": RATES, "oracle_temperature": [*RATES, 0],
        "label_smoothing": [*SHARES, 1], "mixup": RATES, "cutmix": RATES, "auto_augment": None,
        "random_erasing": SHARES, "min_crop": [*SHARES, 0], "hflip": SHARES, "color_jitter": SHARES,
        "min_scale": [*RATES, 0, 3.0], "max_scale": [*RATES, 0, 0.1], "dice_loss": RATES,
        "class_weights": ["inverse"], "ema_decay": [*SHARES, 1], "clip_grad": RATES, "early_stopping": COUNTS,
        "val_interval": COUNTS,
        "precision": ["float32", "bfloat16", None], "compile": FLAGS, "seed": SEEDS, "checkpoint_minutes": RATES,
        "tensorboard": FLAGS, "parallel": [{"data": 2}, 2, None],
    },
    LayerBench: {
        "images": COUNTS, "dtype": ["float16"], "precision": ["fp16"], "rounds": [*COUNTS, 1], "tokens": COUNTS,
        "dim": COUNTS, "hidden": COUNTS, "load": ["even"],
    },
}  # fmt: skip


@pytest.mark.parametrize("config", OUT_OF_RANGE, ids=lambda config: config.__name__)
def test_every_setting_refuses_what_is_out_of_its_range_by_name(config: type) -> None:
    assert {field.name for field in fields(config)} == set(OUT_OF_RANGE[config])
    for name, values in OUT_OF_RANGE[config].items():
        for value in values or []:
            with pytest.raises(VimoeError) as raised:
                config(**{name: value})
                pytest.fail(f"{name}={value!r} was taken")
            message = str(raised.value)
            assert name in message and "\n" not in message and ": expected" in message, message


def test_a_normalisation_of_pixels_in_0_to_255_is_told_what_to_do() -> None:
    for name in ("mean", "std"):
        with pytest.raises(VimoeError, match=rf"{name}=.*58.395.*: expected values in 0..1; divide by 255"):
            DataConfig(**{name: (58.395, 57.12, 57.375)})
    for good in ((0.0, 0.5, 1.0), [0.485, 0.456, 0.406], (0.5,)):
        assert DataConfig(mean=good).mean == good


ACCEPTED = [
    {},
    {"router_noise": 1.0, "bias_update_rate": 0.001, "expert_dropout": 0.4},
    {"layers": "all"},
    {"layers": "every:2", "routing": "token"},
    {"layers": [0, -1], "combine": "sum", "normalize_gates": True},
    {"layers": ["blocks.1?.mlp", 3], "num_experts": 0, "num_shared_experts": 3},
    {"layers": "none", "num_experts": 1, "num_shared_experts": 0},
]


@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_settings_round_trip_through_json(settings: dict) -> None:
    config = MoEConfig(**settings)
    text = json.dumps(config.to_dict())
    assert MoEConfig.from_dict(json.loads(text)) == config
    assert {**json.loads(text), **settings} == json.loads(text)
    hash(config)


def test_a_misspelt_setting_in_a_file_is_refused() -> None:
    with pytest.raises(VimoeError, match="unknown MoE setting 'num_expert': did you mean 'num_experts'"):
        MoEConfig.from_dict({"num_expert": 8})


def test_a_file_may_have_fewer_settings() -> None:
    assert MoEConfig.from_dict({"num_experts": 4}) == MoEConfig(num_experts=4)


def test_a_config_cannot_be_changed_nor_given_by_position() -> None:
    with pytest.raises(AttributeError):
        MoEConfig().top_k = 2
    with pytest.raises(TypeError):
        MoEConfig("all")


def test_nearest_suggests_a_name_or_lists_them() -> None:
    assert nearest("lst:2", ["last:2", "all"]) == "did you mean 'last:2'?"
    assert nearest("xyz", ["image", "token"]) == "known: image, token"


def imports_torch(code: str) -> bool:
    """Whether a fresh interpreter has imported torch after this code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('torch' in sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() == "True"


@pytest.mark.parametrize("code", ["import vimoe", "import vimoe.config.moe", "import vimoe; vimoe.MoEConfig()"])
def test_the_config_imports_no_torch(code: str) -> None:
    assert not imports_torch(code)


@pytest.mark.slow  # 6 s
def test_the_check_for_torch_can_fail() -> None:
    assert imports_torch("import vimoe; vimoe.balance_loss")


def test_a_model_that_the_caller_has_registered_with_timm_is_known() -> None:
    import timm
    from timm.models import register_model

    from vimoe.config.model import ModelConfig
    from vimoe.models.names import check_name

    def vit_of_the_caller(pretrained: bool = False, **kwargs: object) -> object:
        return timm.create_model("vit_tiny_patch16_224", pretrained=pretrained, **kwargs)

    vit_of_the_caller.__module__ = __name__
    register_model(vit_of_the_caller)
    check_name(ModelConfig(name="vit_of_the_caller"))


@pytest.mark.parametrize("make", [lambda x: DataConfig(path=x), lambda x: ModelConfig(name=x)])
def test_a_path_in_place_of_a_text_is_one_line(make: Callable) -> None:
    with pytest.raises(ConfigError, match=r"(path|name)=.*Path.*: expected a text; write str"):
        make(Path("x"))
