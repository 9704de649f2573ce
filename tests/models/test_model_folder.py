"""A model folder brings the same model back, or is refused; nothing is left half-written and nothing unpickled."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from helpers.tiny import config, images, layers, perturb_experts, randomise, upcycle, vit
from torch import nn

import vimoe
from vimoe.errors import ConfigError, FolderError
from vimoe.models.cost import meta_images
from vimoe.models.interface import label_names

NAMES = ["a", "b", "c", "d", "e"]


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    """The same weights bit for bit; outputs to rounding, since products may depend on where weights lie in memory."""
    states = got.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], w) for name, w in states[1].items())
    torch.testing.assert_close(got(images(expected)), expected(images(expected)), rtol=1e-5, atol=1e-5)


def trained(**settings: object) -> nn.Module:
    return randomise(upcycle(vit(), config(**settings)), seed=3).eval()


@pytest.mark.parametrize("family", ["vit", "dinov2, packed SwiGLU", "dinov3, SwiGLU", "eva02, SwiGLU with inner norm"])
@pytest.mark.parametrize("settings", [{}, {"routing": "token", "top_k": 2, "num_shared_experts": 2}], ids=str)
def test_what_is_loaded_computes_the_same(tmp_path: Path, family: str, settings: dict) -> None:
    model = randomise(upcycle(vit(family), config(**settings)), seed=3).eval()
    vimoe.save(model, tmp_path / "m")
    again = vimoe.load(tmp_path / "m")
    assert_same(again, model)
    assert [layer.config.to_dict() for layer in layers(again)] == [
        {**layer.config.to_dict(), "layers": [name]}
        for name, layer in model.named_modules()
        if isinstance(layer, vimoe.MoE)
    ]


def test_a_mixed_model_is_rebuilt_layer_by_layer(tmp_path: Path) -> None:
    """One MoE, one FFN of twice the width (as densify leaves trained shared experts), one untouched FFN."""
    model = upcycle(vit(depth=3), config(layers=[0, 1], num_shared_experts=2))
    vimoe.densify(randomise(model, seed=4), layers=[1], how="shared")
    assert model.blocks[1].mlp.fc1.out_features == 2 * model.blocks[2].mlp.fc1.out_features
    vimoe.save(model, tmp_path / "m")
    assert_same(vimoe.load(tmp_path / "m"), model)


def test_a_model_is_rebuilt_with_one_run_for_all_of_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = upcycle(vit(depth=5), config()), []
    path = vimoe.save(model, tmp_path / "m")

    def counted(copied: nn.Module, batch: int) -> torch.Tensor:
        runs.append(copied)
        return meta_images(copied, batch)

    monkeypatch.setattr("vimoe.models.upcycling.meta_images", counted)
    assert_same(vimoe.load(path), model)
    assert len(layers(model)) == 5 and len(runs) == 2  # once without memory, to see if the weights fit


def test_a_dense_folder_is_timms(tmp_path: Path) -> None:
    model = vit()
    vimoe.save(model, tmp_path / "m", label_names=NAMES)
    assert "vimoe" not in json.loads((tmp_path / "m" / "config.json").read_text())
    assert_same(timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval(), model)


def test_labels_and_preprocessing_travel(tmp_path: Path) -> None:
    vimoe.save(trained(), tmp_path / "m", label_names=NAMES, preprocessing={"mean": (0.1, 0.2, 0.3), "crop_pct": 0.8})
    first = vimoe.load(tmp_path / "m")
    vimoe.save(first, tmp_path / "again")
    for model in (first, vimoe.load(tmp_path / "again")):
        assert label_names(model) == NAMES
        assert tuple(model.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3) and model.pretrained_cfg["crop_pct"] == 0.8


def test_saving_draws_no_random_numbers_and_keeps_modes(tmp_path: Path) -> None:
    model = trained().train()
    model.blocks[0].eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    vimoe.save(model, tmp_path / "m")
    assert torch.equal(torch.rand(3), expected)
    assert model.training and not model.blocks[0].training and model.blocks[1].training


def test_a_model_that_the_folder_would_not_rebuild_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = trained()
    model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim = 1, 24  # timm cannot know
    with pytest.raises(FolderError, match="computes something else: pass model_args"):
        vimoe.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_arguments_that_json_cannot_hold_are_asked_for_by_name(tmp_path: Path) -> None:
    model = vit(act_layer=nn.ReLU)
    with pytest.raises(FolderError, match="act_layer"):
        vimoe.save(model, tmp_path / "m")
    vimoe.save(model, tmp_path / "m", model_args={"act_layer": "relu"})
    assert_same(vimoe.load(tmp_path / "m"), model)


@pytest.mark.parametrize("name", ["m", "m" * 255])  # as long as a name may be
def test_a_folder_is_replaced_only_when_asked(tmp_path: Path, name: str) -> None:
    first, second = trained(), perturb_experts(trained())
    vimoe.save(first, tmp_path / name)
    with pytest.raises(FolderError, match="is there already.*overwrite=True"):
        vimoe.save(second, tmp_path / name)
    assert_same(vimoe.load(tmp_path / name), first)
    vimoe.save(second, tmp_path / name, overwrite=True)
    assert_same(vimoe.load(tmp_path / name), second)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_type_of_the_weights_travels(tmp_path: Path) -> None:
    vimoe.save(trained().bfloat16(), tmp_path / "m")
    assert {p.dtype for p in vimoe.load(tmp_path / "m").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["beit", "eva02, packed SwiGLU", "vit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_of_half_precision_are_saved(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Buffers that the file does not have get the type too, and rounding is no change of the model."""
    model = randomise(vit(family, depth=6), seed=2, scale=2.0).to(dtype)
    again = vimoe.load(vimoe.save(model, tmp_path / "m"), read="all")
    x = images(model).to(dtype)
    got, expected = again(x), model(x)
    assert got.dtype == dtype and (got - expected).abs().max() <= 0.03 * expected.abs().max()
    assert all(torch.equal(again.state_dict()[name], w) for name, w in model.state_dict().items())


