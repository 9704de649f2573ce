"""A model trained and judged on the features of its frozen trunk is that of images, but for rounding."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.kills import Killed, kill_after, logs
from helpers.pictures import roles
from helpers.tiny import FAMILIES, config, images, perturb_experts, randomise, upcycle, vit
from helpers.trainings import QUICK, rows, weights
from torch import Tensor, nn

import vimoe.analysis.pruning
import vimoe.data.loaders
import vimoe.tasks.feature_files
import vimoe.training.loop
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.settings import SECTIONS, Settings
from vimoe.config.train import TrainConfig
from vimoe.data.classification import load_data
from vimoe.data.labelled_images import Data
from vimoe.data.loaders import eval_loader, preprocessing
from vimoe.data.order import Shuffled
from vimoe.data.user_cache import cache_folder
from vimoe.errors import ConfigError, FolderError, SurgeryError
from vimoe.experiments.finished_run import FinishedRun
from vimoe.experiments.train import resume_training, run_training
from vimoe.metrics.base import evaluate
from vimoe.models.frozen_trunk import cut_before, digest
from vimoe.models.model_folder import load
from vimoe.moe.layer import moe_layers
from vimoe.tasks.cached_features import Entries, FeatureCache, Features, Views, entries_of
from vimoe.tasks.classification_job import job_on_images
from vimoe.tasks.feature_files import FeatureFiles
from vimoe.training import checkpoint
from vimoe.training.loop import train
from vimoe.training.parameter_groups import freeze_all_but

FROZEN = {"train_only": "moe", "epochs": 3, "min_crop": 0.5, "hflip": 0.5}
LAYER = "blocks.2.mlp"
READING = (preprocessing(vit(img_size=16, patch_size=8)), 8, 0)

__all__ = ["kill_after"]  # a fixture


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return load_data(DataConfig(path=str(roles(tmp_path_factory.mktemp("pictures"), train=14))))


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vimoe.tasks.feature_files, "STORED", "float32")


def model(layers: object = (2,), **settings: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {"num_classes": 3, "img_size": 16, "patch_size": 8, "depth": 3, **settings}
    return upcycle(vit(**settings), config(layers=layers))


def cache(network: nn.Module, data: Data, views: int = 3, **changes: object) -> FeatureCache:
    settings = replace(QUICK, **{**FROZEN, **changes})
    trained = [name for name, module in network.named_modules() if isinstance(module, vimoe.MoE)]
    return FeatureCache(network, trained, data, preprocessing(network), settings, views, workers=0)


def run(data: Data, out: Path, views: int | None = 3, network: nn.Module | None = None, **changes: object) -> tuple:
    """Trains on features, or on images where there are no views."""
    network = network or model()
    out.mkdir()
    settings = replace(QUICK, **{**FROZEN, **changes})
    if views is None:
        task = job_on_images(data, preprocessing(network), settings, workers=0)
    else:
        task = cache(network, data, views, **changes).job()
    return network, train(network, task, settings, out)


def kept() -> list[Path]:
    return sorted((cache_folder() / "features").iterdir())


def no_trunk(*_: object) -> None:
    raise AssertionError("the trunk was run")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_rest_of_every_family_computes_from_features_what_the_whole_does_from_images(family: str) -> None:
    network = upcycle(vit(family, depth=3), config(layers=[2]))
    x = images(network)
    expected = network(x)
    (name,) = [name for name, module in network.named_modules() if isinstance(module, vimoe.MoE)][:1]
    cut = cut_before(network, [name], x.shape[1:])
    features = cut.trunk(network, x)
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in network.named_modules()
        if name.startswith(("blocks.0.", "blocks.1."))
    ]
    assert torch.equal(cut.rest(network, features), expected)
    assert handles and not ran  # nothing inside of the trunk's blocks computes
    assert not torch.allclose(cut.rest(network, features.flip(0)), expected)
    assert torch.equal(network(x), expected) and ran  # it is as it was
    assert torch.equal(cut.rest(copy.deepcopy(network), features), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_whole_model(checkpointing: bool) -> None:
    network = perturb_experts(model())
    network.set_grad_checkpointing(checkpointing)
    x = images(network)
    cut = cut_before(network, [LAYER], x.shape[1:])
    with torch.no_grad():
        features = cut.trunk(network.eval(), x)
    network.train().requires_grad_(False)
    trained = [*network.get_submodule(LAYER).requires_grad_(True).parameters()]
    found = []
    for outputs in (lambda: network(x), lambda: cut.rest(network, features)):
        outputs().square().sum().backward()
        found.append([p.grad.clone() for p in trained])
        network.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(grad.any() for grad in found[0])


def test_a_training_is_that_on_images_with_as_many_views_as_epochs(
    data: Data, tmp_path: Path, exact: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, summary = run(data, tmp_path / "plain", None, ema_decay=0.5, auto_augment="rand-m5-inc1")
    ours, other = run(data, tmp_path / "features", 3, ema_decay=0.5, auto_augment="rand-m5-inc1")
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-4, atol=1e-5)
    assert {**summary, "seconds": 0, "val": 0} == {**other, "seconds": 0, "val": 0}
    assert other["val"] == pytest.approx(summary["val"], rel=1e-4)
    fewer, _ = run(data, tmp_path / "fewer", 2, ema_decay=0.5, auto_augment="rand-m5-inc1")
    assert (weights(fewer) - weights(plain)).abs().max() > 1e-3  # the comparison above would see other draws


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_float16_rounds_off_is_little(data: Data, tmp_path: Path, precision: str) -> None:
    changes = {"precision": precision, "epochs": 1}
    run(data, tmp_path / "plain", None, **changes)
    run(data, tmp_path / "features", 1, **changes)
    plain, ours = (rows(tmp_path / name / "metrics.csv")[0] for name in ("plain", "features"))
    for key in ("train_loss", "val_loss"):
        assert float(ours[key]) == pytest.approx(float(plain[key]), rel=2e-3 if precision == "no" else 2e-2)
    assert np.load(kept()[0]).dtype == np.float16


def test_the_trunk_computes_as_in_evaluation_and_the_rest_as_in_training(data: Data, tmp_path: Path) -> None:
    plain = cache(model(), data).job()
    again = cache(model(), data).job()
    dropped = cache(model(drop_path_rate=0.5), data).job()
    batches = [next(iter(task.loader))[0] for task in (plain, again, dropped)]
    assert torch.equal(batches[0], batches[1]) and torch.equal(batches[0], batches[2])
    network = model(drop_path_rate=0.5).train()
    features = batches[0].float()
    assert not torch.equal(dropped.forward(network, features), dropped.forward(network, features))


def test_views_come_in_turn_and_are_other_draws(data: Data) -> None:
    assert issubclass(Views, Shuffled)
    task = cache(model(), data, views=2).job()
    seen = []
    for epoch in (1, 2, 3):
        task.loader.sampler.start(epoch)
        order = task.loader.sampler.images_at(0, len(data.train))
        found = torch.cat([x for x, _ in task.loader])
        labels = torch.cat([y for _, y in task.loader])
        assert labels.tolist() == [data.train[i][1] for i in order][: len(labels)]
        seen.append({index: row for index, row in zip(order, found, strict=False)})
    both = seen[0].keys() & seen[1].keys() & seen[2].keys()
    assert len(both) > len(data.train) / 2
    assert all(torch.equal(seen[0][i], seen[2][i]) and not torch.equal(seen[0][i], seen[1][i]) for i in both)


def test_no_more_views_are_made_than_there_are_epochs(data: Data) -> None:
    task = cache(model(), data, views=9, epochs=2).job()
    assert task.facts["features"]["views"] == 2 and len(kept()) == 3
    assert task.facts["features"]["bytes"] == sum(file.stat().st_size for file in kept())


def test_all_is_found_again_and_more_views_are_added(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(iter(cache(model(), data, views=1).job().loader))
    names = kept()
    stamps = [file.stat().st_mtime_ns for file in names]
    task = cache(model(), data, views=3).job()
    assert len(kept()) == len(names) + 2
    assert [file.stat().st_mtime_ns for file in names] == stamps
    network = model()
    nn.init.ones_(network.head.weight)  # what is trained is no part of the trunk, nor is anything after
    nn.init.ones_(network.blocks[2].mlp.router.weight)
    caches = cache(network, data, views=3)
    monkeypatch.setattr(FeatureFiles, "_trunk", no_trunk)
    again = caches.job()
    assert again.facts["features"]["seconds"] == 0
    for each in (task, again):
        assert all(torch.equal(a, b) for a, b in zip(first, next(iter(each.loader)), strict=True))


CHANGES = {"min_crop": 0.7, "hflip": 0.1, "color_jitter": 0.2, "auto_augment": "rand-m5-inc1", "random_erasing": 0.5,
           "seed": 5}  # fmt: skip
NO_MATTER = {
    "epochs", "batch_size", "accumulation", "lr", "min_lr", "warmup_epochs", "weight_decay", "layer_decay",
    "router_lr_scale", "router_weight_decay", "router_frozen", "router_freeze_epochs", "router_freeze_margin",
    "router_warmup_epochs", "locality_loss", "expert_weight_decay",
    "expert_lr_scale", "train_only", "stages", "balance_loss", "z_loss", "importance_loss", "entropy_loss",
    "variance_loss", "orthogonal_loss", "mutual_loss", "distill_loss", "route_loss", "label_smoothing", "ema_decay",
    "clip_grad", "early_stopping", "val_interval", "checkpoint_minutes", "tensorboard", "fuse", "fuse_rate", "compile",
    "parallel", "oracle_loss", "oracle_temperature",
}  # fmt: skip
REFUSED = {"mixup", "cutmix", "min_scale", "max_scale", "dice_loss", "class_weights"}  # or of segmentation


def test_every_setting_is_known_to_matter_or_not() -> None:
    assert {field.name for field in fields(TrainConfig)} == {*CHANGES, *NO_MATTER, *REFUSED, "precision"}


@pytest.mark.parametrize("name", CHANGES)
def test_other_augmentation_is_other_features_of_training_images(data: Data, name: str) -> None:
    before, after = cache(model(), data), cache(model(), data, **{name: CHANGES[name]})
    assert not {file.path for file in before.train} & {file.path for file in after.train}
    assert before.val.path == after.val.path


def test_another_precision_trains_on_other_features_and_is_scored_on_the_same(data: Data) -> None:
    """Evaluation computes in float32, whatever trains."""
    before, after = cache(model(), data), cache(model(), data, precision="bf16")
    assert not {file.path for file in before.train} & {file.path for file in after.train}
    assert before.val.path == after.val.path
    after.job()
    assert np.array_equal(np.load(after.val.path), entries_of(model(), [LAYER], data.val, *READING).features)


@pytest.mark.parametrize("change", ["weight", "epsilon", "mean", "cut", "order"])
def test_another_trunk_preprocessing_or_order_is_other_features(data: Data, change: str) -> None:
    before = cache(model(), data)
    network = model()
    if change == "weight":
        with torch.no_grad():
            network.blocks[1].attn.qkv.bias[0] += 1e-3
    elif change == "epsilon":
        network.blocks[0].norm1.eps *= 2
    elif change == "mean":
        network.pretrained_cfg = {**network.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    elif change == "cut":
        network = model(layers=(1, 2))
    else:
        data = replace(data, train=data.train[::-1], val=data.val[::-1])
    after = cache(network, data)
    assert not {f.path for f in (*before.train, before.val)} & {f.path for f in (*after.train, after.val)}


def test_a_changed_file_is_other_features(data: Data, tmp_path: Path) -> None:
    copied = load_data(DataConfig(path=str(shutil.copytree(Path(data.train[0][0]).parents[2], tmp_path / "copy"))))
    before = cache(model(), copied)
    file = Path(copied.train[0][0])
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    after = cache(model(), copied)
    assert not {each.path for each in before.train} & {each.path for each in after.train}
    assert before.val.path == after.val.path


def test_a_trunk_whose_moe_layers_route_otherwise_is_another() -> None:
    trunks = []
    for settings in ({"top_k": 1}, {"top_k": 2}, {"combine": "sum"}, {"routing": "token"}):
        torch.manual_seed(0)
        network = perturb_experts(vimoe.upcycle(vit(depth=3), config(layers=[0, 2], **settings)))
        freeze_all_but(network, [LAYER])
        trunks.append((cut_before(network, [LAYER], (3, 32, 32)), network))
    first, *others = (network.state_dict() for _, network in trunks)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    assert len({cut.trunk(network, images(network)).sum().item() for cut, network in trunks}) == len(trunks)
    assert len({digest(network, cut) for cut, network in trunks}) == len(trunks)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_built_again_has_the_same_key(family: str) -> None:
    digests = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        network = upcycle(randomise(vit(family, depth=3), seed), config(layers=[2]))
        (name, *_) = (name for name, module in network.named_modules() if isinstance(module, vimoe.MoE))
        digests.append(digest(network, cut_before(network, [name], images(network).shape[1:])))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("damage", ["short", "empty", "pickled", "of another shape", "of another type"])
def test_a_damaged_file_is_made_anew(data: Data, tmp_path: Path, damage: str) -> None:
    first = next(iter(cache(model(), data, views=1).job().loader))[0]
    for file in kept():
        whole = np.load(file)
        if damage == "short":
            file.write_bytes(file.read_bytes()[:-1])
        elif damage == "empty":
            file.write_bytes(b"")
        elif damage == "pickled":
            np.save(file, np.array([{}]), allow_pickle=True)
        elif damage == "of another shape":
            np.save(file, whole[:, :-1])
        else:
            np.save(file, whole.astype(np.float32))
    assert torch.equal(next(iter(cache(model(), data, views=1).job().loader))[0], first)


def test_what_is_killed_while_it_is_made_leaves_nothing_that_would_be_used(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = cache(model(), data, views=2)
    real, calls = vimoe.tasks.feature_files.FeatureFiles._trunk, []

    def dies(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 8:  # 6 batches a view
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(FeatureFiles, "_trunk", dies)
    with pytest.raises(Killed):
        caches.job()
    assert len(kept()) == 1  # the first view is whole
    made = cache(model(), data, views=2)
    assert len(made.files.missing([*made.train, made.val], made.what)) == 2
    made.job()
    assert len(kept()) == 3


def test_a_worker_maps_the_files(data: Data) -> None:
    dataset = cache(model(), data).job().loader.dataset
    assert isinstance(dataset, Features)
    sent = pickle.dumps(dataset)
    assert len(sent) < dataset.views[0].nbytes / 10
    assert torch.equal(pickle.loads(sent)[3, 1][0], dataset[3, 1][0])


def test_no_room_is_one_line_before_anything_is_computed(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = (3 * len(data.train) + len(data.val)) * 5 * 24 * 2
    monkeypatch.setattr(vimoe.tasks.feature_files.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(FolderError, match=r"needs 0.00 GB for 3 views and validation: .* lower data.views") as raised:
        cache(model(), data)
    assert "\n" not in str(raised.value) and not (cache_folder() / "features").exists()
    monkeypatch.setattr(vimoe.tasks.feature_files.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    cache(model(), data).job()
    assert sum(np.load(file).nbytes for file in kept()) == needed
    size = sum(file.stat().st_size for file in kept())
    monkeypatch.setattr(vimoe.tasks.feature_files.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(FolderError, match=rf"delete files of earlier runs in \S+/features \({size / 1e3:.0f} kB\)"):
        cache(model(), data, seed=1)


def test_a_cache_that_cannot_be_looked_into_is_one_line(
    data: Data, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run is scored on images then. The system refuses this name as it refuses the home of another user."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/" + "a" * 300)
    with pytest.raises(FolderError, match=r"features cannot be created .* set XDG_CACHE_HOME to another folder"):
        cache(model(), data).job()
    assert FinishedRun(trained).score()[2].get("features") is None


def test_a_user_without_a_home_is_told_in_one_line(data: Data, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run is scored on images then."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does where it knows no home
    with pytest.raises(FolderError, match=r"^no cache folder \(.*\): expected one; set XDG_CACHE_HOME$"):
        cache(model(), data)
    assert FinishedRun(trained).score()[2].get("features") is None


def test_features_beyond_float16_are_one_line(data: Data) -> None:
    network = model()
    with torch.no_grad():
        network.pos_embed[:] = 1e5
    with pytest.raises(
        ConfigError, match=r"not finite in float16 for one of the images 0 to 7 .* expected less than 655"
    ):
        cache(network, data).job()
    assert not kept()


def test_what_cannot_be_cut_is_refused(data: Data) -> None:
    with pytest.raises(ConfigError, match=r"blocks.0.mlp is in the first block and trained: expected frozen blocks"):
        cache(model(layers="all"), data)
    with pytest.raises(ConfigError, match="expected no patch_drop_rate"):
        cache(model(patch_drop_rate=0.5), data)
    network = model()
    real = network.forward_features
    network.forward_features = lambda x, **_: real(x) + x.mean()  # something else than tokens goes past the blocks
    with pytest.raises(ConfigError, match=r"VisionTransformer does not compute the same .* use another data.cache"):
        cache(network, data)


@pytest.mark.parametrize(("killed_after", "accumulation"), [(0, 1), (7, 1), (11, 2)])
def test_a_killed_training_ends_as_if_it_had_not_been(
    data: Data, tmp_path: Path, kill_after: object, killed_after: int, accumulation: int
) -> None:
    settings = {"ema_decay": 0.8, "checkpoint_minutes": 0, "accumulation": accumulation}
    whole, summary = run(data, tmp_path / "whole", 2, **settings)
    kill_after(killed_after)
    with pytest.raises(Killed):
        run(data, tmp_path / "killed", 2, **settings)
    kill_after(1000)
    network, config = model(), replace(QUICK, **FROZEN, **settings)
    again = train(network, cache(network, data, 2, **settings).job(), config, tmp_path / "killed")
    assert torch.equal(weights(whole), weights(network)) and summary["val"] == again["val"]
    assert logs(tmp_path / "whole") == logs(tmp_path / "killed")


RUN = {
    "moe": {"layers": "last:1", "num_experts": 4},
    "data": {"cache": "features", "views": 2, "workers": 0},
    "train": {"epochs": 3, "batch_size": 8, "lr": 3e-3, "train_only": "moe", "min_crop": 0.5, "tensorboard": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def parent(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of a trained dense ViT."""
    photos = str(Path(data.train[0][0]).parents[2])
    out = tmp_path_factory.mktemp("parent") / "dense"
    dense = Settings(
        model=ModelConfig(
            name="vit_tiny_patch16_224", pretrained=False, img_size=16,
            args={"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
        ),
        moe=MoEConfig(layers="none"),
        data=DataConfig(path=photos, workers=0),
        train=TrainConfig(epochs=1, batch_size=8, tensorboard=False),
    )  # fmt: skip
    run_training(dense, out)
    return out / "model"


def settings_of(data: Data, parent: Path, changes: dict | None = None) -> Settings:
    changes = changes or {}
    values = {section: {**RUN.get(section, {}), **changes.get(section, {})} for section in SECTIONS}
    values["model"]["name"] = f"local-dir:{parent}"
    values["data"]["path"] = str(Path(data.train[0][0]).parents[2])
    return Settings(**{section: SECTIONS[section](**values[section]) for section in SECTIONS})


def test_a_run_says_what_was_kept_and_is_scored_and_saved_whole(data: Data, parent: Path, tmp_path: Path) -> None:
    settings = settings_of(data, parent)
    summary = run_training(settings, tmp_path / "run")
    files = kept()
    assert summary["features"] == {
        "before": "blocks.2", "views": 2, "bytes": sum(file.stat().st_size for file in files),
        "seconds": summary["features"]["seconds"],
    }  # fmt: skip
    assert summary["features"]["seconds"] > 0 and len(files) == 3
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["features"] == summary["features"]
    assert "The trunk before blocks.2 was frozen" in (tmp_path / "run" / "report.html").read_text()
    network = load(tmp_path / "run" / "model")
    assert evaluate(network, entries_of(network, [LAYER], data.val, READING[0], 16)).to_dict() == summary["val"]
    score = evaluate(network, eval_loader(data.val, preprocessing(network), 16, 0))
    assert score.to_dict() == pytest.approx(summary["val"], rel=1e-3) and score.loss != summary["val"]["loss"]
    best = rows(tmp_path / "run" / "metrics.csv")[summary["best_epoch"] - 1]
    assert float(best["val_loss"]) == pytest.approx(summary["val"]["loss"], abs=1e-6)
    frozen = load(parent)
    for name, tensor in frozen.state_dict().items():
        if not name.startswith(("blocks.2.mlp", "head")):
            assert torch.equal(network.state_dict()[name], tensor), name
    assert run_training(settings, tmp_path / "again")["features"]["seconds"] == 0 and kept() == files


ONLY = {
    "the dense control": ({"layers": "none"}, "last:1", "blocks.2", ("blocks.2.mlp.",)),
    "a dense control of two": ({"layers": "none"}, [1, 2], "blocks.1", ("blocks.1.mlp.", "blocks.2.mlp.")),
    "experts": ({}, "experts", "blocks.2", ("blocks.2.mlp.experts.", "blocks.2.mlp.router.")),
    "the classifier": ({"layers": "none"}, "head", "blocks.2", ()),
    "the classifier of a mixture": ({"layers": "last:2"}, "head", "blocks.2", ()),
}


@pytest.mark.parametrize("case", ONLY)
def test_what_is_trained_decides_where_the_trunk_is_cut(data: Data, parent: Path, tmp_path: Path, case: str) -> None:
    """And the model ends as that of a training on images does, but for rounding of the features."""
    moe, only, before, prefixes = ONLY[case]
    changes = {"moe": moe, "data": {"views": 3}, "train": {"train_only": only}}
    summary = run_training(settings_of(data, parent, changes), tmp_path / "run")
    assert summary["features"]["before"] == before
    plain = {**changes, "data": {"cache": "none", "views": 4}}
    run_training(settings_of(data, parent, plain), tmp_path / "plain")
    ours, theirs = (load(tmp_path / name / "model").state_dict() for name in ("run", "plain"))
    trained = {name for name in ours if name.startswith((*prefixes, "head."))}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0.05, atol=0.02)
        assert name in trained or torch.equal(tensor, theirs[name])
    first = load(parent).state_dict()
    moved = {name for name, tensor in first.items() if name in ours and not torch.equal(tensor, ours[name])}
    assert moved == {name for name in trained if name in first}


