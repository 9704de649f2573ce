"""A model folder with MoE layers is a model to start from: layers, weights and settings are its own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import QUICK, call, refused
from helpers.kills import Killed, logs
from helpers.kills import kill_after as kill_after
from helpers.pictures import roles
from helpers.slow import one_in
from helpers.stand_in_hub import TOKEN, stand_in_hub
from helpers.tiny import config, images, layers, randomise, upcycle, vit
from helpers.tiny_transformers import vit as of_transformers
from torch import nn

import vimoe
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.settings import Settings
from vimoe.errors import ConfigError, SurgeryError, VimoeError
from vimoe.experiments.train import resume_training
from vimoe.models.continued import own_layers, plan_of_own, with_own_layers
from vimoe.models.create import create, create_without_weights
from vimoe.models.interface import find_backbone, label_names, logits_of
from vimoe.models.reading import tokens_read
from vimoe.models.segmenter import Segmenter
from vimoe.models.torchvision_vit import TorchvisionViT
from vimoe.moe.layer import moe_layers
from vimoe.tasks.segmentation import Segmentation

NAMES = list("abcde")
OF_TORCHVISION = {"image_size": 8, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 48}


def dense(family: str) -> nn.Module:
    if family == "torchvision":
        return randomise(TorchvisionViT.build(kind="vit", num_classes=5, **OF_TORCHVISION)).eval()
    if family == "timm":
        return vit()
    return of_transformers(family, num_labels=5)


def folder(tmp_path: Path, family: str = "timm", **settings: object) -> ModelConfig:
    """Name of the folder of a model with MoE layers whose weights all matter."""
    model = randomise(upcycle(dense(family), config(**settings)), seed=3).eval()
    return ModelConfig(name=f"local-dir:{vimoe.save(model, tmp_path / 'm', label_names=NAMES)}")


def pictures(model: nn.Module) -> torch.Tensor:
    return torch.randn(2, *find_backbone(model).input_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", one_in(3, ["timm", "torchvision", "dinov2", "deit, two classifiers"]))
def test_the_model_is_the_folders_and_other_classes_get_a_new_classifier(tmp_path: Path, family: str) -> None:
    named = folder(tmp_path, family)
    whole = vimoe.load(tmp_path / "m")
    same = create(named, 5).eval()
    assert torch.equal(logits_of(same, pictures(same)), logits_of(whole, pictures(whole)))
    assert label_names(same) == NAMES and len(layers(same)) == 2
    other = create(named, 3).eval()
    assert logits_of(other, pictures(other)).shape == (2, 3) and label_names(other) == ["0", "1", "2"]
    head = find_backbone(other).head()
    assert head and all(torch.equal(w, whole.state_dict()[n]) for n, w in other.state_dict().items() if n not in head)
    again = vimoe.load(vimoe.save(other, tmp_path / "again"))
    assert torch.equal(logits_of(again, pictures(again)), logits_of(other, pictures(other)))
    shapes = create_without_weights(named)
    assert {w.device.type for w in shapes.parameters()} == {"meta"}
    assert {n: w.shape for n, w in shapes.state_dict().items()} == {n: w.shape for n, w in whole.state_dict().items()}


def test_a_dense_folder_of_another_library_gets_the_layers_that_are_asked_for(tmp_path: Path) -> None:
    parent = dense("dinov2")
    named = ModelConfig(name=f"local-dir:{vimoe.save(parent, tmp_path / 'm')}")
    assert own_layers(named) == {} and plan_of_own(named) is None
    settings = Settings(model=named, moe=MoEConfig(layers="all"))
    assert with_own_layers(settings) is settings
    model = upcycle(create(named).eval(), config())
    torch.testing.assert_close(logits_of(model, pictures(model)), logits_of(parent, pictures(parent)))


@pytest.mark.parametrize("pretrained", [True, False])
def test_the_last_block_computes_what_model_read_says(tmp_path: Path, pretrained: bool) -> None:
    name = folder(tmp_path, routing="token").name
    read = [tokens_read(create(ModelConfig(name=name, pretrained=pretrained, read=each))) for each in ("auto", "all")]
    assert read == [1, None]


def test_weights_of_half_precision_are_trained_in_float32(tmp_path: Path) -> None:
    vimoe.save(upcycle(vit(), config()).bfloat16(), tmp_path / "m")
    model = create(ModelConfig(name=f"local-dir:{tmp_path / 'm'}"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_classifier_is_made_where_timm_can_make_one_and_else_it_is_one_line(tmp_path: Path) -> None:
    for name, parent in (("timm", vit(num_classes=0)), ("bare", of_transformers("dinov2, bare"))):
        vimoe.save(upcycle(parent, config()), tmp_path / name)
    model = create(ModelConfig(name=f"local-dir:{tmp_path / 'timm'}"), 3)
    assert model(images(model)).shape == (3, 3)
    with pytest.raises(SurgeryError, match="Dinov2Model has no classifier: expected one"):
        create(ModelConfig(name=f"local-dir:{tmp_path / 'bare'}"), 3)
    vimoe.save(upcycle(vit(), config()), tmp_path / "classes")
    with pytest.raises(ConfigError, match="model folder of 5 classes: expected num_classes of 1 or more"):
        create(ModelConfig(name=f"local-dir:{tmp_path / 'classes'}"), 0)


def test_settings_are_those_of_the_folder(tmp_path: Path) -> None:
    named = folder(tmp_path, layers="last:1", top_k=2, routing="token", router="cosine")
    found = with_own_layers(Settings(model=named)).moe
    assert found == config(layers=["blocks.1.mlp"], top_k=2, routing="token", router="cosine")
    for given in (MoEConfig(layers=[-1], num_experts=4), MoEConfig(top_k=2, router="cosine"), found):
        asked = Settings(model=named, moe=given)
        assert with_own_layers(asked).moe == found
        assert with_own_layers(asked, ["top_k"] if given.top_k > 1 else ["num_experts"]).moe == found
    assert str(plan_of_own(named)) == str(vimoe.plan(vit(), found))


@pytest.mark.parametrize(
    ("moe", "given", "message"),
    [
        (
            MoEConfig(num_experts=6),
            None,
            "moe.num_experts=6 with .* MoE layers already: expected num_experts=4, as they have",
        ),
        (MoEConfig(), ["num_experts"], "moe.num_experts=8 with .*: expected num_experts=4, as they have"),
        (MoEConfig(layers="all"), None, "moe.layers='all' with .*: expected its own, blocks.1.mlp; leave it out"),
        (MoEConfig(layers="none"), None, "moe.layers='none' with"),
        (MoEConfig(), ["layers"], "moe.layers='last:2' with"),
        (MoEConfig(init="drop"), None, "moe.init='drop' with"),
    ],
)
def test_a_contradiction_is_one_line(tmp_path: Path, moe: MoEConfig, given: list[str] | None, message: str) -> None:
    settings = Settings(model=folder(tmp_path, layers="last:1"), moe=moe)
    with pytest.raises(ConfigError, match=message) as error:
        with_own_layers(settings, given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"img_size": 16}, {"drop_path_rate": 0.1}, {"args": {"depth": 3}}], ids=["img_size", "path", "args"]
)
def test_the_architecture_is_the_folders(tmp_path: Path, changes: dict) -> None:
    named = folder(tmp_path)
    assert create(ModelConfig(name=named.name, img_size=32)).num_classes == 5
    assert create(named, img_size=(32, 32)).num_classes == 5
    with pytest.raises(ConfigError, match="for images of 32x32: expected no img_size"):
        create(named, img_size=(32, 16))
    with pytest.raises(ConfigError, match="an architecture of its own, for images of 32x32: expected no img_size"):
        create(ModelConfig(name=named.name, **changes))


def test_layers_that_differ_are_told_and_each_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One that lost experts, an FFN of twice the width, and one that is untouched."""
    model = vit(depth=3)
    upcycle(model, config(layers=[0], num_experts=0, num_shared_experts=2))
    upcycle(model, config(layers=[1], num_experts=3))
    upcycle(model, config(layers=[2], num_experts=4))
    named = ModelConfig(name=f"local-dir:{vimoe.save(randomise(model), tmp_path / 'm')}")
    with caplog.at_level("INFO", logger="vimoe"):
        found = with_own_layers(Settings(model=named)).moe
    assert found.num_experts == 3 and found.layers == tuple(f"blocks.{i}.mlp" for i in range(3))
    assert "differ in num_experts, num_shared_experts" in caplog.text
    assert [layer.config.num_experts for layer in layers(create(named))] == [3, 4]
    lines = str(plan_of_own(named)).splitlines()[-3:]
    assert "dense FFN of 2 times" in lines[0] and "3 experts" in lines[1] and "4 experts" in lines[2]
    assert with_own_layers(Settings(model=named, moe=found)).moe == found
    with pytest.raises(ConfigError, match="expected num_experts=3, as they have"):
        with_own_layers(Settings(model=named, moe=MoEConfig(num_experts=4)))


