"""A training goes straight from settings to a run: each step once, in one order, and mistakes before any work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from helpers.kills import Killed, logs
from helpers.kills import kill_after as kill_after
from helpers.pictures import roles
from helpers.slow import one_in
from helpers.trainings import rows
from torch import Tensor, nn

import vimoe.experiments.train
import vimoe.tasks.classification
import vimoe.tasks.classification_job
from vimoe import run_folder
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import ROUTERS, MoEConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.data.order import Shuffled
from vimoe.errors import ConfigError, DataError, FolderError, VimoeError
from vimoe.experiments.finished_run import FinishedRun
from vimoe.experiments.train import check_outside, resume_training, run_training
from vimoe.files import TEMPORARY
from vimoe.models.model_folder import load
from vimoe.moe.layer import moe_layers
from vimoe.moe.routers.softmax import SoftmaxRouter
from vimoe.process import Process

STEPS = [
    (vimoe.tasks.classification, "load_data"),
    (vimoe.tasks.classification, "create"),
    (vimoe.experiments.train, "convert"),
    (vimoe.experiments.train, "preprocessing"),
    (vimoe.tasks.classification, "scan"),
    (run_folder, "new_run"),  # a folder that cannot be made costs no features
    (vimoe.tasks.classification, "FeatureCache"),
    (vimoe.tasks.classification_job, "train_loader"),
    (vimoe.experiments.train, "train"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return roles(tmp_path_factory.mktemp("photos"), train=4, val=2, test=0)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the steps that were taken, as they are taken."""
    taken: list[str] = []

    def noted(module: object, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **more: (taken.append(name), real(*args, **more))[1])

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module, name in STEPS:
        noted(module, name)
    return taken


def settings(photos: Path, **changes: dict) -> Settings:
    args = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    given = {"name": "vit_tiny_patch16_224", "pretrained": False, "img_size": 16, "args": args}
    model = ModelConfig(**{**given, **changes.get("model", {})})
    values = {"epochs": 1, "warmup_epochs": 0, "batch_size": 4, "tensorboard": False, **changes.get("train", {})}
    data = DataConfig(path=str(photos), workers=0, **changes.get("data", {}))
    moe = MoEConfig(**{"layers": "last:1", "num_experts": 3, **changes.get("moe", {})})
    return Settings(model=model, moe=moe, data=data, train=TrainConfig(**values))


@pytest.mark.parametrize("cache", ["none", "features"])
def test_each_step_is_taken_once_and_in_order(photos: Path, tmp_path: Path, steps: list[str], cache: str) -> None:
    train = {"train_only": "moe"} if cache == "features" else {}
    run_training(settings(photos, data={"cache": cache}, train=train), tmp_path / "run")
    expected = [name for _, name in STEPS if name != "FeatureCache" or cache == "features"]
    assert steps == expected


