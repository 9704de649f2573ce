"""A model folder that somebody has edited is refused in one line, whichever library its ViT is of, and runs nothing."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.tiny import config, randomise, upcycle, vit
from helpers.tiny_transformers import vit as of_transformers
from torch import Tensor, nn

import vimoe
from vimoe.config.model import ModelConfig
from vimoe.errors import VimoeError
from vimoe.models.continued import own_layers
from vimoe.models.create import create
from vimoe.models.torchvision_vit import TorchvisionViT

OF_TORCHVISION = {"image_size": 8, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 48}
MADE: dict[str, Callable[[], nn.Module]] = {
    "timm": vit,
    "torchvision": lambda: TorchvisionViT.build(kind="vit", num_classes=5, **OF_TORCHVISION),
    "transformers": lambda: of_transformers("dinov2"),
}


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def trap(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Trap(folder / "sprung"), protocol=2))


def weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def bias(tensors: dict[str, Tensor]) -> str:
    """The name of a bias that is no classifier's, which may be new."""
    return next(
        name for name in sorted(tensors) if name.endswith("bias") and "head" not in name and "class" not in name
    )


def text(folder: Path, old: str, new: str) -> None:
    file = folder / "config.json"
    found = file.read_text()
    assert old in found
    file.write_text(found.replace(old, new, 1))


def entry(folder: Path, *steps: str, **values: object) -> None:
    file = folder / "config.json"
    place = found = json.loads(file.read_text())
    for step in steps:
        place = next(iter(place.values())) if step == "*" else place[step]
    place.update(values)
    file.write_text(json.dumps(found))


def into_a_folder(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def outside(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a key removed": (lambda p: weights(p, lambda t: t.pop(bias(t))), "it lacks .*bias"),
    "a key added": (lambda p: weights(p, lambda t: t.update(extra=torch.ones(1))), "it has extra"),
    "a shape changed": (lambda p: weights(p, lambda t: t.update({bias(t): torch.ones(1, 2)})), r"has shape \(1, 2\)"),
    "truncated": (cut, "expected a whole safetensors file"),
    "a pickle renamed": (lambda p: trap(p, "model.safetensors"), "expected a whole safetensors file"),
    "a header of 2^60 bytes": (
        lambda p: (p / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}"),
        "expected a whole safetensors file",
    ),
    "a link that leads out": (lambda p: outside(p, "model.safetensors"), "leads out of the folder"),
    "weights that are a folder": (lambda p: into_a_folder(p, "model.safetensors"), "has no model.safetensors"),
}
CONFIG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a wrong version": (lambda p: entry(p, "vimoe", format=2), "format 2: expected 1; update vimoe"),
    "code": (lambda p: entry(p, auto_map={"AutoModel": "trap.Trap"}), "names code .'auto_map'."),
    "code of a part": (lambda p: entry(p, "vimoe", arguments={"trust_remote_code": True}), "'trust_remote_code'"),
    "a router of another module": (lambda p: entry(p, "vimoe", "layers", "*", router="trap:Trap"), "moe.router='trap"),
    "a config that is a folder": (lambda p: into_a_folder(p, "config.json"), "config.json|no model folder"),
    "a number of 5000 digits": (lambda p: text(p, '"num_classes": ', f'"num_classes": {"9" * 5000}'), "is no JSON"),
    "a number of 400 digits": (lambda p: entry(p, "vimoe", "layers", "*", num_experts=10**400), "does not fit"),
    "a negative number": (lambda p: entry(p, "vimoe", "layers", "*", num_experts=-1), "num_experts=-1: expected"),
    "no number": (lambda p: entry(p, "vimoe", "layers", "*", router_noise=float("nan")), "NaN"),
    "no number elsewhere": (lambda p: entry(p, "pretrained_cfg", mean=[float("inf")] * 3), "Infinity"),
    "a file elsewhere": (lambda p: entry(p, "vimoe", layers={"../../x.mlp": {}}), "does not fit"),
    "a truncated config": (lambda p: (p / "config.json").write_text('{"vimoe": '), "is no JSON object"),
}


