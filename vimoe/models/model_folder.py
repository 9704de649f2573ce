"""Model folders: safetensors weights and a config.json in timm's format with a section on MoE layers and decoder.

A folder without MoE layers, widened FFNs and decoder is a plain timm folder, which timm builds from the name
"local-dir:FOLDER" too. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models._hub import save_config_for_hf  # what timm.models.save_for_hf calls for its config.json
from torch import Tensor, nn

from vimoe.config.moe import MoEConfig
from vimoe.errors import FolderError, VimoeError, first_line
from vimoe.files import TEMPORARY, read_text, rename, temporary_folder, write_json
from vimoe.models.interface import model_input_size, unwrapped, vit
from vimoe.models.segmenter import Segmenter
from vimoe.models.upcycling import sites, upcycle
from vimoe.moe import MoE, ffn
from vimoe.moe.packed import check_not_packed

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1  # of the "vimoe" section


def save(
    model: nn.Module,
    path: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model folder, and proves that the model can be rebuilt from it before it takes its name.

    Args:
        model: a timm ViT, or a `Segmenter` of one, with or without MoE layers.
        path: the folder to make.
        label_names: name of each class; by default those that the model came with.
        preprocessing: timm's data config (mean, std, crop_pct, interpolation); by default the model's own.
        model_args: arguments of timm.create_model that timm does not remember or JSON cannot hold.
        overwrite: replace a model folder that is there.

    Raises:
        FolderError: where the folder is there already, is no model folder, or would not rebuild the model; nothing is
            left behind.
        VimoeError: for an optimised model.

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
    if not hasattr(model, "pretrained_cfg"):
        raise FolderError(f"{type(model).__name__} was not built by timm.create_model, which notes how to rebuild it")
    if label_names is not None and len(label_names) != model.num_classes:
        raise FolderError(f"{len(label_names)} label_names for {model.num_classes} classes: expected a name for each")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path.parent) as temporary:
            model_config = {"label_names": list(label_names)} if label_names else {}
            save_config_for_hf(vit(model), str(temporary / CONFIG), model_config, model_args, preprocessing)
            _add_layers(model, temporary / CONFIG)
            weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            safetensors.torch.save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
            _prove(model, temporary)
            (temporary / WEIGHTS).chmod(0o644)  # it was made for its owner alone
            _check_place(path, overwrite)  # again: somebody may have put something there meanwhile
            rename(temporary, path)
    except VimoeError:
        raise
    except (ValueError, OSError, SafetensorError) as error:  # the last of a full disk
        raise FolderError(
            f"{path} could not be written: {first_line(error)}; make room, or name another folder"
        ) from error
    return path


def load(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The model that `save` wrote, in eval mode. Its `pretrained_cfg` has the preprocessing and label names.

    Args:
        path: a model folder, or "hf-hub:USER/REPO" for a hub repository that is one.
        device: where to put it.

    Raises:
        FolderError: where the folder is missing, incomplete, damaged, or from a newer version.

    >>> import tempfile, timm, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     type(vimoe.load(vimoe.save(model, f"{folder}/model"))).__name__
    'VisionTransformer'
    """
    if str(path).startswith("hf-hub:"):
        from huggingface_hub import snapshot_download

        try:
            path = snapshot_download(str(path).removeprefix("hf-hub:"), allow_patterns=[CONFIG, WEIGHTS])
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise FolderError(f"{path} cannot be had: {reason}; check the name, or download the folder") from error
    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FolderError(f"{path} has no {name}: expected a folder that vimoe.save wrote")
    with torch.random.fork_rng(devices=[]):  # initial weights are overwritten: draw nothing from the user's seed
        model = _rebuild(path)
    try:
        mapped = _tensors(path / WEIGHTS)
        # copied out of the mapped file, whose offsets are not aligned as matrix products like their operands
        model.load_state_dict({name: tensor.clone() for name, tensor in mapped.items()}, assign=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FolderError(f"{path / WEIGHTS} does not fit {CONFIG}: {reason}; save the model again") from error
    return model.to(device).eval()


def _tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a file into memory; read them where its name is not UTF-8, which safetensors cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return safetensors.torch.load(path.read_bytes())
    return safetensors.torch.load_file(path)


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
    """Return True for a config.json as timm writes it for a model."""
    try:
        return "architecture" in json.loads(read_text(path))
    except (FolderError, ValueError, TypeError):
        return False


def _add_layers(model: nn.Module, config_path: Path) -> None:
    """Notes each MoE layer, each FFN that is a multiple of the backbone's width, and the decoder, in the config."""
    config = json.loads(read_text(config_path))
    segmentation = model.to_dict() if isinstance(model, Segmenter) else None
    with torch.device("meta"):
        parent = _parent(config_path.parent, segmentation)
    layers = {}
    for site in sites(model):
        if isinstance(site.module, MoE):
            layers[site.name] = site.module.config
            continue
        width, was = (ffn.describe(root.get_submodule(site.name)).hidden for root in (model, parent))
        if width != was and width % was == 0:
            layers[site.name] = MoEConfig(num_experts=0, num_shared_experts=width // was)
    if layers or segmentation:
        rows = {name: {k: v for k, v in c.to_dict().items() if k != "layers"} for name, c in layers.items()}
        config["vimoe"] = {"format": FORMAT, "layers": rows}
        if segmentation:
            config["vimoe"]["segmentation"] = segmentation
        write_json(config_path, config)


def _rebuild(path: Path) -> nn.Module:
    """The architecture of a folder, with weights still to be loaded."""
    try:
        section = json.loads(read_text(path / CONFIG)).get("vimoe", {"format": FORMAT, "layers": {}})
    except (json.JSONDecodeError, AttributeError) as error:
        raise FolderError(f"{path / CONFIG} is no JSON object: {error}; save the model again") from error
    if not isinstance(section, dict) or section.get("format") != FORMAT:
        raise FolderError(
            f"{path / CONFIG} has a 'vimoe' section {str(section)[:40]}: expected format {FORMAT}; update vimoe"
        )
    model = _parent(path, section.get("segmentation"))
    try:
        for name, values in section["layers"].items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what this configuration lacks was said when it was made
                upcycle(model, MoEConfig.from_dict({**values, "layers": [name]}))
    except (KeyError, TypeError, AttributeError, VimoeError) as error:
        raise FolderError(f"{path / CONFIG}: the 'vimoe' section does not fit the backbone: {error}") from error
    return model


def _parent(path: Path, segmentation: dict[str, Any] | None) -> nn.Module:
    """The dense model of a folder."""
    backbone = _backbone(path)
    if segmentation is None:
        return backbone
    try:
        return Segmenter(backbone, **segmentation)
    except (TypeError, VimoeError) as error:
        raise FolderError(f"{path / CONFIG}: the 'segmentation' entry does not fit: {error}") from error


def _backbone(path: Path) -> nn.Module:
    try:
        return timm.create_model(f"local-dir:{path}", pretrained=False)
    except (KeyError, RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise FolderError(
            f"timm cannot build the backbone of {path / CONFIG}: {first_line(error)}; "
            f"at save, pass model_args={{...}} with the arguments that timm.create_model was given"
        ) from error


def _prove(model: nn.Module, path: Path) -> None:
    """Loads the folder and compares outputs on random images."""
    tensor = next(model.parameters())
    try:
        rebuilt = load(path, tensor.device)
    except FolderError as error:
        raise FolderError(
            f"the folder would not rebuild this model: {str(error).replace(str(path) + '/', '')}; pass "
            f"model_args={{...}} with the arguments that timm.create_model was given"
        ) from error
    noise = torch.randn(2, *model_input_size(model), generator=torch.Generator().manual_seed(0))
    images = noise.to(tensor.device, tensor.dtype)
    with _evaluating(model), torch.no_grad():
        expected, got = model(images).float(), rebuilt(images).float()
    if not expected.isfinite().all():
        raise FolderError("the model computes values that are not finite: expected a model whose weights are whole")
    if expected.shape != got.shape or not (expected - got).abs().max() <= 1e-3 * expected.abs().max():
        raise FolderError(
            "a model rebuilt from the folder computes something else: pass model_args={...} with the arguments "
            "that timm.create_model was given, and name what was changed since"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
