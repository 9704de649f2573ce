"""The format "torch": a program of torch.export, which torch.export.load opens without vimoe."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from vimoe.files import write_bytes
from vimoe.models.export.format import Format, Forward


class TorchFile(Format):
    """A .pt2 file. `torch.export.load(path).module()(images)` computes the logits."""

    file = "model.pt2"

    def write(self, program: ExportedProgram, path: Path) -> None:
        content = BytesIO()  # a full disk is no error of torch's own then
        torch.export.save(program, content)
        write_bytes(path, content.getvalue())

    def load(self, path: Path, weights: Mapping[str, Tensor] | None = None) -> Forward:
        module = torch.export.load(path).module()
        own = module.state_dict()
        for name, value in (weights or {}).items():
            own[name].data.copy_(value)

        @torch.no_grad()
        def forward(images: Tensor) -> Tensor:
            logits: Tensor = module(images)
            return logits

        return forward