@pytest.fixture(scope="module", params=MADE)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = randomise(upcycle(MADE[request.param](), config()), seed=3)
    return vimoe.save(model, tmp_path_factory.mktemp(request.param) / "m")


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(VimoeError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", [*WEIGHTS, *CONFIG])
def test_a_folder_of_vimoe(folder: Path, tmp_path: Path, what: str) -> None:
    edited = shutil.copytree(folder, tmp_path / "m")
    damage, message = {**WEIGHTS, **CONFIG}[what]
    damage(edited)
    named = ModelConfig(name=f"local-dir:{edited}")
    refused(lambda: vimoe.load(edited), message)
    refused(lambda: create(named, 3), message)
    if what in CONFIG and what != "a number of 400 digits" and "elsewhere" not in what.partition("file")[2]:
        refused(lambda: own_layers(named) or create(named), message)
    assert not list(tmp_path.rglob("sprung"))


OF_OTHERS = {what: damage for what, (damage, _) in WEIGHTS.items() if "link" not in what}  # they may be links


@pytest.mark.parametrize(
    "what", [*OF_OTHERS, "a pickle in its place", "code", "a truncated config", "a config of others"]
)
def test_a_folder_of_timm(tmp_path: Path, what: str) -> None:
    edited = vimoe.save(vit(), tmp_path / "m")
    if what == "a pickle in its place":
        (edited / "model.safetensors").unlink()
        trap(edited, "pytorch_model.bin")
    elif what == "a config of others":
        (edited / "config.json").write_text('{"model_type": "vit"}')
    else:
        {**WEIGHTS, **CONFIG}[what][0](edited)
    refused(lambda: create(ModelConfig(name=f"local-dir:{edited}")), ".")
    assert not list(tmp_path.rglob("sprung"))


OF_THEIRS: dict[str, Callable[[Path], object]] = {
    **{what: damage for what, damage in OF_OTHERS.items() if what != "a key added"},  # which is left out
    "a pickle in its place": lambda p: ((p / "model.safetensors").unlink(), trap(p, "pytorch_model.bin")),
    "code for its class": lambda p: entry(p, auto_map={"AutoConfig": "trap.Trap"}, model_type="mine"),
    "code beside a known class": lambda p: entry(p, auto_map={"AutoModelForImageClassification": "trap.Trap"}),
    "shards elsewhere": lambda p: shards(p, "../elsewhere.safetensors"),
    "a pickle among shards": lambda p: shards(p, "pytorch_model.bin"),
    "a truncated config": lambda p: (p / "config.json").write_text('{"model_type": '),
    "a config that is a folder": lambda p: into_a_folder(p, "config.json"),
    "a number of 5000 digits": lambda p: text(p, '"hidden_size": ', f'"hidden_size": {"9" * 5000}'),
    "a width that does not fit": lambda p: entry(p, hidden_size=10**400),
    "no number": lambda p: entry(p, hidden_size=float("nan")),
}


def shards(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename((folder / name).resolve())
    index = {"metadata": {}, "weight_map": {"classifier.bias": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("what", OF_THEIRS)
def test_a_folder_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    of_transformers("dinov2").save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "trap.py").write_text("from pathlib import Path\nPath(__file__).with_name('sprung').touch()\n")
    monkeypatch.syspath_prepend(tmp_path / "m")
    OF_THEIRS[what](tmp_path / "m")
    refused(lambda: create(ModelConfig(name=f"transformers:{tmp_path / 'm'}")), ".")
    assert not list(tmp_path.rglob("sprung"))


def test_the_trap_works(tmp_path: Path) -> None:
    trap(tmp_path, "pickle")
    pickle.loads((tmp_path / "pickle").read_bytes())
    assert (tmp_path / "sprung").exists()
