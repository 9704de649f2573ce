"""Model folders: safetensors weights, and a config.json in timm's format with a "vimoe" section.

The section notes MoE layers, decoder, and a family other than timm's. A folder without any of these is a plain timm
folder, which timm builds from the name "local-dir:FOLDER" too. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vimoe.config.data import check_preprocessing
from vimoe.config.model import FAMILIES, Read
from vimoe.config.moe import MoEConfig
from vimoe.errors import ConfigError, FolderError, VimoeError, counted, expect, first_line
from vimoe.files import TEMPORARY, read_text, rename, set_usual_mode, temporary_folder, write_json
from vimoe.models.folder_config import CONFIG, FORMAT, WEIGHTS, layers_of, read_section
from vimoe.models.frozen_trunk import nearly_equal
from vimoe.models.hub import find_folder
from vimoe.models.interface import find_backbone, unwrapped
from vimoe.models.reading import set_reading, tokens_read
from vimoe.models.segmenter import Segmenter
from vimoe.models.upcycling import build_layers, input_shapes, sites
from vimoe.models.weights_file import check_fit, check_inside, read_tensors
from vimoe.moe import MoE, ffn
from vimoe.moe.packed import check_not_packed


def save(
    model: nn.Module,
    path: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model folder, and prove that the model can be rebuilt from it before the folder gets its name.

    Args:
        model: a ViT of a known family, or a `Segmenter` of one, with or without MoE layers.
        path: folder to make.
        label_names: name of each class; by default those that the model came with.
        preprocessing: timm's data config (mean, std, crop_pct, interpolation); by default the model's own.
        model_args: arguments of timm.create_model that timm does not remember or JSON cannot hold; of another family,
            arguments of its `build`.
        overwrite: replace a model folder that is there.

    Raises:
        FolderError: if the folder is there already, is no model folder, or would not rebuild the model; nothing is
            left behind.
        ConfigError: if preprocessing has a name or value that it cannot have.
        VimoeError: if the model is optimised.

    >>> import tempfile, timm, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(path.name for path in vimoe.save(model, f"{folder}/model").iterdir())
    ['config.json', 'model.safetensors']
    """
    path = Path(path)
    model = unwrapped(model)
    try:
        _check_place(path, overwrite)
    except OSError as error:
        raise FolderError(f"{path} cannot be made: {error.strerror}; use another name") from error
    check_not_packed(model)
    backbone = find_backbone(model)
    backbone.check_known("build")
    if backbone.path and not isinstance(model, Segmenter):
        raise FolderError(
            f"{type(model).__name__} is a module around a ViT, and nothing notes how to rebuild it: expected the ViT "
            f"alone; save its part {backbone.path!r}"
        )
    if label_names is not None and len(label_names) != backbone.num_classes:
        raise FolderError(
            f"{len(label_names)} label_names for {counted(backbone.num_classes, 'class', 'classes')}: "
            f"expected a name for each"
        )
    if preprocessing:
        check_preprocessing(preprocessing, backbone.data_config({}))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path.parent) as temporary:
            backbone.write_config(temporary / CONFIG, label_names, preprocessing, model_args)
            _add_layers(model, temporary / CONFIG)
            weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            safetensors.torch.save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
            _prove(model, temporary)
            set_usual_mode(temporary / WEIGHTS)
            _check_place(path, overwrite)  # again: somebody may have put something there meanwhile
            rename(temporary, path)
    except VimoeError:
        raise
    except ValueError as error:  # of values that do not fit the model, or that JSON cannot hold
        raise FolderError(
            f"{path} could not be written: {first_line(error)}; pass model_args={{...}} and preprocessing={{...}} that "
            f"fit the model"
        ) from error
    except (OSError, SafetensorError) as error:  # the last of a full disk
        raise FolderError(
            f"{path} could not be written: {first_line(error)}; make room, or name another folder"
        ) from error
    return path


