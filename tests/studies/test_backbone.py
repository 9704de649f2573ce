"""The backbone of the studies is the ViT that the package's graph computes with."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from onnx import GraphProto, helper, numpy_helper
from transformers import Dinov2Config, Dinov2Model

from studies import backbone

OLD_NAMES = {  # of transformers as it was when the package was made
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def graph(model: Dinov2Model) -> GraphProto:
    """What torch's older exporter writes of a model: vectors by their names, matrices transposed and without a name."""
    held, nodes = {}, []
    for name, value in model.state_dict().items():
        array = value.numpy()
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        if name == "embeddings.position_embeddings":
            held["onnx::Concat_1"], held["onnx::Reshape_2"] = array[:, :1], array[:, 1:]
        elif array.ndim == 2 and name.endswith(".weight"):
            path = name.removesuffix(".weight").removeprefix("encoder.").replace(".", "/")
            path = path.replace("layer/", "layer.")
            nodes.append(
                helper.make_node("MatMul", ["x", f"onnx::MatMul_{len(nodes)}"], ["y"], f"/backbone/{path}/MatMul")
            )
            held[f"onnx::MatMul_{len(nodes) - 1}"] = array.T
        else:
            held[f"backbone.{name}"] = array
    return helper.make_graph(nodes, "g", [], [], [numpy_helper.from_array(a.copy(), n) for n, a in held.items()])


def test_the_model_folder_computes_what_the_graph_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, layerscale_value=0.5)
    theirs = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # biases too
    monkeypatch.setattr(backbone, "graph_of_package", lambda: graph(theirs))
    backbone.main(["--out", str(tmp_path / "vit")])
    assert f"where the studies have {backbone.DIGEST}" in capsys.readouterr().out
    mine = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
    images = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        torch.testing.assert_close(
            mine.forward_features(images), theirs(images).last_hidden_state, rtol=1e-4, atol=1e-4
        )
    with pytest.raises(SystemExit):
        backbone.main(["--out", str(tmp_path / "vit")])
