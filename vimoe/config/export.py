"""File formats of exported models."""

from __future__ import annotations

from vimoe.config.registry import Registry

FORMATS = Registry(
    "format",
    {
        "onnx": "vimoe.models.export.onnx_file:OnnxFile",
        "torch": "vimoe.models.export.torch_file:TorchFile",
    },
)