def test_a_model_that_does_not_run_is_refused_in_one_line(tmp_path: Path) -> None:
    model = vit()
    model.blocks[0].register_forward_pre_hook(lambda _, args: (args[0].double(),))
    with pytest.raises(FolderError, match=r"does not run on images of \(3, 32, 32\) in torch.float32") as error:
        vimoe.save(model, tmp_path / "m")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def edit(path: Path, *steps: str, **entries: object) -> None:
    """Changes config.json: the object that the steps lead to gets these entries."""
    values = json.loads((path / "config.json").read_text())
    place = values
    for step in steps:
        place = place[step]
    place.update(entries)
    (path / "config.json").write_text(json.dumps(values))


def layer(**settings: object) -> dict:
    return {"blocks.0.mlp": settings}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda p: (p / "config.json").unlink(), "has no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "is no JSON object"),
        (lambda p: (p / "config.json").write_text("[]"), "is no JSON object: it holds a list"),
        (lambda p: (p / "config.json").write_text("[" * 99_999), "is no JSON object: maximum recursion"),
        (lambda p: edit(p, "pretrained_cfg", crop_pct=float("nan")), "is no JSON object: it has NaN"),
        (lambda p: edit(p, "vimoe", format=2), "expected 1; update vimoe"),
        (lambda p: edit(p, "vimoe", format=True), "expected 1; update vimoe"),
        (lambda p: edit(p, "vimoe", layers={}), "does not fit config.json"),
        (lambda p: edit(p, "vimoe", layers=[]), "does not fit the backbone"),
        (lambda p: edit(p, "vimoe", layers={"blocks.9.mlp": {}}), "blocks.9.mlp"),
        (lambda p: edit(p, "vimoe", layers=layer(num_expert=4)), "did you mean 'num_experts'"),
        (lambda p: edit(p, "vimoe", layers=layer(num_experts=10**9)), "does not fit config.json"),
        (lambda p: edit(p, "vimoe", layerz={}), "unknown entry 'layerz' of 'vimoe': did you mean 'layers'"),
        (lambda p: edit(p, vimoe=None), "'vimoe' is None: expected a dict"),
        (lambda p: edit(p, architecture=5), "'architecture' is 5: expected a str"),
        (lambda p: edit(p, architecture="vit_tinny"), "Unknown model"),
        (lambda p: edit(p, model_args=[1]), "'model_args' is .*: expected a dict"),
        (lambda p: edit(p, "model_args", embed_dim=2**18), "does not fit config.json"),
        (lambda p: edit(p, pretrained_cfg=None), "'pretrained_cfg' is None: expected a dict"),
        (lambda p: edit(p, label_names=5), "'label_names' is 5: expected a list"),
        (lambda p: edit(p, "pretrained_cfg", label_names=5), "'label_names' is 5: expected a list"),
        (lambda p: edit(p, "pretrained_cfg", mean="x"), "'mean' is x: expected a list"),
        (lambda p: edit(p, "pretrained_cfg", std=0.5), "'std' is 0.5: expected a list"),
        (lambda p: edit(p, "pretrained_cfg", crop_pct="most"), "'crop_pct' is most: expected a float"),
        (lambda p: edit(p, "pretrained_cfg", interpolation=3), "'interpolation' is 3: expected a str"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path: Path, damage: Callable, message: str) -> None:
    vimoe.save(trained(), tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(FolderError, match=message) as error:
        vimoe.load(tmp_path / "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: edit(p, "vimoe", family="trap:Trap"), "of a family that is not known here"),
        (lambda p: edit(p, "vimoe", layers=layer(router="trap:Trap")), "moe.router='trap:Trap'"),
        (lambda p: edit(p, "vimoe", layers=layer(experts="trap.Trap")), "moe.experts='trap.Trap'"),
        (lambda p: edit(p, "vimoe", layers=layer(init="trap:Trap")), "moe.init='trap:Trap'"),
        (lambda p: edit(p, "vimoe", layers=layer(gate="trap:Trap")), "moe.gate='trap:Trap'"),
        (lambda p: edit(p, "vimoe", segmentation={"classes": 5, "decoder": "trap:Trap"}), "'segmentation' entry"),
        (lambda p: edit(p, architecture="trap.Trap"), "Unknown model"),
        (lambda p: edit(p, "model_args", norm_layer="trap.Trap"), "timm cannot build"),
        (lambda p: edit(p, "model_args", block_fn="trap.Trap"), "timm cannot build"),
        (lambda p: edit(p, auto_map={"AutoModel": "trap.Trap"}), "names code .'auto_map'."),
        (lambda p: edit(p, "vimoe", arguments=[{"auto_map": {}}]), "names code .'auto_map'."),
        (lambda p: edit(p, "model_args", trust_remote_code=True), "names code .'trust_remote_code'."),
    ],
)
def test_code_that_a_folder_names_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable, message: str
) -> None:
    folder = vimoe.save(trained(), tmp_path / "m")
    (folder / "trap.py").write_text("from pathlib import Path\nPath(__file__).with_name('sprung').touch()\nTrap = dict")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    damage(folder)
    with pytest.raises(FolderError, match=message) as error:
        vimoe.load(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "sprung").exists() and "trap" not in sys.modules
    importlib.import_module("trap")
    assert (folder / "sprung").exists()  # the trap works
    del sys.modules["trap"]


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    vimoe.save(trained(), tmp_path / "m")
    sprung = tmp_path / "sprung"
    bomb = pickle.dumps(Trap(sprung))
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / "m" / name).write_bytes(bomb)
    with pytest.raises(FolderError):
        vimoe.load(tmp_path / "m")
    assert not sprung.exists()
    pickle.loads(bomb)
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"meann": [0.5, 0.5, 0.5]}, "preprocessing has 'meann': did you mean 'mean'"),
        ({"std": [0, 0, 0]}, "std=.*: expected values above 0"),
        ({"mean": torch.zeros(3)}, "mean=.*: expected three values"),
        ({"interpolation": "xyz"}, "interpolation='xyz': expected one of"),
        ({"crop_pct": "most"}, "crop_pct='most': expected"),
    ],
)
def test_preprocessing_that_nothing_reads_so_is_refused(tmp_path: Path, given: dict, message: str) -> None:
    for write in (vimoe.save, vimoe.export):
        with pytest.raises(ConfigError, match=message):
            write(vit(), tmp_path / "m", preprocessing=given)
    assert not list(tmp_path.iterdir())


def test_only_a_model_folder_is_ever_replaced(tmp_path: Path) -> None:
    """Whoever names a project, or a run with its photos, loses nothing of it."""
    model = vit()
    project = tmp_path / "project"
    (project / "photos").mkdir(parents=True)
    (project / "config.json").write_text("{}")
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "config.json").write_text('{"my": "settings"}')
    (tmp_path / "folders" / "model.safetensors" / "precious").mkdir(parents=True)
    (tmp_path / "file").touch()
    for place in (project, tmp_path / "settings", tmp_path / "folders", tmp_path / "file", project / "config.json"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(FolderError, match="expected a model folder to replace"):
            vimoe.save(model, place, overwrite=True)
        assert sorted(tmp_path.rglob("*")) == before
    vimoe.save(model, tmp_path / "model")
    vimoe.save(model, tmp_path / "model", overwrite=True)
    (tmp_path / "empty").mkdir()
    vimoe.save(model, tmp_path / "empty", overwrite=True)
    with pytest.raises(FolderError, match="cannot be made: File name too long"):
        vimoe.save(model, tmp_path / ("a" * 256))
