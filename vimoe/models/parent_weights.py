"""A dense checkpoint loaded into a model that has MoE layers: its FFNs become experts as `vimoe.upcycle` makes them."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import nn

from vimoe.config.model import ModelConfig
from vimoe.errors import SurgeryError, expect
from vimoe.models.calibration import Batches
from vimoe.models.create import create
from vimoe.models.interface import find_backbone, unwrapped
from vimoe.models.model_folder import dense_parent, layers_made
from vimoe.models.upcycling import convert
from vimoe.models.weights_file import check_fit, read_tensors


def load_parent_weights(model: nn.Module, source: str | Path, images: Batches | None = None) -> nn.Module:
    """Load the weights of a dense checkpoint into an upcycled model, in place.

    The model then is what `vimoe.upcycle` makes of the dense model with these weights: experts are started by the
    settings of each layer (`MoEConfig.init`; copies of the FFN by default), routers anew, and the rest is copied. With
    combine="mix" and copies it computes exactly what the dense model does, to rounding.

    Args:
        model: a ViT of a known family with MoE layers or widened FFNs.
        source: a safetensors file with the dense model's weights by their names in its library; or a model folder; or
            a name as `model.name` has it, such as "hf-hub:USER/REPO", "transformers:FOLDER" or a timm name. By name,
            weights are brought to the model's size of images, a classifier for other classes is a new one, and names of
            the classes come along.
        images: as for `vimoe.upcycle`, for starts and routers that are computed from images.

    Returns:
        The same model.

    Raises:
        FolderError: if tensors are missing, unexpected, or of another shape or type; they are named.
        ConfigError: if there is no such name.
        SurgeryError: if the ViT is inside of another module, or the layers need images. The model is as it was.

    >>> import tempfile, timm, torch, vimoe
    >>> dense, images = timm.create_model("test_vit").eval(), torch.randn(2, 3, 160, 160)
    >>> model = vimoe.upcycle(timm.create_model("test_vit").eval(), vimoe.MoEConfig(layers="last:2", num_experts=4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = vimoe.save(dense, f"{folder}/dense") / "model.safetensors"
    ...     model = vimoe.load_parent_weights(model, path)
    >>> torch.allclose(model(images), dense(images), atol=1e-5)
    True
    """
    expect("source", source, (str, PathLike), "name a file of weights, a folder or a model")
    whole = unwrapped(model)
    backbone = find_backbone(whole)
    backbone.check_known("build")
    if backbone.path:
        raise SurgeryError(
            f"{type(whole).__name__} is a module around a ViT: expected the ViT alone; pass its part {backbone.path!r}"
        )
    parent, names = dense_parent(whole), None
    if Path(source).is_file() or Path(source).suffix == ".safetensors":
        found = backbone.by_own_names(read_tensors(Path(source)))
    else:
        name = f"local-dir:{source}" if isinstance(source, Path) or Path(source).is_dir() else source
        named = create(ModelConfig(name=name), backbone.num_classes, img_size=backbone.input_size[1:])
        found, names = dict(named.state_dict()), find_backbone(named).vit_config.get("label_names")
    check_fit(
        source, found, parent.state_dict(), f"the dense parent of this {type(backbone.vit).__name__}", "name another"
    )
    parent.load_state_dict(found)
    parent.to(next(whole.parameters()).device)
    for config in layers_made(whole, parent).values():
        convert(parent, config, images)
    with torch.no_grad():
        whole.load_state_dict(parent.state_dict())
    if names:
        backbone.set_label_names(names)
    return model
