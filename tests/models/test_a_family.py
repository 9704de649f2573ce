"""A family of backbones of a user (helpers/my_vit.py): what vimoe asks of it, and what it says without it."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import my_vit
from helpers.commands import call, refused
from helpers.my_vit import FeedForward, MyViT
from helpers.tiny import randomise
from torch import Tensor, nn

import vimoe
from vimoe.config.data import DataConfig
from vimoe.config.model import FAMILIES, ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.data.classification import load_data
from vimoe.data.loaders import eval_loader, preprocessing
from vimoe.errors import ConfigError, FolderError, SurgeryError
from vimoe.experiments.train import run_training
from vimoe.metrics.base import evaluate
from vimoe.models.create import create, create_segmenter, create_without_weights
from vimoe.models.interface import find_backbone, logits_of
from vimoe.moe.ffn import KINDS
from vimoe.training.parameter_groups import freeze_all_but, parameter_groups

TRAIN = TrainConfig(
    epochs=2, batch_size=20, lr=3e-3, warmup_epochs=0, layer_decay=0.5, hflip=0, min_crop=1, tensorboard=False
)
LAST = ["encoder.1.ffn", "encoder.2.ffn"]


def dense(**arguments: int) -> MyViT:
    torch.manual_seed(0)
    return MyViT(**arguments).eval()


def pictures(batch: int = 6, side: int = 8) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def settings(routing: str, cache: str = "none") -> Settings:
    train_only = "moe" if cache == "features" else "all"
    return Settings(
        model=ModelConfig(name="mine:tiny", pretrained=False, img_size=8),
        moe=MoEConfig(layers="last:2", num_experts=4, routing=routing),
        data=DataConfig(path="digits", images_per_class=10, workers=0, cache=cache),
        train=TrainConfig(**{**vars(TRAIN), "train_only": train_only}),
    )


def test_it_is_one_short_file() -> None:
    assert len(inspect.getsource(my_vit).splitlines()) <= 60


@pytest.mark.parametrize("routing", ["image", "token"])
def test_it_is_trained_analysed_pruned_and_loaded(routing: str, tmp_path: Path) -> None:
    summary = run_training(settings(routing), tmp_path / "run")
    assert summary["epochs"] == 2 and len(summary["classes"]) == 10
    noted = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert noted["vimoe"]["family"] == "mine" and list(noted["vimoe"]["layers"]) == LAST
    assert noted["label_names"] == summary["classes"]

    model = vimoe.load(tmp_path / "run" / "model")
    data = load_data(settings(routing).data)
    validation = eval_loader(data.val, preprocessing(model), 50, workers=0)
    assert evaluate(model, validation).to_dict() == pytest.approx(summary["val"], abs=1e-5)
    evidence = vimoe.analyze(model, validation, draws=2, overrule=20)
    assert [layer.name for layer in evidence.layers] == LAST
    assert evidence.base.to_dict() == pytest.approx(summary["val"], abs=1e-5)
    assert all(layer.routing == routing and layer.permuted for layer in evidence.layers)
    vimoe.prune(model, evidence, validation, tolerance=1.0)  # with which no layer stays
    assert [type(layer.ffn) for layer in model.encoder] == [FeedForward] * 3
    vimoe.save(model, tmp_path / "pruned")
    assert torch.equal(logits_of(vimoe.load(tmp_path / "pruned"), pictures()), logits_of(model, pictures()))


def test_features_of_its_frozen_trunk_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run_training(settings("image", "features"), tmp_path / "run")["features"]["before"] == "encoder.1"


@pytest.mark.parametrize("routing", ["image", "token"])
@torch.no_grad()
def test_upcycled_it_computes_what_it_did_and_is_brought_back(routing: str, tmp_path: Path) -> None:
    parent, x = dense(), pictures()
    model = vimoe.upcycle(copy.deepcopy(parent), MoEConfig(layers="last:2", num_experts=4, routing=routing))
    assert [name for name, module in model.named_modules() if isinstance(module, vimoe.MoE)] == LAST
    torch.testing.assert_close(logits_of(model, x), logits_of(parent, x), rtol=1e-4, atol=1e-5)
    randomise(model, scale=0.3)
    assert (logits_of(model, x) - logits_of(parent, x)).abs().max() > 0.1
    for name, (changed, of) in {"sparse": (model, 4), "dense": (vimoe.densify(copy.deepcopy(model)), 0)}.items():
        vimoe.save(changed, tmp_path / name, label_names=[f"class {i}" for i in range(10)])
        again = vimoe.load(tmp_path / name)
        assert torch.equal(logits_of(again, x), logits_of(changed, x))
        assert find_backbone(again).label_names[3] == "class 3"
        assert sum(isinstance(module, vimoe.MoE) for module in again.modules()) == of / 2
    assert vimoe.count(model).moe_layers == tuple(LAST)


def test_deeper_blocks_learn_faster_and_the_head_fastest() -> None:
    model = vimoe.upcycle(dense(), MoEConfig(layers="last:1", num_experts=4))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, TRAIN)
    rates = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert rates["stem.weight"] == rates["positions"] == 0.5**4
    assert [rates[f"encoder.{i}.attention.in_proj_weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert rates["encoder.2.ffn.experts.fc1.weight"] == 0.5 and rates["classify.weight"] == rates["norm.weight"] == 1
    assert decays["positions"] == decays["stem.bias"] == decays["encoder.2.ffn.experts.fc1.bias"] == 0
    assert decays["classify.weight"] == decays["encoder.2.ffn.experts.fc1.weight"] == TRAIN.weight_decay
    freeze_all_but(model, ["encoder.2.ffn"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in rates if name.startswith(("encoder.2.ffn.", "classify."))}


@torch.no_grad()
def test_it_carries_a_decoder(tmp_path: Path) -> None:
    """Which reads the patch tokens that blocks give; of this ViT the class token comes first."""
    config = ModelConfig(name="mine:tiny", pretrained=False)
    model = randomise(create_segmenter(config, 3)).eval()
    assert model.patch_size == (4, 4) and model.fixed_size == (8, 8) and model.read_blocks == (2,)
    x, tokens = pictures(2), []
    model.backbone.encoder[2].register_forward_hook(lambda _block, _args, output: tokens.append(output))
    (maps,) = find_backbone(model.backbone).features(x, [2])
    assert torch.equal(maps, tokens[0][:, 1:])
    vimoe.upcycle(model, MoEConfig(layers="last:1", num_experts=4))
    vimoe.save(model, tmp_path / "m")
    again = vimoe.load(tmp_path / "m")
    assert model(x).std() > 0 and torch.equal(again(x), model(x)) and again(x).shape == (2, 3, 8, 8)


class Unknown(nn.Module):
    """The same ViT in a class that no family knows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = dense().encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def test_what_no_family_knows_is_one_line(tmp_path: Path) -> None:
    for verb in (
        lambda: vimoe.upcycle(Unknown(), MoEConfig(layers="all")),
        lambda: vimoe.count(Unknown()),
        lambda: vimoe.save(Unknown(), tmp_path / "m"),
    ):
        with pytest.raises(
            SurgeryError, match="no family knows Unknown: expected a ViT of timm, .*, or a family of your own"
        ) as error:
            verb()
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="model.name='mein:tiny': unknown source 'mein'; did you mean 'mine'"):
        run_training(Settings(model=ModelConfig(name="mein:tiny"), data=DataConfig(path="digits")), tmp_path / "run")