def load(
    path: str | Path, device: str | torch.device = "cpu", read: Read = "auto", *, revision: str | None = None,
    token: str | bool | None = None, cache_dir: str | Path | None = None,
) -> nn.Module:  # fmt: skip
    """Load the model that `save` wrote, in eval mode, with its preprocessing and label names.

    Args:
        path: model folder; or "USER/REPO", where no folder has this name, for a hub repository that is one.
            "hf-hub:USER/REPO" means the hub in any case.
        device: device of the loaded model.
        read: argument of `vimoe.set_reading`.
        revision, token, cache_dir: branch, tag or commit of a hub repository, access token, and folder of the cache, as
            huggingface_hub takes them.

    Raises:
        FolderError: if the folder is missing, incomplete, damaged, or from a newer version, or not on the hub.

    >>> import tempfile, timm, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     type(vimoe.load(vimoe.save(model, f"{folder}/model"))).__name__
    'VisionTransformer'
    """
    expect("path", path, (str, PathLike), "name a model folder, or a hub repository USER/REPO")
    path = find_folder(path, (CONFIG, WEIGHTS), revision, token, cache_dir)
    check_inside(path, (CONFIG, WEIGHTS))
    found = read_tensors(path / WEIGHTS)
    with torch.random.fork_rng(devices=[]):  # initial weights are overwritten: draw nothing from the user's seed
        with torch.device("meta"):  # no memory is taken for what does not fit
            check_fit(path / WEIGHTS, found, rebuild(path).state_dict(), "config.json", "save the model again")
        model = rebuild(path)
    types = {found[name].dtype for name, _ in model.named_parameters()}
    if len(types) == 1:
        model.to(types.pop())  # buffers that are not in the file, such as relative coordinates, go with the weights
    # copied out of the mapped file, whose offsets are not aligned as matrix products like their operands
    model.load_state_dict({name: tensor.clone() for name, tensor in found.items()}, assign=True)
    model = set_reading(model.to(device).eval(), read)
    if len({tensor.dtype for tensor in found.values() if tensor.is_floating_point()}) > 1:
        _check_mixed(model, path / WEIGHTS)
    return model


def _check_mixed(model: nn.Module, path: Path) -> None:
    """Raise FolderError if weights of several floating types do not compute together; in most models they do not."""
    try:
        with torch.no_grad():
            _logits(model, _noise(model))
    except RuntimeError as error:
        raise FolderError(
            f"{path} has weights of several types, which do not compute together: {first_line(error)}; save the model "
            f"again"
        ) from error


def _noise(model: nn.Module) -> Tensor:
    """Return two random images of the model's size and type, on its device."""
    weight = next(model.parameters())
    noise = torch.randn(2, *find_backbone(model).input_size, generator=torch.Generator().manual_seed(0))
    return noise.to(weight.device, weight.dtype)


def _check_place(path: Path, overwrite: bool) -> None:
    """Raise FolderError where a model folder may not be written: only another model folder is ever replaced."""
    if not path.exists():
        return
    if not overwrite:
        raise FolderError(f"{path} is there already: expected a new folder; use another name or overwrite=True")
    if not path.is_dir():
        raise FolderError(f"{path} is a file: expected a model folder to replace; use another name")
    held = [inside for inside in path.iterdir() if not inside.name.startswith(TEMPORARY)]
    odd = [inside.name for inside in held if inside.name not in (CONFIG, WEIGHTS) or not inside.is_file()]
    if not odd and held and not _is_model_config(path / CONFIG):
        odd = [CONFIG]
    if odd:
        raise FolderError(
            f"{path} holds {odd[0]!r}, which is not of vimoe.save: expected a model folder to replace; use another name"
        )


def _is_model_config(path: Path) -> bool:
    """Return True for a config.json that `save` or timm wrote for a model."""
    try:
        return "architecture" in json.loads(read_text(path))
    except (FolderError, ValueError, TypeError):
        return False


def _add_layers(model: nn.Module, config_path: Path) -> None:
    """Write into config.json: each MoE layer, each widened FFN, and the decoder."""
    config = json.loads(read_text(config_path))
    section = config.get("vimoe", {})
    segmentation = {"segmentation": model.to_dict()} if isinstance(model, Segmenter) else {}
    with torch.device("meta"):
        layers = layers_made(model, _parent(config_path, {**section, **segmentation}))
    if layers or segmentation or section:
        rows = {name: {k: v for k, v in c.to_dict().items() if k != "layers"} for name, c in layers.items()}
        config["vimoe"] = {"format": FORMAT, "layers": rows, **segmentation, **section}
        write_json(config_path, config)


