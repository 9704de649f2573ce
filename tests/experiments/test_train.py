"""A training goes straight from settings to a run: each step once, in one order, and mistakes before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from helpers.pictures import roles

import vimoe.experiments.train
import vimoe.tasks.classification
import vimoe.tasks.classification_job
from vimoe import run_folder
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import ROUTERS, MoEConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError, DataError, FolderError, VimoeError
from vimoe.experiments.train import run_training
from vimoe.files import TEMPORARY
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


def test_leftovers_of_a_training_that_was_killed_before_it_began_are_deleted(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / f"{TEMPORARY}model").mkdir(parents=True)
    run_training(settings(photos), tmp_path / "run")
    assert not list((tmp_path / "run").glob(f"{TEMPORARY}*"))
