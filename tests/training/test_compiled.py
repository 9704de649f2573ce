"""Compiled steps: what they compute, that evaluation and resuming know nothing of them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.kills import Killed, logs
from helpers.kills import kill_after as kill_after
from helpers.scene_runs import MOE, SCENES
from helpers.scenery import scenes
from helpers.slow import one_in
from helpers.tiny import vit
from helpers.trainings import QUICK, model, run, weights
from helpers.trainings import data as data
from safetensors.torch import load_file
from torch import fx, nn

import vimoe
from vimoe.cli import main
from vimoe.data.labelled_images import Data
from vimoe.data.loaders import preprocessing
from vimoe.errors import ConfigError
from vimoe.tasks.cached_features import FeatureCache
from vimoe.training import compiled
from vimoe.training.fuse import begin
from vimoe.training.loop import train
from vimoe.training.settle import settle

# torch.compile itself looks at it
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
BLOCKS, STEPS = 2, 3  # of the model; of an epoch


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Runs of compiled blocks, True for those with gradient. They compute the very same, since no code is generated."""
    seen: list[bool] = []

    def backend(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        def forward(*args: torch.Tensor) -> object:
            seen.append(torch.is_grad_enabled())
            return graph(*args)

        return forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    return seen


SETTINGS = {
    "with all around a step": {"ema_decay": 0.8, "mixup": 0.4, "hflip": 0.5, "distill_loss": 1.0, "accumulation": 2},
    "with routers that change": {"router_warmup_epochs": 1.0, "router_frozen": 0.5},
    "in bfloat16, of a part": {"precision": "bf16", "train_only": "moe"},
}


@pytest.mark.parametrize("name", one_in(3, SETTINGS))
def test_blocks_are_compiled_in_steps_alone(data: Data, tmp_path: Path, calls: list[bool], name: str) -> None:
    plain, summary = run(data, tmp_path / "plain", **SETTINGS[name])
    assert not calls
    network, found = run(data, tmp_path / "compiled", compile=True, **SETTINGS[name])
    assert calls == [True] * (QUICK.epochs * STEPS * BLOCKS)
    assert torch.equal(weights(plain), weights(network)) and summary["val"] == found["val"]
    assert logs(tmp_path / "plain") == logs(tmp_path / "compiled")
    assert plain.state_dict().keys() == network.state_dict().keys()
    assert not any("forward" in vars(block) for block in network.blocks)


@pytest.mark.parametrize("fuse", ["ewa", "exfusion"])
def test_layers_that_are_fused_are_compiled(data: Data, tmp_path: Path, calls: list[bool], fuse: str) -> None:
    found = []
    for compile in (False, True):
        network = model(num_shared_experts=0)
        begin(network, replace(QUICK, fuse=fuse))
        found.append(weights(run(data, tmp_path / str(compile), network, fuse=fuse, compile=compile)[0]))
    assert torch.equal(*found) and calls


def test_a_killed_training_ends_as_if_it_had_not_been(
    data: Data, tmp_path: Path, calls: list[bool], kill_after: object
) -> None:
    changes = {"compile": True, "checkpoint_minutes": 0, "hflip": 0.5}
    whole, _ = run(data, tmp_path / "whole", **changes)
    kill_after(4)
    with pytest.raises(Killed):
        run(data, tmp_path / "killed", **changes)
    kill_after(1000)
    calls.clear()
    again, _ = run(data, tmp_path / "killed", **changes)
    assert calls and torch.equal(weights(whole), weights(again))
    assert logs(tmp_path / "whole") == logs(tmp_path / "killed")


def test_blocks_that_are_computed_again_are_compiled(data: Data, tmp_path: Path, calls: list[bool]) -> None:
    found = []
    for compile in (False, True):
        network = vimoe.set_reading(model(), "all")  # as it does compiled
        network.set_grad_checkpointing(True)
        found.append(weights(run(data, tmp_path / str(compile), network, compile=compile)[0]))
        rows = (tmp_path / str(compile) / "load.csv").read_text()
        found.append(rows)
    assert torch.equal(found[0], found[2]) and found[1] == found[3]
    assert len(calls) == 2 * QUICK.epochs * STEPS * BLOCKS


def test_what_runs_on_cached_features_is_compiled(
    data: Data, tmp_path: Path, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    for compile in (False, True):
        network, config = model(layers=[1]), replace(QUICK, train_only="moe", compile=compile)
        trained, out = ["blocks.1.mlp"], tmp_path / str(compile)
        out.mkdir()
        job = FeatureCache(network, trained, data, preprocessing(network), config, views=1, workers=0).job()
        train(network, job, config, out, trained)
        found.append(weights(network))
    assert torch.equal(*found) and len(calls) == QUICK.epochs * STEPS


def test_scenes_are_learnt_by_compiled_steps(tmp_path: Path, calls: list[bool], kill_after: object) -> None:
    """With two stages, in each of which the blocks are compiled, and a run that is gone on with."""
    stages = ["--train.stages=[head,moe]", "--train.epochs=1", "--train.checkpoint_minutes=0"]
    argv = ["train", f"--data.path={scenes(tmp_path / 'scenes', train=9)}", *SCENES, *MOE, *stages]
    argv = [each for each in argv if each != "--train.epochs=3"]
    assert main([*argv, "--out", str(tmp_path / "eager")]) == 0
    kill_after(1)
    with pytest.raises(Killed):
        main([*argv, "--train.compile=true", "--out", str(tmp_path / "compiled")])
    kill_after(1000)
    assert main(["train", "--resume", str(tmp_path / "compiled")]) == 0
    assert calls
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("eager", "compiled"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_no_variant_of_a_block_is_left_to_run_uncompiled(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step computes would depend on what ran before it."""
    monkeypatch.setattr(compiled, "VARIANTS", 0.5)  # one of both blocks; each MoE layer is one
    with pytest.raises(ConfigError, match=r"^train\.compile=true: torch\.compile gave up \(.*limit") as raised:
        run(data, tmp_path / "few", vimoe.set_reading(model(), "all"), compile=True)
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(compiled, "VARIANTS", 1)
    for i in range(2):  # those of other models do not count
        run(data, tmp_path / str(i), vimoe.set_reading(model(), "all"), compile=True)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    network: nn.Module = vit()
    with pytest.raises(ConfigError, match=r"^train\.compile=true: there is no C\+\+ compiler 'no-such-compiler'"):
        settle(replace(QUICK, compile=True), 24, network)
    settle(QUICK, 24, network)


def test_a_compiler_that_does_not_work_is_one_line(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        raise RuntimeError("no Python.h\nand more")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    network = model()
    with pytest.raises(ConfigError, match=r"torch\.compile gave up \(.*no Python\.h\): .*; leave train\.compile out$"):
        run(data, tmp_path / "run", network, compile=True)
    assert not any("forward" in vars(block) for block in network.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_generated_code_is_exact_when_a_training_goes_on(
    data: Data, tmp_path: Path, kill_after: object, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The code is generated again, not found in torch's cache."""
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    changes = {"compile": True, "checkpoint_minutes": 0, "precision": precision, "router_warmup_epochs": 1.0}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    whole, _ = run(data, tmp_path / "whole", **changes)
    kill_after(4)
    with pytest.raises(Killed):
        run(data, tmp_path / "killed", **changes)
    kill_after(1000)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other code"))
    again, _ = run(data, tmp_path / "killed", **changes)
    assert list((tmp_path / "other code").rglob("*.cpp"))
    eager, _ = run(data, tmp_path / "eager", **{**changes, "compile": False})
    assert torch.equal(weights(whole), weights(again)) and not torch.equal(weights(whole), weights(eager))