def test_the_dense_control_and_the_mixture_read_the_same_features(data: Data, parent: Path, tmp_path: Path) -> None:
    run_training(settings_of(data, parent), tmp_path / "moe")
    files = kept()
    for name, only in (("control", "last:1"), ("head", "head")):
        settings = settings_of(data, parent, {"moe": {"layers": "none"}, "train": {"train_only": only}})
        assert run_training(settings, tmp_path / name)["features"]["seconds"] == 0 and kept() == files


def test_recovery_of_experts_of_which_none_is_left_trains_the_classifier(
    data: Data, parent: Path, tmp_path: Path
) -> None:
    run_training(settings_of(data, parent, {"train": {"train_only": "experts"}}), tmp_path / "run")
    for epochs in (0, 1):
        pruned = FinishedRun(tmp_path / "run").prune(tmp_path / str(epochs), tolerance=9.0, recover=epochs)
        assert not pruned["kept"] and pruned["recovery_epochs"] == epochs
    before, after = (load(tmp_path / name / "model").state_dict() for name in ("0", "1"))
    moved = {name for name, w in after.items() if not torch.equal(w, before[name])}
    assert moved == {"head.weight", "head.bias"}


def test_recovery_after_pruning_trains_on_the_same_features(data: Data, parent: Path, tmp_path: Path) -> None:
    run_training(settings_of(data, parent), tmp_path / "run")
    files = kept()
    scored = FinishedRun(tmp_path / "run").score()
    assert len(kept()) == len(files) + 1  # test
    files = kept()
    pruned = FinishedRun(tmp_path / "run").prune(tmp_path / "pruned", recover=2)
    assert pruned["recovery_epochs"] == 2 and pruned["features"] == {"before": "blocks.2"}
    assert {**pruned["before"], **scored[1].to_dict()} == pruned["before"]
    note = "from their features before blocks.2, rounded to float16"
    assert note in (tmp_path / "pruned" / "report.html").read_text()
    _, again, facts = FinishedRun(tmp_path / "pruned").score()
    assert {**pruned["recovered"], **again.to_dict()} == pruned["recovered"] and facts.keys() == scored[2].keys()
    assert facts["features"] == scored[2]["features"] == {"before": "blocks.2"}
    assert kept() == files


