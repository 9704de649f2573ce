"""A representative of every family in the table of architectures: what it computes, its gradients, and its folder.

The families are those of docs/compatibility_rows.py, and each is represented by its first row that can be upcycled. A
family without such a row is refused, with the reason that the table has.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from compatibility import families, read
from compatibility_probes import backward, identity, output, subject
from compatibility_rows import Architecture

import vimoe
from vimoe.errors import SurgeryError
from vimoe.models.upcycling import sites

FOUND = read()
REPRESENTED = {
    key: next((row for row in rows if FOUND.get(row.key, {}).get("identity") == "yes"), None)
    for key, rows in families().items()
}
DEEP = (
    "csatv2",
    "efficientformer",
    "focalnet",
    "gcvit",
    "metaformer",
    "mvitv2",
    "nest",
    "nextvit",
    "sequencer",
    "volo",
)
PROMISED = {  # what the documentation names, by the library's own module or configuration
    "timm": {
        "vision_transformer", "vision_transformer_sam", "naflexvit", "deit", "beit", "eva", "cait", "xcit",
        "swin_transformer", "swin_transformer_v2", "hiera", "mvitv2", "twins", "maxxvit", "convnext", "mlp_mixer",
    },
    "torchvision": {"vit", "swin", "swin_v2"},
    "transformers": {
        "ViT", "DeiT", "Beit", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "CLIP", "Siglip", "Siglip2", "ViTMAE",
        "Swin", "Data2VecVision", "SamVision", "Llama", "Qwen3", "Phi3",
    },
}  # fmt: skip


def _named(row: Architecture) -> object:
    """A representative as a parameter; slow are deep ones, whose shallow kin run always, and families of no promise."""
    slow = row.family in DEEP or row.family not in PROMISED[row.library]
    return pytest.param(row, id=f"{row.library}-{row.family}", marks=[pytest.mark.slow] * slow)


def test_every_promised_family_has_a_representative() -> None:
    upcycled = {library: {f for (of, f), row in REPRESENTED.items() if of == library and row} for library in PROMISED}
    for library, names in PROMISED.items():
        assert names <= upcycled[library], names - upcycled[library]
    refused = {family for (_, family), row in REPRESENTED.items() if row is None}
    assert {family for rows in upcycled.values() for family in rows} | refused == {family for _, family in families()}


@pytest.mark.parametrize("row", [_named(row) for row in REPRESENTED.values() if row])
def test_identity_gradients_and_round_trip(row: Architecture, tmp_path: Path) -> None:
    on = subject(row)
    identity(on)
    backward(on)
    with torch.no_grad():
        for layer in on.model.modules():
            if isinstance(layer, vimoe.MoE):
                for p in layer.experts.parameters():
                    p.add_(torch.randn_like(p) * 0.1)
        changed = output(on.model, on.inputs)
        assert (changed - output(on.parent, on.inputs)).abs().max() > 1e-3 * changed.abs().max()
        if FOUND[row.key]["save, load"] == "yes":
            again = vimoe.load(vimoe.save(on.model, tmp_path / "model"))
            torch.testing.assert_close(output(again, on.inputs), changed, rtol=1e-4, atol=1e-5)
        else:  # a language model
            with pytest.raises(SurgeryError, match="plan, count and save expect a model of images of one size"):
                vimoe.save(on.model, tmp_path / "model")
    dense = vimoe.densify(copy.deepcopy(on.model))
    assert len(sites(dense)) == len(sites(on.parent)) > 0
    state = dense.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in on.parent.state_dict().items())
    assert list(state) == list(on.parent.state_dict())


@pytest.mark.parametrize(
    "row", [pytest.param(rows[0], id=rows[0].family) for key, rows in families().items() if REPRESENTED[key] is None]
)
def test_a_family_that_cannot_be_upcycled_says_why(row: Architecture) -> None:
    with pytest.raises(SurgeryError) as error:
        subject(row)
    assert f"no: {error.value}" == FOUND[row.key]["identity"] and "\n" not in str(error.value)
