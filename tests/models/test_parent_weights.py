"""A dense checkpoint becomes what upcycling makes of it, in a model that has its MoE layers already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers.stand_in_hub import stand_in_hub
from helpers.tiny import config, images, randomise, upcycle, vit
from helpers.tiny_transformers import vit as of_transformers
from torch import Tensor, nn

import vimoe
from vimoe.errors import ConfigError, FolderError, SurgeryError
from vimoe.models.interface import find_backbone, label_names, logits_of
from vimoe.models.segmenter import Segmenter


def pictures(model: nn.Module) -> Tensor:
    return torch.randn(2, *find_backbone(model).input_size, generator=torch.Generator().manual_seed(1))


def vimoe_of(model: nn.Module, **settings: object) -> nn.Module:
    """A model with MoE layers and other weights everywhere."""
    return randomise(upcycle(model, config(**settings)), seed=9).eval()


def assert_is_what_upcycling_makes(model: nn.Module, dense: nn.Module, *made: dict) -> None:
    """The weights bit for bit but those of the routers, which are drawn."""
    for settings in made or ({},):
        upcycle(dense, config(**settings))
    got, expected = model.state_dict(), dense.state_dict()
    assert got.keys() == expected.keys()
    drawn = [name for name in got if ".router." in name]
    assert drawn and all(torch.equal(got[name], w) for name, w in expected.items() if name not in drawn)


def test_a_file_of_timm(tmp_path: Path) -> None:
    dense = vit()
    path = vimoe.save(dense, tmp_path / "dense") / "model.safetensors"
    model = vimoe_of(vit(embed_dim=24), routing="token").train()
    was = {name: p for name, p in model.named_parameters()}
    assert vimoe.load_parent_weights(model, path) is model and model.training
    assert all(p is was[name] for name, p in model.named_parameters())  # which an optimiser may have
    model.eval()
    torch.testing.assert_close(model(images(dense)), dense(images(dense)), rtol=1e-4, atol=1e-5)
    assert_is_what_upcycling_makes(model, dense, {"routing": "token"})


def test_a_wrapped_model_is_the_model_inside(tmp_path: Path) -> None:
    dense = vit()
    path, wrapped = vimoe.save(dense, tmp_path / "dense"), nn.DataParallel(vimoe_of(vit()))
    assert vimoe.load_parent_weights(wrapped, path / "model.safetensors") is wrapped
    torch.testing.assert_close(wrapped.module(images(dense)), dense(images(dense)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "data2vec, split", "dinov2, gated"])
def test_a_file_and_a_folder_of_transformers(tmp_path: Path, name: str) -> None:
    dense = of_transformers(name)
    dense.save_pretrained(tmp_path / "dense")
    for source in (tmp_path / "dense" / "model.safetensors", f"transformers:{tmp_path / 'dense'}"):
        model = vimoe_of(of_transformers(name))
        vimoe.load_parent_weights(model, source)
        x = pictures(model)
        torch.testing.assert_close(logits_of(model, x), logits_of(dense, x), rtol=1e-4, atol=1e-5)
    assert_is_what_upcycling_makes(model, dense)


def test_layers_of_several_kinds_are_started_by_their_own_settings(tmp_path: Path) -> None:
    """One that lost an expert, an FFN of twice the width, experts from images, and an FFN as it is."""
    dense, made = vit(depth=4), [
        {"layers": [0], "num_experts": 3}, {"layers": [1], "num_experts": 0, "num_shared_experts": 2},
        {"layers": [2], "router": "centroids", "calibration_images": 6, "routing": "image"},
    ]  # fmt: skip
    path = vimoe.save(dense, tmp_path / "dense") / "model.safetensors"
    seen = [(images(dense, 6), torch.zeros(6, dtype=torch.long))]
    model = vit(depth=4)
    for settings in made:
        vimoe.upcycle(model, config(**settings), seen)
    randomise(model, seed=9)
    with pytest.raises(SurgeryError, match="router='centroids' is computed from training images"):
        vimoe.load_parent_weights(model, path)
    vimoe.load_parent_weights(model, path, seen)
    torch.testing.assert_close(model(images(dense)), dense(images(dense)), rtol=1e-4, atol=1e-5)


def test_a_name_is_brought_to_the_models_size_and_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = vit(num_classes=7)
    vimoe.save(dense, tmp_path / "dense")
    model = vimoe_of(vit(img_size=48))
    vimoe.load_parent_weights(model, tmp_path / "dense")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True, img_size=48)
    assert model.pos_embed.shape != dense.pos_embed.shape and torch.equal(model.pos_embed, theirs.pos_embed)
    assert torch.equal(model.blocks[1].mlp.experts.weights(2)["fc1.weight"], dense.blocks[1].mlp.fc1.weight)
    with stand_in_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.repos["me/dense"] = {}
        hub.commit("me/dense", "main", {f.name: f.read_bytes() for f in (tmp_path / "dense").iterdir()})
        from_hub = vimoe_of(vit(img_size=48))
        vimoe.load_parent_weights(from_hub, "hf-hub:me/dense")
    assert torch.equal(from_hub.pos_embed, theirs.pos_embed)


@pytest.mark.parametrize("family", ["timm", "transformers"])
def test_names_of_the_classes_come_with_the_classifier(tmp_path: Path, family: str) -> None:
    def dense() -> nn.Module:
        return vit() if family == "timm" else of_transformers("dinov2", num_labels=5)

    model = upcycle(vimoe.load(vimoe.save(dense(), tmp_path / "abcde", label_names="abcde")), config())
    for source in (vimoe.save(dense(), tmp_path / "none"), tmp_path / "none" / "model.safetensors"):
        assert label_names(vimoe.load_parent_weights(model, source)) == list("abcde")
    vimoe.save(dense(), tmp_path / "edcba", label_names="edcba")
    assert label_names(vimoe.load_parent_weights(model, tmp_path / "edcba")) == list("edcba")
    assert label_names(vimoe.load(vimoe.save(model, tmp_path / "again"))) == list("edcba")


def edited(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.bias"), "dense parent of this VisionTransformer: it lacks norm.bias; name another"),
        (lambda t: t.update(extra=torch.ones(1)), "it has extra, which the model has not"),
        (lambda t: t.update({"norm.bias": torch.ones(9)}), r"norm.bias has shape \(9,\) where the model has \(24,\)"),
        (lambda t: t.update({"norm.bias": torch.ones(24).long()}), "norm.bias is of torch.int64"),
    ],
)
def test_what_does_not_fit_is_named_and_the_model_stays(tmp_path: Path, change: Callable, message: str) -> None:
    path = edited(vimoe.save(vit(), tmp_path / "dense") / "model.safetensors", change)
    model = vimoe_of(vit())
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(FolderError, match=message) as error:
        vimoe.load_parent_weights(model, path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_what_is_no_dense_checkpoint_or_no_vit_is_one_line(tmp_path: Path) -> None:
    model = vimoe_of(vit())
    path = vimoe.save(model, tmp_path / "moe")
    with pytest.raises(FolderError, match="which the model has not"):
        vimoe.load_parent_weights(model, path / "model.safetensors")
    with pytest.raises(FolderError, match="which the model has not"):
        vimoe.load_parent_weights(model, f"local-dir:{path}")
    (tmp_path / "text").write_text("weights")
    with pytest.raises(FolderError, match="expected a whole safetensors file"):
        vimoe.load_parent_weights(model, tmp_path / "text")
    with pytest.raises(FolderError, match="nowhere.safetensors cannot be read"):
        vimoe.load_parent_weights(model, str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(ConfigError, match="no model folder there"):
        vimoe.load_parent_weights(model, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="timm has no such model"):
        vimoe.load_parent_weights(model, "nowhere")
    with pytest.raises(SurgeryError, match="no family knows Sequential"):
        vimoe.load_parent_weights(nn.Sequential(nn.Linear(2, 2)), path / "model.safetensors")
    with pytest.raises(SurgeryError, match="pass its part 'backbone'"):
        vimoe.load_parent_weights(Segmenter(upcycle(vit(num_classes=0), config()), 3), path)