def layers_made(model: nn.Module, parent: nn.Module) -> dict[str, MoEConfig]:
    """Return the settings that make, of its dense parent, each MoE layer and each widened FFN of a model, by name."""
    before, layers = {site.name: site.module for site in sites(parent)}, {}
    for site in sites(model):
        if isinstance(site.module, MoE):
            layers[site.name] = replace(site.module.config, layers=(site.name,))
            continue
        width, was = (ffn.describe(each).hidden for each in (site.module, before[site.name]))
        if width != was and width % was == 0:
            layers[site.name] = MoEConfig(layers=(site.name,), num_experts=0, num_shared_experts=width // was)
    return layers


def dense_parent(model: nn.Module) -> nn.Module:
    """Return the architecture of a ViT before any surgery, with random weights.

    Raises:
        FolderError: if the model does not say how to build it, as for `save`.
    """
    with temporary_folder(Path(tempfile.gettempdir())) as folder:
        find_backbone(model).write_config(folder / CONFIG, None, None, None)
        return _parent(folder / CONFIG, json.loads(read_text(folder / CONFIG)).get("vimoe", {}))


def rebuild(path: Path) -> nn.Module:
    """Build the architecture of a model folder, with weights still to be loaded. Raises FolderError as `load`."""
    section = read_section(path / CONFIG)
    model = _parent(path / CONFIG, section)
    layers = layers_of(path / CONFIG, section).values()
    try:
        shapes = input_shapes(model) if layers else {}  # one run for all layers
        for config in layers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what this configuration lacks was said when it was made
                build_layers(model, config, new=False, shapes=shapes)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # torch, of sizes beyond its integers
        said = first_line(error)
        raise FolderError(f"{path / CONFIG}: the 'vimoe' section does not fit the backbone: {said}") from error
    return model


def rebuild_parent(path: Path) -> nn.Module:
    """Build the architecture of a model folder as it is without MoE layers and widened FFNs."""
    return _parent(path / CONFIG, read_section(path / CONFIG))


def _parent(config: Path, section: dict[str, Any]) -> nn.Module:
    """Build the dense model of a config.json with this "vimoe" section."""
    try:
        backbone: nn.Module = FAMILIES.find(section.get("family", "timm")).rebuild(config)
    except ConfigError as error:
        raise FolderError(f"{config} is of a family that is not known here: {error}") from error
    segmentation = section.get("segmentation")
    if segmentation is None:
        return backbone
    try:
        return Segmenter(backbone, **segmentation)
    except (TypeError, ValueError) as error:
        raise FolderError(f"{config}: the 'segmentation' entry does not fit: {error}") from error


def _prove(model: nn.Module, path: Path) -> None:
    """Load the folder, and compare the outputs of both models on random images."""
    read: Read = "all" if tokens_read(model) is None else "auto"  # one way of computing: less rounding to allow for
    try:
        rebuilt = load(path, next(model.parameters()).device, read)
    except FolderError as error:
        raise FolderError(
            f"the folder would not rebuild this model: {str(error).replace(f'{path}{os.sep}', '')}; pass "
            f"model_args={{...}} with the arguments that it was built with"
        ) from error
    images = _noise(model)
    try:
        with _evaluating(model), torch.no_grad():
            expected, got = (_logits(each, images) for each in (model, rebuilt))
    except Exception as error:  # whatever a model raises that asks for more than images
        raise FolderError(
            f"the model, or what the folder rebuilds, does not run on images of {tuple(images.shape[1:])} in "
            f"{images.dtype}: {first_line(error)}; give all of its weights one type, or pass model_args={{...}}"
        ) from error
    if not expected.isfinite().all():
        raise FolderError("the model computes values that are not finite: expected a model whose weights are whole")
    if not nearly_equal(got, expected):
        raise FolderError(
            "a model rebuilt from the folder computes something else: pass model_args={...} with the arguments "
            "that it was built with, and name what was changed since"
        )


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the model's logits; what it draws at random (ViT-MAE masks patches) is the same on every call."""
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        backbone = find_backbone(model)
        output = backbone.run(images)
        return output if isinstance(output, Tensor) else backbone.logits(output)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
