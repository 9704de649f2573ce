"""Exported folders: a model as a file that runs without vimoe, with all that is needed to use it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.config.data import check_preprocessing
from vimoe.config.export import FORMATS
from vimoe.errors import ConfigError, FolderError, SurgeryError, counted
from vimoe.files import read_text, write_json, write_text
from vimoe.models.export.format import Format, Forward
from vimoe.models.export.probe import Probe, probe, sure_images
from vimoe.models.export.program import image_size, program_of, refusal, to_export, traced_images
from vimoe.models.interface import find_backbone, label_names, logits_of
from vimoe.moe.layer import moe_layers
from vimoe.run_folder import made_whole, versions

PREPROCESSING, LABELS, RECEIPT = "preprocessing.json", "labels.json", "export.json"
TOLERANCE = 1e-4  # of logits, times the largest of them where that is above 1
BATCHES = (1, 7)

Measure = Callable[[Mapping[str, nn.Module]], dict[str, Any]]


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "onnx",
    int8: bool = False,
    images: Tensor | None = None,
    preprocessing: dict[str, Any] | None = None,
    measure: Measure | None = None,
) -> Path:
    """Write a folder with the model as an ONNX file or a program of torch.export, for any number of images.

    All experts are in it, and a row (an image or a token) is computed by its chosen experts alone. The file is compared
    with the model on images that reach every expert that can be reached, in batches of 1, 7 and all; the folder gets
    its name after that. It holds the file, "preprocessing.json" (timm's data config), "labels.json", "export.json"
    (what was checked), and for ONNX "predict.py", which needs onnxruntime, numpy and Pillow, if images are RGB.

    The exported model takes normalised images (B, channels, height, width) in float32, of the model's own size, and
    gives logits (B, classes). A segmenter takes images of the size of its training crop, and gives (B, classes, height,
    width).

    Args:
        model: a ViT of a known family, or a segmenter of one, with or without MoE layers. It is not changed.
        path: folder to make.
        format: "onnx", "torch", or a name in `vimoe.config.export.FORMATS`.
        int8: also write a file with int8 weights, "model-int8.onnx".
        images: (M, channels, height, width) normalised images to compare on, beside random ones.
        preprocessing: values of timm's data config that replace the model's own.
        measure: function of the exported models by file name, which are called as the model is; what it returns is
            added to "export.json".

    Returns:
        The folder.

    Raises:
        ConfigError: if the format is unknown, needs a library that is not installed, or has no int8 weights; or if the
            images have another size than the model's, or preprocessing has a name or value that it cannot have.
        SurgeryError: if the model cannot be traced, or the file computes something else; nothing is left behind.
        FolderError: if the folder is there already, or cannot be written.

    >>> import tempfile, timm, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(path.name for path in vimoe.export(model, f"{folder}/torch", format="torch").iterdir())
    ['export.json', 'labels.json', 'model.pt2', 'preprocessing.json']
    """
    writer: Format = FORMATS.find(format)()
    writer.check(format, int8)
    with made_whole(path) as folder:
        exported = to_export(model)
        if images is not None and (images.ndim != 4 or images.shape[1:] != image_size(exported)):
            raise ConfigError(
                f"images of {tuple(images.shape)}: expected (M, {', '.join(map(str, image_size(exported)))}), as the "
                f"model's images are; resize them"
            )
        check_preprocessing(preprocessing or {}, find_backbone(exported).data_config({}))
        prepared, labels = find_backbone(exported).data_config(preprocessing or {}), label_names(exported)
        file = folder / writer.file
        try:
            with _disk(path):
                writer.write(program_of(exported, traced_images(exported)), file)
        except FolderError:
            raise
        except Exception as error:  # torch and the formats' libraries have no common class
            part = folder / f"part-{writer.file}"
            raise refusal(exported, error, lambda *layer: writer.write(program_of(*layer), part)) from error
        seen = probe(exported, images)
        checked = compare(exported, writer, file, seen)
        forwards = {writer.file: writer.load(file)}
        if int8 and writer.int8_file:
            with _disk(path):
                writer.quantize(file, folder / writer.int8_file)
            forwards[writer.int8_file] = writer.load(folder / writer.int8_file)
        write_json(folder / PREPROCESSING, {**prepared, "input_size": image_size(exported)})
        write_json(folder / LABELS, {"labels": labels})
        scored = logits_of(exported, seen.images[:1])
        if writer.script and scored.ndim == 2 and image_size(exported)[0] == 3:  # it names a class for each RGB image
            write_text(folder / writer.script, read_text(Path(__file__).parent / writer.script))
        measured = measure({name: callable_model(exported, each) for name, each in forwards.items()}) if measure else {}
        used = {name: str(getattr(import_module(name), "__version__", "")) for name in writer.needs}
        receipt = {"format": format, "file": writer.file, "checked": checked, **measured}
        write_json(folder / RECEIPT, {**receipt, "versions": {**versions(), **used}})
    return Path(path)


@contextmanager
def _disk(path: str | Path) -> Iterator[None]:
    """Raise FolderError for an error of the disk."""
    try:
        yield
    except OSError as error:
        raise FolderError(
            f"{path} could not be written: {error.strerror}; make room, or name another folder"
        ) from error


@torch.no_grad()
def compare(model: nn.Module, writer: Format, file: Path, seen: Probe) -> dict[str, Any]:
    """Compare a file's outputs with the model's, and return what was compared and the largest difference.

    Experts that no image reached are compared in the file and the model with the rows of their routers in other orders.

    Raises:
        SurgeryError: if outputs differ by more than `TOLERANCE`.
    """
    worst = _difference(model, writer.load(file), seen.images, file.name)
    left = {(layer, expert) for layer, experts in seen.unreached.items() for expert in experts}
    rolled = copy.deepcopy(model)
    routers = {name: layer.router for name, layer in moe_layers(rolled).items() if name in seen.unreached}
    orders = 0
    while left and orders + 1 < max(router.config.num_experts for router in routers.values()):
        for router in routers.values():
            router.weight.data = router.weight.roll(1, dims=0)
        try:
            forward = writer.load(file, {f"{name}.router.weight": router.weight for name, router in routers.items()})
        except KeyError:  # the format has made something else of them
            break
        orders += 1
        images, missing = sure_images(rolled, seen.images)
        worst = max(worst, _difference(rolled, forward, images, file.name))
        left &= set(missing)
    unreached: dict[str, list[int]] = {}
    for layer, expert in sorted(left):
        unreached.setdefault(layer, []).append(expert)
    return {
        "images": len(seen.images),
        "batches": [*BATCHES, len(seen.images)],
        "router_orders": 1 + orders,
        "largest_difference": worst,
        "experts": {name: layer.config.num_experts for name, layer in moe_layers(model).items()},
        "unreached": unreached,
    }


def _difference(model: nn.Module, forward: Forward, images: Tensor, name: str) -> float:
    """Return the largest difference of the outputs of a file and a model, over the largest output if that is above 1.

    Raises:
        SurgeryError: if it is more than `TOLERANCE`.
    """
    worst = 0.0
    for batch in (*BATCHES, len(images)):
        expected, got = logits_of(model, images[:batch]), forward(images[:batch])
        if got.shape != expected.shape:
            raise SurgeryError(
                f"{name} gives {tuple(got.shape)} for {counted(batch, 'image')}: "
                f"expected {tuple(expected.shape)}; report it"
            )
        scale = max(1.0, float(expected.abs().max()))
        worst = max(worst, float((got - expected).abs().max()) / scale)
        if not worst <= TOLERANCE:
            raise SurgeryError(
                f"{name} gives logits that differ from the model's by {worst:.2g} of the largest on "
                f"{counted(batch, 'image')}: expected at most {TOLERANCE:g}; nothing was written, report it"
            )
    return worst


def callable_model(model: nn.Module, forward: Forward) -> nn.Module:
    """Return a copy of a model whose forward is another function, so that it is scored and timed as the model is."""
    copied = copy.copy(model)
    copied.forward = forward
    return copied