def test_a_repository_on_the_hub_is_a_start_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (randomise(upcycle(vit(), config(num_experts=n)), seed=n).eval() for n in (3, 4))
    with pytest.warns(DeprecationWarning, match="content"), stand_in_hub(monkeypatch, tmp_path / "cache") as hub:
        url = vimoe.push_to_hub(first, "me/vit", token=TOKEN)
        vimoe.push_to_hub(second, "me/vit", token=TOKEN)
        old = f"hf-hub:me/vit@{url.rpartition('/')[2]}"
        for name, model in (("hf-hub:me/vit", second), (old, first)):
            assert len(own_layers(ModelConfig(name=name))) == 2
            got = create(ModelConfig(name=name)).eval()
            torch.testing.assert_close(got(images(got)), model(images(model)), rtol=1e-5, atol=1e-5)
        asked = [path for path in hub.asked if "safetensors" in path]
        create_without_weights(ModelConfig(name="hf-hub:me/vit"))
        assert [path for path in hub.asked if "safetensors" in path] == asked
        with pytest.raises(VimoeError, match="no such repository"):
            create(ModelConfig(name="hf-hub:me/none"))


def test_a_segmenter_on_the_hub_goes_on_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Segmenter(randomise(upcycle(vit(num_classes=0), config()), seed=3), 2).eval()
    scenes, named = SimpleNamespace(classes=("a", "b"), palette=None), ModelConfig(name="hf-hub:me/seg")
    with pytest.warns(DeprecationWarning, match="content"), stand_in_hub(monkeypatch, tmp_path / "cache"):
        vimoe.push_to_hub(model, "me/seg", token=TOKEN, label_names=["a", "b"])
        again = Segmentation.dense_model(named, scenes).eval()
        with pytest.raises(ConfigError, match="holds a segmenter, ViT and decoder"):
            create(named)
    torch.testing.assert_close(again(images(vit())), model(images(vit())), rtol=1e-5, atol=1e-5)


