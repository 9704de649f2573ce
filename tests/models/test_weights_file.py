"""Weights that do not fit their model folder are refused by name, and no file outside of the folder is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.tiny import config, images, randomise, upcycle, vit
from torch import Tensor

import vimoe
from vimoe.errors import FolderError

ROUTER = "blocks.0.mlp.router.weight"


def saved(path: Path) -> Path:
    return vimoe.save(randomise(upcycle(vit(), config()), seed=3), path)


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load((path / "model.safetensors").read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, path / "model.safetensors")


def recast(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({ROUTER: tensors[ROUTER].to(dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(ROUTER), f"it lacks {ROUTER}; save"),
        (lambda t: [t.pop(f"blocks.{i}.attn.{n}.weight") for i in (0, 1) for n in ("qkv", "proj")], "and 1 more; save"),
        (lambda t: t.update(extra=torch.ones(2)), "it has extra, which the model has not"),
        (lambda t: t.update({"norm.weight": torch.ones(23)}), r"norm.weight has shape \(23,\) where .* has \(24,\)"),
        (lambda t: t.update(other=t.pop("norm.bias")), "it lacks norm.bias; it has other"),
        (recast(torch.int64), "is of torch.int64"),
        (recast(torch.bool), "is of torch.bool"),
        (recast(torch.complex64), "is of torch.complex64"),
        (recast(torch.float8_e4m3fn), "is of torch.float8_e4m3fn"),
        (lambda t: t.update({"norm.weight": torch.ones(24).half()}), "several types, which do not compute together"),
    ],
)
def test_weights_that_do_not_fit_are_named_in_one_line(tmp_path: Path, change: Callable, message: str) -> None:
    edit(saved(tmp_path / "m"), change)
    with pytest.raises(FolderError, match=message) as error:
        vimoe.load(tmp_path / "m")
    assert "\n" not in str(error.value) and "model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [lambda whole: b"", lambda whole: whole[:-9], lambda whole: whole[:99], lambda whole: b"x" * 99,
     lambda whole: (2**60).to_bytes(8, "little") + b"{}"],
)  # fmt: skip
def test_a_file_that_is_not_whole_is_one_line(tmp_path: Path, content: Callable) -> None:
    weights = saved(tmp_path / "m") / "model.safetensors"
    weights.write_bytes(content(weights.read_bytes()))
    with pytest.raises(FolderError, match="expected a whole safetensors file") as error:
        vimoe.load(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_types_that_compute_together_are_loaded(tmp_path: Path) -> None:
    """Scores are computed in float32, whatever the type of the router's weights."""
    model = randomise(upcycle(vit(), config()), seed=3).eval()
    model.blocks[0].mlp.router.bfloat16()
    vimoe.save(model, tmp_path / "m")
    again = vimoe.load(tmp_path / "m")
    assert again.get_parameter(ROUTER).dtype == torch.bfloat16
    torch.testing.assert_close(again(images(model)), model(images(model)))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_link_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    inside = saved(tmp_path / "m") / name
    outside = inside.rename(tmp_path / name)
    inside.symlink_to(outside)
    with pytest.raises(FolderError, match=f"{name} is a link that leads out of the folder") as error:
        vimoe.load(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_a_link_to_a_folder_and_the_cache_of_the_hub_are_loaded(tmp_path: Path) -> None:
    """Whose snapshots are links to blobs beside them."""
    saved(tmp_path / "m")
    (tmp_path / "best").symlink_to(tmp_path / "m")
    repo = tmp_path / "models--user--repo"
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (repo / "blobs" / name).write_bytes((tmp_path / "m" / name).read_bytes())
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
    for path in (tmp_path / "best", snapshot):
        assert ROUTER in vimoe.load(path).state_dict()


def test_an_index_of_shards_is_never_followed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {ROUTER: "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FolderError, match="has no model.safetensors"):
        vimoe.load(folder)