def test_a_folder_is_a_start_and_one_of_a_family_that_is_not_there_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = dense()
    named = ModelConfig(name=f"local-dir:{vimoe.save(parent, tmp_path / 'm')}")
    same, other = create(named).eval(), create(named, num_classes=7)
    assert all(torch.equal(w, parent.state_dict()[name]) for name, w in same.state_dict().items())
    assert find_backbone(other).num_classes == 7 and find_backbone(other).label_names == [str(i) for i in range(7)]
    monkeypatch.delitem(FAMILIES, "mine")
    for start in (lambda: vimoe.load(tmp_path / "m"), lambda: create(named)):
        with pytest.raises(
            FolderError, match="family='mine': expected one of timm.*, or import what registers it"
        ) as error:
            start()
        assert "\n" not in str(error.value)


def test_a_folder_that_the_family_cannot_rebuild_says_so(tmp_path: Path) -> None:
    model = dense()
    model.arguments = {"width": 32}
    with pytest.raises(FolderError, match="would not rebuild this model.*pass model_args"):
        vimoe.save(model, tmp_path / "m")
    vimoe.save(model, tmp_path / "m", model_args={"width": 16})
    assert vimoe.load(tmp_path / "m").width == 16


def test_models_of_the_name_are_built_without_weights_too() -> None:
    model = create_without_weights(ModelConfig(name="mine:tiny", num_classes=4))
    assert all(p.is_meta for p in model.parameters()) and find_backbone(model).num_classes == 4


@pytest.fixture
def tables() -> Iterator[None]:
    """What a test adds to the tables is taken back."""
    before = [(table, dict(table)) for table in (FAMILIES, KINDS)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.mark.usefixtures("tables")
@torch.no_grad()
def test_the_example_of_the_documentation_works() -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n([^`]*class OwnViT.*?)```", page, re.DOTALL)
    made: dict[str, Any] = {}
    exec(example, made)
    parent = made["VisionTransformer"](16, 8, 2, 2, 24, 48, num_classes=5).eval()
    randomise(parent)
    x = pictures(4, 16)
    model = vimoe.upcycle(copy.deepcopy(parent), MoEConfig(layers="all", num_experts=4))
    torch.testing.assert_close(model(x), parent(x), rtol=1e-4, atol=1e-5)
    evidence = vimoe.analyze(model, [(x, torch.arange(4))], draws=2)
    assert [layer.name for layer in evidence.layers] == [f"encoder.layers.encoder_layer_{i}.mlp" for i in range(2)]
    assert not torch.equal(randomise(model)(x), parent(x))
    decays = {id(p) for group in parameter_groups(parent, TRAIN) if group["weight_decay"] for p in group["params"]}
    plain = {name for name, p in parent.named_parameters() if p.ndim > 1 and id(p) not in decays}
    assert plain == {"class_token", "encoder.pos_embedding"}
    with pytest.raises(SurgeryError, match="the family 'own' does not answer 'arguments'"):
        vimoe.save(model, "never")


def test_the_command_line_takes_its_names_and_leaves_its_layers_to_the_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    planned = call(capsys, "plan", "--model.name=mine:tiny", "--moe.layers=encoder.1.ffn")
    assert planned["moe"]["layers"] == ["encoder.1.ffn"]
    assert planned["dense"]["params"] == sum(p.numel() for p in dense().parameters())
    assert "layers='encoder.1.fn' names no FFN" in refused(
        capsys, "plan", "--model.name=mine:tiny", "--moe.layers=encoder.1.fn"
    )