# ----- the command line


def test_a_run_goes_on_from_a_vimoe_through_the_verbs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kill_after: object
) -> None:
    photos = roles(tmp_path / "photos", train=8, val=4, test=2)
    start = ["--model.name", folder(tmp_path, layers="last:1", top_k=2).name]
    counted = call(capsys, "count", *start)
    assert counted["moe"]["layers"] == ["blocks.1.mlp"] and counted["moe"]["params"] > counted["dense"]["params"]
    assert call(capsys, "plan", *start, "--devices=2", "--memory=8GB", "--train.batch_size=8")["size"]
    said = refused(capsys, "plan", *start, "--moe.num_experts=8")
    assert "moe.num_experts=8 with" in said and "expected num_experts=4" in said
    train = ["train", f"--data.path={photos}", *QUICK, *start, "--train.stages=[head, experts]"]
    train += ["--train.epochs=1", "--train.warmup_epochs=0"]
    assert "moe.top_k=1 with" in refused(capsys, *train, "--moe.top_k=1", f"--out={tmp_path / 'never'}")
    call(capsys, *train, f"--out={tmp_path / 'whole'}")
    kill_after(4)
    with pytest.raises(Killed):
        call(capsys, *train, f"--out={tmp_path / 'killed'}")
    kill_after(1000)
    resume_training(tmp_path / "killed")
    ours, theirs = (vimoe.load(tmp_path / run / "model").state_dict() for run in ("whole", "killed"))
    assert all(torch.equal(ours[name], w) for name, w in theirs.items())
    assert logs(tmp_path / "whole") == logs(tmp_path / "killed")
    was = vimoe.load(tmp_path / "m").state_dict()
    moved = {name for name, w in was.items() if name in ours and not torch.equal(ours[name], w)}
    assert moved and all(name.startswith(("head", "blocks.1.mlp.experts", "blocks.1.mlp.router")) for name in moved)
    noted = json.loads((tmp_path / "whole" / "model" / "config.json").read_text())
    assert noted["label_names"] == ["blue", "green", "red"] and noted["vimoe"]["layers"]["blocks.1.mlp"]["top_k"] == 2
    assert "top_k: 2" in (tmp_path / "whole" / "config.yaml").read_text()
    assert call(capsys, "report", tmp_path / "whole", tmp_path / "killed", f"--out={tmp_path / 'both.html'}")
    assert len(moe_layers(vimoe.load(tmp_path / "whole" / "model"))) == 1
    again = ["train", "--config", tmp_path / "whole" / "config.yaml", f"--out={tmp_path / 'again'}"]
    call(capsys, *again)
    assert logs(tmp_path / "again") == logs(tmp_path / "whole")


def test_a_folder_of_another_library_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_transformers("vit").save_pretrained(tmp_path / "theirs")
    said = refused(capsys, "plan", f"--model.name=local-dir:{tmp_path / 'theirs'}")
    assert f"use transformers:{tmp_path / 'theirs'}" in said
    folder(tmp_path)
    assert f"use local-dir:{tmp_path / 'm'}" in refused(capsys, "plan", f"--model.name=transformers:{tmp_path / 'm'}")
