"""ONNX files: chosen experts alone compute, int8 matrices, and weights that lie beside a file."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from helpers.layers import EXPERTS, make, tokens
from helpers.slow import one_in
from onnx.numpy_helper import to_array
from torch import Tensor

import vimoe
from vimoe.models.export import onnx_file
from vimoe.models.export.onnx_file import OnnxFile
from vimoe.models.export.program import program_of


def written(layer: vimoe.MoE, path: Path) -> Path:
    OnnxFile().write(program_of(layer.eval().requires_grad_(False), tokens(2)), path)
    return path


def chosen(layer: vimoe.MoE, x: Tensor) -> set[int]:
    with torch.no_grad():
        return set(layer.router(x).experts.flatten().tolist())


@pytest.fixture
def layer() -> vimoe.MoE:
    return make("swiglu", layout="image by class token", k=1).eval()


def test_experts_that_no_image_chose_are_not_computed(layer: vimoe.MoE, tmp_path: Path) -> None:
    x = tokens(2)
    expected, idle = layer(x), set(range(EXPERTS)) - chosen(layer, x)
    assert idle
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter[list(idle)] = torch.nan  # which nothing multiplies away
    torch.testing.assert_close(OnnxFile().load(written(layer, tmp_path / "layer.onnx"))(x), expected.detach())


@pytest.mark.parametrize("largest", one_in(2, [0, onnx_file.LARGEST]))
def test_int8_weights_are_those_of_all_matrices_but_the_router_s(
    largest: int, layer: vimoe.MoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST", largest)  # 0: the weights lie beside the file
    file, small = written(layer, tmp_path / "layer.onnx"), tmp_path / "small.onnx"
    assert (tmp_path / "layer.onnx.data").exists() == (largest == 0)
    OnnxFile().quantize(file, small)
    graph = onnx.load(small).graph
    types = {each.name: to_array(each).dtype for each in graph.initializer}
    products = [types[node.input[1]] for node in graph.node if node.op_type == "MatMulInteger"]
    assert products == ["int8"] * (2 * EXPERTS + 3)  # of each expert, and of the shared one, whose first is two
    assert [types[node.input[1]] for node in graph.node if node.op_type == "MatMul"] == ["float32"]  # the router
    with torch.no_grad():
        for images in (1, 7):  # of which an expert gets none, or some
            x = tokens(images)
            y, expected = OnnxFile().load(small)(x), layer(x)
            assert 0 < (y - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    "settings", one_in(2, [{"groups": [2, 2], "capacity_factor": 0.7}, {"groups": [1, 3]}]), ids=str
)
def test_pools_and_capacities_are_written_too(settings: dict, tmp_path: Path) -> None:
    layer, x = make(k=1, **settings).eval(), tokens(2)
    found = OnnxFile().load(written(layer, tmp_path / "layer.onnx"))(x)
    torch.testing.assert_close(found, layer(x).detach(), rtol=1e-4, atol=1e-5)