@pytest.fixture(scope="module")
def whole(data: Data, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    return trained_in(tmp_path_factory.mktemp("whole"), settings_of(data, parent)) / "run"


@pytest.mark.parametrize("killed_after", [2, 8])
def test_a_resumed_run_keeps_to_the_trunk_of_its_checkpoint(
    data: Data, parent: Path, whole: Path, tmp_path: Path, kill_after: object, killed_after: int
) -> None:
    """Where there is a checkpoint, the pretrained weights are not loaded any more."""
    settings = settings_of(data, parent, {"train": {"checkpoint_minutes": 0.0}})
    kill_after(killed_after)
    with pytest.raises(Killed):
        run_training(settings, tmp_path / "killed")
    assert checkpoint.exists(tmp_path / "killed")
    kill_after(1000)
    for file in kept():  # so that it must compute them
        file.unlink()
    assert resume_training(tmp_path / "killed")["val"] == json.loads((whole / "summary.json").read_text())["val"]
    states = [load(run / "model").state_dict() for run in (whole, tmp_path / "killed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.fixture(scope="module")
def trained_once(data: Data, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose second last block has an MoE layer too, and of the cache that it filled."""
    return trained_in(tmp_path_factory.mktemp("trained"), settings_of(data, parent, {"moe": {"layers": "last:2"}}))


def trained_in(folder: Path, settings: Settings) -> Path:
    """Trains in run/ with the cache in cache/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        run_training(settings, folder / "run")
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A copy of that run, with the cache of its own."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The images that have been opened to compute from."""
    found: list[object] = []
    real = vimoe.data.loaders.open_image
    monkeypatch.setattr(vimoe.data.loaders, "open_image", lambda source: found.append(source) or real(source))
    return found


def values(numbers: object) -> list[float]:
    """All numbers in plain values, in order."""
    if isinstance(numbers, dict):
        return [value for each in numbers.values() for value in values(each)]
    if isinstance(numbers, list | tuple):
        return [value for each in numbers for value in values(each)]
    return [float(numbers)] if isinstance(numbers, int | float) else []


def test_scores_and_evidence_are_those_of_images(data: Data, trained: Path) -> None:
    """But for rounding, whose size the first assertions show."""
    run = FinishedRun(trained)
    split, score, facts = run.score()
    on_images = run.score(str(data.root))
    assert split == on_images[0] == "test" and facts["features"] == {"before": "blocks.1"}
    assert set(facts) - set(on_images[2]) == {"features"}
    assert score.loss != on_images[1].loss
    assert score.to_dict() == pytest.approx(on_images[1].to_dict(), rel=1e-3)
    evidence, images = run.analyze(), run.task.loader(run.model, run.data, run.data.val)
    plain = vimoe.analyze(run.model, images)
    assert evidence.features == facts["features"] and plain.features is None
    note = "from their features before blocks.1, rounded to float16"
    assert note in (trained / "report.html").read_text()
    assert "from features before blocks.1" in str(evidence) and "features" not in str(plain)
    assert [layer.name for layer in evidence.layers] == ["blocks.1.mlp", LAYER] == [e.name for e in plain.layers]
    assert [layer.draws for layer in evidence.layers] == [layer.draws for layer in plain.layers]
    found, expected = (values(each.to_dict()) for each in (evidence, plain))
    assert found != expected and found == pytest.approx(expected, rel=1e-2, abs=2e-3)
    changes = [abs(layer.permuted.loss.value) for layer in plain.layers]
    assert max(changes) > 2e-3  # which is seen in spite of the tolerance
    diagnosis = run.diagnose()
    assert json.loads((trained / "diagnosis.json").read_text())["features"] == facts["features"]
    assert "from features before blocks.1. Changes" in str(diagnosis)
    assert (trained / "report.html").read_text().count(note) == 2
    expected = values(vimoe.diagnose(run.model, images, plain).to_dict())
    assert values(diagnosis.to_dict()) == pytest.approx(expected, rel=1e-2, abs=2e-3)


def test_without_rounding_they_are_equal(data: Data, trained: Path, exact: None) -> None:
    run = FinishedRun(trained)
    assert run.score()[1].to_dict() == pytest.approx(run.score(str(data.root))[1].to_dict(), rel=1e-6)
    evidence, images = run.analyze(), run.task.loader(run.model, run.data, run.data.val)
    assert values(evidence.to_dict()) == pytest.approx(values(vimoe.analyze(run.model, images).to_dict()), abs=1e-5)
    pruned, plain = load(trained / "model"), load(trained / "model")
    steps = vimoe.prune(pruned, evidence, run.task.validation(pruned, run.data), tolerance=9.0).to_dict()
    assert values(steps) == pytest.approx(
        values(vimoe.prune(plain, evidence, images, tolerance=9.0).to_dict()), abs=1e-5
    )


def test_a_second_model_on_the_trunk_opens_no_image(
    data: Data, parent: Path, trained: Path, tmp_path: Path, opened: list[object]
) -> None:
    control = settings_of(data, parent, {"moe": {"layers": "none"}, "train": {"train_only": "last:2"}})
    run_training(control, tmp_path / "control")
    assert not opened  # to train it
    first = FinishedRun(trained).score()
    assert len(opened) == len(data.test)
    opened.clear()
    again, other = FinishedRun(trained), FinishedRun(tmp_path / "control")
    assert again.score() == first and other.score()[1].loss != first[1].loss
    again.analyze()
    again.diagnose()
    assert not opened


def test_a_receipt_times_whole_models_on_images(
    trained: Path, opened: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[torch.Tensor] = []
    times = lambda models, images: timed.append(images) or [1.0] * len(models)  # noqa: E731
    monkeypatch.setattr(vimoe.analysis.pruning, "images_per_second", times)
    run = FinishedRun(trained)
    run.score()
    opened.clear()
    run.prune(trained.parent / "pruned", tolerance=9.0)
    assert len(opened) == len(timed[0]) and timed[0].shape[1:] == (3, 16, 16)
    opened.clear()
    pruned = FinishedRun(trained.parent / "pruned")
    assert pruned.score()[2]["features"] == {"before": "blocks.1"} and not moe_layers(pruned.model)
    assert not opened


def test_features_begin_before_every_layer_that_differs(data: Data, parent: Path, tmp_path: Path) -> None:
    """Also before MoE layers that are not trained, and before the part of an earlier stage."""
    changes = {"moe": {"layers": "last:2"}, "train": {"train_only": "head"}}
    staged = {"moe": {"layers": "last:1"}, "train": {"train_only": "all", "stages": ("last:2", "experts")}}
    for name, case in (("head", changes), ("stages", staged)):
        run_training(settings_of(data, parent, case), tmp_path / name)
        run = FinishedRun(tmp_path / name)
        assert run.score()[2]["features"] == {"before": "blocks.1"}
        assert run.analyze().features == {"before": "blocks.1"}


@pytest.mark.parametrize("change", ["weight", "mean", "cut", "order", "one less", "a changed file"])
def test_another_trunk_preprocessing_or_list_is_computed_anew(data: Data, tmp_path: Path, change: str) -> None:
    root = shutil.copytree(data.root, tmp_path / "copy")
    samples = load_data(DataConfig(path=str(root))).test
    network, layers, (prepared, *reading) = model(), [LAYER], READING
    entries_of(model(), layers, samples, *READING)
    if change == "weight":
        with torch.no_grad():
            network.blocks[1].attn.qkv.bias[0] += 1e-3
    elif change == "mean":
        prepared = {**prepared, "mean": (0.1, 0.2, 0.3)}
    elif change == "cut":
        layers = ["blocks.1.mlp"]
    elif change == "order":
        samples = samples[::-1]
    elif change == "one less":
        samples = samples[1:]
    else:
        file = Path(samples[0][0])
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    entries_of(network, layers, samples, prepared, *reading)
    assert len(kept()) == 2


ARMS = {
    "experts": {"num_experts": 2},
    "a router": {"num_experts": 8, "router": "cosine"},
    "tokens": {"routing": "token", "top_k": 2},
    "experts of low rank": {"experts": "lora"},
    "no mixture": {"layers": "none"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_arms_of_a_study_have_one_trunk(data: Data, tmp_path: Path, arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes the place of the last FFN, in training and when it is loaded, and with other weights behind."""
    entries_of(model(), [LAYER], data.test, *READING)
    monkeypatch.setattr(FeatureFiles, "_write", no_trunk)
    torch.manual_seed(0)
    other = vit(num_classes=3, img_size=16, patch_size=8, depth=3, drop_path_rate=0.3)
    other = upcycle(other, config(**{"layers": (2,), **ARMS[arm]})).train()
    nn.init.ones_(other.head.weight)
    nn.init.ones_(other.blocks[2].attn.qkv.weight)
    vimoe.save(other, tmp_path / "model")
    for each in (other, load(tmp_path / "model")):
        entries_of(each, [LAYER], data.test, *READING)


def test_batches_of_features_are_those_of_images_in_order(data: Data) -> None:
    network = model()
    found = entries_of(network, [LAYER], data.test, *READING)
    assert isinstance(found, Entries) and len(found) == len(list(found)) == 2
    plain = list(eval_loader(data.test, *READING))
    for (start, labels), (x, expected) in zip(found, plain, strict=True):
        assert torch.equal(labels, expected) and start.inputs.dtype == torch.float16
        with torch.no_grad():
            torch.testing.assert_close(start.to(x).logits(network), network(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("why", ["no room", "no folder", "beyond float16"])
def test_images_are_read_where_features_cannot_be_kept(
    data: Data, trained: Path, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = FinishedRun(trained)
    expected = run.score(str(data.root))
    if why == "no room":
        monkeypatch.setattr(vimoe.tasks.feature_files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    elif why == "no folder":
        file = trained.parent / "file"
        file.write_bytes(b"")
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    else:
        monkeypatch.setattr(Tensor, "isfinite", lambda x: torch.zeros_like(x, dtype=torch.bool))
    with caplog.at_level("INFO", "vimoe"):
        found = run.score()
    assert found[:2] == expected[:2] and found[2] == pytest.approx(expected[2], rel=1e-2)  # one is fitted on features
    passed = "found", "the better"  # features of validation, and it has no temperature
    line, *others = [rec.message for rec in caplog.records if not rec.message.endswith(passed)]
    assert not others or (others, why) == ([line], "no folder")
    reasons = {"no room": "needs 0.00 GB for 9 images", "no folder": "cannot be created", "beyond float16": "float16"}
    assert line.startswith("images are read in place of their features: data.cache='features'") and "\n" not in line
    assert reasons[why] in line


def test_a_process_waits_for_the_file_that_another_computes(
    data: Data, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, computed, second = FeatureFiles._write, [], ThreadPoolExecutor(1)

    def writes(self: FeatureFiles, file: object) -> None:
        computed.append(file)
        if len(computed) == 1:
            other = second.submit(entries_of, model(), [LAYER], data.test, *READING)
            while not caplog.records and not other.done():
                time.sleep(0.01)
        real(self, file)

    monkeypatch.setattr(FeatureFiles, "_write", writes)
    with caplog.at_level("INFO", "vimoe"):
        entries_of(model(), [LAYER], data.test, *READING)
        second.shutdown()
    assert caplog.records[0].message == "features of 9 images: another process computes them"
    assert len(computed) == 1 and len(kept()) == 1


def test_a_score_that_is_interrupted_leaves_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = kept(), FeatureFiles._trunk

    def dies(self: FeatureFiles, images: torch.Tensor, precision: str) -> torch.Tensor:
        if len(list((cache_folder() / "features").iterdir())) > len(before):  # a file is being written
            raise KeyboardInterrupt
        return real(self, images, precision)

    monkeypatch.setattr(FeatureFiles, "_trunk", dies)
    with pytest.raises(KeyboardInterrupt):
        FinishedRun(trained).score()
    assert kept() == before


REFUSALS = {
    "train.train_only='all': expected 'moe', 'last:2' or another part": {"train": {"train_only": "all"}},
    "train.mixup=0.2 with data.cache='features': expected 0": {"train": {"mixup": 0.2}},
    "train.cutmix=1 with data.cache='features': expected 0": {"train": {"cutmix": 1.0}},
    "data.views=2 with data.cache='disk': expected it with data.cache=features only": {"data": {"cache": "disk"}},
    "views=0: expected a whole number of at least 1": {"data": {"views": 0}},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_settings_that_contradict_it_are_one_line(data: Data, parent: Path, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        settings_of(data, parent, REFUSALS[message])
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": {"layers": "all"}}, "blocks.0.mlp is in the first block and trained"),
        ({"moe": {"layers": "none"}}, "the model has no MoE layer"),
        ({"train": {"train_only": "every:1"}}, "blocks.0.mlp is in the first block and trained"),
        ({"moe": {"layers": "none"}, "train": {"train_only": "experts"}}, "the model has no MoE layer"),
        ({"train": {"train_only": "blocks.3.mlp"}}, "train_only='blocks.3.mlp' names no FFN: did you mean 'blocks.2"),
        ({"model": {"args": {"patch_drop_rate": 0.5}}}, "expected no patch_drop_rate"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_before_any_work(
    data: Data, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, message: str
) -> None:
    monkeypatch.setattr("vimoe.tasks.classification.scan", None)  # not even the images are opened
    with pytest.raises((ConfigError, SurgeryError), match=message):
        run_training(settings_of(data, parent, changes), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not cache_folder().exists()