MISTAKES = {
    "layers that the model does not have": ({"moe": {"layers": "last:9"}}, "expected at most 2", "convert"),
    "an augmentation that timm does not know": (
        {"train": {"auto_augment": "rnd-m9"}}, "auto_augment='rnd-m9'", "preprocessing",
    ),
    "features of what is trained": (
        {"moe": {"layers": "all"}, "data": {"cache": "features"}, "train": {"train_only": "moe"}},
        "is in the first block and trained", "preprocessing",
    ),
    "a warm-up that takes all": ({"train": {"warmup_epochs": 1}}, "warmup_epochs=1 of train.epochs=1", "convert"),
    "more super-classes than classes": (
        {"moe": {"router": "superclass", "num_experts": 8}}, "num_experts=8 with router='superclass' and images of 3",
        "load_data",
    ),
    "fewer images than experts to start from": (
        {"moe": {"router": "centroids", "calibration_images": 2}}, "2 images to start 3 experts", "load_data",
    ),
    "images that no router needs": (
        {"moe": {"calibration_images": 9}}, "calibration_images=9 with init='copy' and router='softmax'", "convert",
    ),
    "rates of a router that has nothing to learn": (
        {"moe": {"router": "random"}, "train": {"router_lr_scale": 2.0}}, "router_lr_scale=2 with moe.router='random'",
        "convert",
    ),
    "a folder that is not there": ({"data": {"train_split": "trian"}}, "train_split='trian': no such", "load_data"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_told_before_an_image_is_opened(photos: Path, tmp_path: Path, steps: list[str], what: str) -> None:
    changes, message, last = MISTAKES[what]
    with pytest.raises((ConfigError, DataError, ValueError), match=message):
        run_training(settings(photos, **changes), tmp_path / "run")
    assert steps[-1] == last and "scan" not in steps
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models whose weights were asked for; they get random ones."""
    asked, real = [], timm.create_model

    def create(name: str, pretrained: bool, **more: object) -> object:
        asked.extend([name] * pretrained)
        return real(name, pretrained=False, **more)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr("vimoe.models.timm_vit.check_answers", lambda repo: None)  # nothing comes from the hub
    return asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": {"layers": "blocks.99.mlp"}}, "layers='blocks.99.mlp' names no FFN"),
        ({"train": {"warmup_epochs": 3, "epochs": 2}}, "warmup_epochs=3 of train.epochs=2: expected less"),
        ({"train": {"precision": "fp16"}}, "precision='fp16': expected a GPU"),
        (
            {"moe": {"router": "fixed"}, "train": {"epochs": 2, "router_warmup_epochs": 1}},
            "router_warmup_epochs=1 with moe.router='fixed'",
        ),
    ],
)
def test_contradictions_are_told_before_weights_are_downloaded(
    photos: Path, tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch, changes: dict, message: str
) -> None:
    if "fp16" in message and Process().device.type != "cpu":
        pytest.skip("a GPU has float16")
    monkeypatch.setitem(ROUTERS, "fixed", type("Fixed", (SoftmaxRouter,), {"adjustable": False}))
    with pytest.raises(VimoeError, match=message):
        run_training(settings(photos, model={"pretrained": True}, **changes), tmp_path / "run")
    assert downloads == [] and not (tmp_path / "run").exists()


def test_settings_that_are_settled_are_told_once(
    photos: Path, tmp_path: Path, downloads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "vimoe"):
        run_training(settings(photos, model={"pretrained": True}, train={"batch_size": 99}), tmp_path / "run")
    assert downloads == ["vit_tiny_patch16_224"]
    assert caplog.text.count("train.batch_size=99 is lowered to 12") == 1 == caplog.text.count("train.precision auto")


def test_a_model_that_cannot_be_saved_is_not_trained(
    photos: Path, tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_more: object) -> None:
        raise FolderError("nothing notes how it is built")

    monkeypatch.setattr(vimoe.experiments.train, "save", refuse)
    with pytest.raises(FolderError, match="nothing notes how it is built"):
        run_training(settings(photos), tmp_path / "run")
    assert "train" not in steps and "train_loader" not in steps and not list((tmp_path / "run").iterdir())


def test_a_link_to_itself_in_the_data_is_no_place(tmp_path: Path) -> None:
    photos, link = roles(tmp_path / "photos", train=1, val=1, test=0), tmp_path / "photos" / "train" / "link"
    link.symlink_to("link")
    check_outside("--out", tmp_path / "run", photos)
    with pytest.raises(ConfigError, match="run lies in .*photos"):
        check_outside("--out", photos / "run", photos)


def test_leftovers_of_a_training_that_was_killed_before_it_began_are_deleted(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / f"{TEMPORARY}model").mkdir(parents=True)
    run_training(settings(photos), tmp_path / "run")
    assert not list((tmp_path / "run").glob(f"{TEMPORARY}*"))


ORDER = ("head", "all", "experts")
STAGED = {"stages": ORDER, "epochs": 2, "checkpoint_minutes": 0.0, "lr": 1e-2}


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """States and logits of the model before and after each training."""
    seen: list[dict] = []
    real = vimoe.experiments.train.train
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def note(model: nn.Module) -> dict:
        with torch.no_grad():
            logits = model.eval()(x.to(next(model.parameters()).device))
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return {"layers": list(moe_layers(model)), "logits": logits, "state": state}

    def train(model: nn.Module, *given: object) -> dict:
        seen.append({"before": note(model)})
        summary = real(model, *given)
        seen[-1]["after"] = note(model)
        return summary

    monkeypatch.setattr(vimoe.experiments.train, "train", train)
    return seen


def moved(training: dict) -> set[str]:
    before, after = (training[when]["state"] for when in ("before", "after"))
    assert before.keys() == after.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_a_stage_begins_where_the_one_before_ended_and_moves_what_it_names(
    photos: Path, tmp_path: Path, trainings: list[dict]
) -> None:
    """And MoE layers come in where experts are trained, of the FFNs that the stages before have trained."""
    summary = run_training(settings(photos, train=STAGED), tmp_path / "run")
    head, whole, experts = trainings
    layer = "blocks.1.mlp"
    assert [t["before"]["layers"] for t in trainings] == [[], [], [layer]]
    assert head["after"]["state"].keys() == whole["before"]["state"].keys()
    assert all(torch.equal(head["after"]["state"][n], w) for n, w in whole["before"]["state"].items())
    torch.testing.assert_close(experts["before"]["logits"], whole["after"]["logits"], rtol=0, atol=1e-5)
    fc1 = whole["after"]["state"][f"{layer}.fc1.weight"]
    assert not torch.equal(fc1, head["after"]["state"][f"{layer}.fc1.weight"])  # what stage II has trained is copied
    assert all(torch.equal(fc1, copied) for copied in experts["before"]["state"][f"{layer}.experts.fc1.weight"])

    classifier = {"head.weight", "head.bias"}
    assert moved(head) == classifier
    assert len(moved(whole)) > 20 and {f"{layer}.fc1.weight", "patch_embed.proj.weight"} <= moved(whole)
    assert {name.rpartition(".")[0] for name in moved(experts)} == {
        "head", f"{layer}.experts.fc1", f"{layer}.experts.fc2", f"{layer}.router",
    }  # fmt: skip
    assert [(s["train_only"], s["epochs"]) for s in summary["stages"]] == [(part, 2) for part in ORDER]
    assert summary["epochs"] == 6 and summary["best_epoch"] == summary["stages"][-1]["best_epoch"] in (5, 6)
    assert summary["stages"][-1]["val"] == summary["val"]
    metrics = rows(tmp_path / "run" / "metrics.csv")
    assert [(row["epoch"], row["stage"]) for row in metrics] == [(str(i + 1), ORDER[i // 2]) for i in range(6)]
    assert [bool(row["train_balance_loss"]) for row in metrics] == [False] * 4 + [True] * 2
    assert {row["epoch"] for row in rows(tmp_path / "run" / "load.csv")} == {"5", "6"}
    rates = [float(row["lr"]) for row in metrics]
    assert rates[0] == rates[2] == rates[4] > rates[1] == rates[3] == rates[5]  # each has its own schedule
    assert moe_layers(load(tmp_path / "run" / "model"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "the other: head (2 epochs), all (2 epochs), experts (2 epochs)." in page
    assert FinishedRun(tmp_path / "run").prune(tmp_path / "pruned", tolerance=9.0, recover=1)["recovery_epochs"] == 1


def run_state(run: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load(run / "model").state_dict()
    return state


@pytest.mark.parametrize("killed_after", one_in(3, [4, 0, 6, 12, 8, 15]))
def test_a_killed_stage_is_gone_on_with_to_the_same_bits(
    photos: Path, tmp_path: Path, kill_after: object, killed_after: int
) -> None:
    """Three stages of six steps: killed in each, and after the first step of one."""
    asked = settings(photos, train={**STAGED, "ema_decay": 0.5})
    whole = run_training(asked, tmp_path / "whole")
    kill_after(killed_after)
    with pytest.raises(Killed):
        run_training(asked, tmp_path / "killed")
    kill_after(1000)
    again = resume_training(tmp_path / "killed")
    ours, theirs = run_state(tmp_path / "whole"), run_state(tmp_path / "killed")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert logs(tmp_path / "whole") == logs(tmp_path / "killed")
    assert whole["stages"] == again["stages"] and whole["val"] == again["val"]


def test_a_training_goes_on_from_another_working_directory(
    photos: Path, tmp_path: Path, kill_after: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_training(settings(photos), "dense")
    asked = settings(photos, model={"name": "local-dir:dense/model", "args": {}})
    kill_after(2)
    with pytest.raises(Killed):
        run_training(asked, "killed")
    kill_after(1000)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume_training(tmp_path / "killed")["val"]["images"] == 6


@pytest.mark.parametrize("name", ["transformers:{}here", "transformers:nowhere/vit", "vit_tiny_patch16_224"])
def test_names_and_class_vectors_are_noted_for_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    model = ModelConfig(name=name.format(""), decoder="prompted", prompts="words.safetensors")
    asked = Settings(model=model, data=DataConfig(path="digits", task="segmentation"))
    there = replace(model, name=name.format(f"{tmp_path}/"), prompts=f"{tmp_path}/words.safetensors")
    assert vimoe.experiments.train._from_anywhere(asked) == replace(asked, model=there)


def test_a_training_killed_between_two_stages_too(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = settings(photos, train=STAGED), vimoe.experiments.train.convert
    run_training(asked, tmp_path / "whole")

    def die(model: nn.Module, moe: MoEConfig, *more: object) -> list[str]:
        if moe.layers != "none":
            raise Killed
        return real(model, moe, *more)

    with monkeypatch.context() as patch:
        patch.setattr(vimoe.experiments.train, "convert", die)
        with pytest.raises(Killed):
            run_training(asked, tmp_path / "killed")
    resume_training(tmp_path / "killed")
    ours, theirs = run_state(tmp_path / "whole"), run_state(tmp_path / "killed")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert logs(tmp_path / "whole") == logs(tmp_path / "killed")


def test_a_router_is_computed_from_images_when_it_comes_in(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And from what the model then computes for them."""
    seen = []

    class Seeing(SoftmaxRouter):
        needs_images = True

        def calibrate(self, calibration: object) -> None:
            seen.append(calibration.features.clone())

    monkeypatch.setitem(ROUTERS, "seeing", Seeing)
    moe = {"router": "seeing", "calibration_images": 6}
    for stages in (("experts",), ORDER):
        run_training(settings(photos, moe=moe, train={**STAGED, "stages": stages}), tmp_path / str(len(stages)))
    assert len(seen) == 2 and len(seen[0]) == len(seen[1]) == 6 and not torch.allclose(*seen)


def test_one_stage_is_a_training_of_that_part(photos: Path, tmp_path: Path) -> None:
    run_training(settings(photos, train={"train_only": "experts", "epochs": 2}), tmp_path / "plain")
    run_training(settings(photos, train={"stages": ("experts",), "epochs": 2}), tmp_path / "staged")
    ours, theirs = run_state(tmp_path / "plain"), run_state(tmp_path / "staged")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_each_stage_draws_other_batches_and_other_augmentation(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[tuple[int, int], ...]] = []
    real = Shuffled.__iter__

    def noting(order: Shuffled) -> Iterator[tuple[int, int]]:
        drawn.append(tuple(real(order)))
        return iter(drawn[-1])

    monkeypatch.setattr(Shuffled, "__iter__", noting)
    run_training(settings(photos, train={**STAGED, "stages": ("head", "experts")}), tmp_path / "run")
    assert len(drawn) == len(set(drawn)) == 4 and len({pair for epoch in drawn for pair in epoch}) == 4 * len(drawn[0])


def test_stages_of_a_frozen_trunk_read_its_features(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = settings(photos, data={"cache": "features"}, train={**STAGED, "stages": ("head", "experts")})
    summary = run_training(asked, tmp_path / "run")
    assert summary["features"]["before"] == "blocks.1" and len(list((tmp_path / "cache").rglob("*.npy"))) == 3


WRONG_STAGES = {
    "super-classes that are not there": (
        {"router": "superclass", "num_experts": 4},
        ORDER,
        "images of 3 classes: expected 2 experts or more, and a",
    ),
    "fewer images than experts": (
        {"init": "cluster", "calibration_images": 2},
        ORDER,
        "2 images to start 3 experts",
    ),
    "a part that is not there": ({}, ("head", "moe", "blocks.7.mlp"), "names no FFN"),
    "layers that are not there": ({"layers": "last:9"}, ORDER, "expected at most 2"),
    "experts of a dense model": ({"layers": "none"}, ORDER, "train_only='experts': the model has no MoE layer"),
    "layers that never come in": ({}, ("head", "all"), "expected 'moe' or 'experts' among them, where the MoE layers"),
}


@pytest.mark.parametrize("what", WRONG_STAGES)
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_mistake_in_a_later_stage_is_told_before_an_image_is_opened(
    photos: Path, tmp_path: Path, steps: list[str], downloads: list[str], what: str, pretrained: bool
) -> None:
    moe, stages, message = WRONG_STAGES[what]
    with pytest.raises(VimoeError, match=message) as raised:
        run_training(
            settings(photos, model={"pretrained": pretrained}, moe=moe, train={"stages": stages}), tmp_path / "run"
        )
    assert "\n" not in str(raised.value) and "scan" not in steps and downloads == [] and not (tmp_path / "run").exists()


def test_stages_that_change_the_trunk_have_no_features(photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.cache='features' with train.stages=\['head', 'all', 'experts'\]"):
        settings(photos, data={"cache": "features"}, train=STAGED)
