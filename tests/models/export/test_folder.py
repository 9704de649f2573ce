"""Exported folders: files that compute what the model does, or one line and nothing left behind."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import helpers.kinds
import pytest
import torch
from helpers.flops import macs
from helpers.slow import one_in
from helpers.tiny import images, perturb_experts, randomise, vit
from torch import Tensor, nn

import vimoe
import vimoe.models.export.folder
from vimoe.config.export import FORMATS
from vimoe.models.export.format import Format, Forward
from vimoe.models.export.onnx_file import OnnxFile
from vimoe.models.export.torch_file import TorchFile
from vimoe.models.segmenter import Segmenter

assert "low_rank" in vimoe.config.moe.EXPERTS, helpers.kinds


def sparse(routing: str = "image", **settings: object) -> nn.Module:
    return perturb_experts(
        vimoe.upcycle(vit(), vimoe.MoEConfig(**{"layers": "all", "num_experts": 4, "routing": routing, **settings}))
    )


class Eager(Format):
    """A format without a file of its own: it computes the model that a test puts here, and something on top."""

    file = "model.eager"
    model: nn.Module
    added = 0.0

    def write(self, program: object, path: Path) -> None:
        path.write_text("nothing")

    def load(self, path: Path, weights: dict[str, Tensor] | None = None) -> Forward:
        model = copy.deepcopy(self.model)
        for name, value in (weights or {}).items():
            model.get_parameter(name).data = value.clone()
        return lambda x: model(x) + self.added


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model that the format "eager" exports without a trace."""
    Eager.model, Eager.added = sparse(), 0.0
    monkeypatch.setitem(FORMATS, "eager", Eager)
    monkeypatch.setattr(vimoe.models.export.folder, "program_of", lambda *_: None)
    return Eager.model


@pytest.mark.parametrize("format", one_in(2, ["onnx", "torch"]))
def test_experts_that_no_image_reaches_are_compared_by_other_orders_of_the_router_s_rows(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vimoe.models.export.probe, "STEPS", 0)
    model = sparse(layers=[1])
    with torch.no_grad():
        model.blocks[1].mlp.router.weight[1:] = model.blocks[1].mlp.router.weight[0]  # of equal scores the first wins
        model.blocks[1].mlp.router.weight[1:] *= torch.tensor([0.1, 0.2, 0.3])[:, None]
    out = vimoe.export(model, tmp_path / "out", format=format)
    checked = json.loads((out / "export.json").read_text())["checked"]
    assert checked["router_orders"] > 1 and checked["unreached"] == {}
    kind = FORMATS.find(format)()
    with pytest.raises(KeyError):
        kind.load(out / kind.file, {"nowhere.weight": torch.zeros(1)})
    monkeypatch.setattr(vimoe.models.export.folder, "program_of", lambda *_: None)
    monkeypatch.setattr(
        kind.__class__, "write", lambda self, program, path: path.write_bytes((out / self.file).read_bytes())
    )
    with torch.no_grad():
        idle = vimoe.models.export.folder.probe(vimoe.models.export.folder.to_export(model)).unreached["blocks.1.mlp"]
        model.blocks[1].mlp.experts.fc2.weight[idle, 0] += 1  # so the file has lost what no image reaches
    with pytest.raises(vimoe.VimoeError, match="gives logits that differ"):
        vimoe.export(model, tmp_path / "other", format=format)


@pytest.mark.parametrize(
    ("format", "routing"), one_in(3, [("onnx", "image"), ("onnx", "token"), ("torch", "image"), ("torch", "token")])
)
def test_a_file_computes_what_the_model_does(format: str, routing: str, tmp_path: Path) -> None:
    model = sparse(routing)
    out = vimoe.export(model, tmp_path / "out", format=format)
    kind = FORMATS.find(format)()
    forward, x = kind.load(out / kind.file), images(model, 7)
    with torch.no_grad():
        for batch in (1, 7):
            torch.testing.assert_close(forward(x[:batch]), model(x[:batch]), rtol=0, atol=1e-4)
    checked = json.loads((out / "export.json").read_text())["checked"]
    assert checked["unreached"] == {} and checked["largest_difference"] < 1e-5
    assert (out / "predict.py").exists() == (format == "onnx")
    if format == "torch":
        # the chosen experts alone, and in the last block the tokens that the head reads
        assert (
            macs(torch.export.load(out / "model.pt2").module(), x[:1])
            == vimoe.count(model).computed_macs
            < vimoe.count(model).macs
        )


def test_a_segmenter_gives_scores_of_pixels_at_the_size_of_its_crop(tmp_path: Path) -> None:
    model = randomise(Segmenter(vit(num_classes=0, dynamic_img_size=True), 3), seed=1, scale=0.3).eval()
    model = perturb_experts(vimoe.upcycle(model, vimoe.MoEConfig(layers="last:1", num_experts=4, routing="token")))
    out = vimoe.export(model, tmp_path / "out")
    x = torch.randn(3, 3, *model.crop)
    with torch.no_grad():
        torch.testing.assert_close(OnnxFile().load(out / "model.onnx")(x), model(x), rtol=0, atol=1e-4)
    assert not (out / "predict.py").exists()


def test_a_vit_of_any_size_is_exported_at_the_size_of_its_data_config(tmp_path: Path) -> None:
    model = vit(dynamic_img_size=True)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 48, 64)}  # it is built for 32 x 32
    x = torch.randn(3, 3, 48, 64)
    out = vimoe.export(model, tmp_path / "out", images=x)
    assert json.loads((out / "preprocessing.json").read_text())["input_size"] == [3, 48, 64]
    with torch.no_grad():
        torch.testing.assert_close(OnnxFile().load(out / "model.onnx")(x), model(x), rtol=0, atol=1e-4)


def test_a_model_of_grey_images_has_no_script_for_rgb_ones(tmp_path: Path) -> None:
    out = vimoe.export(vit(in_chans=1), tmp_path / "out")
    assert json.loads((out / "preprocessing.json").read_text())["input_size"] == [1, 32, 32]
    assert not (out / "predict.py").exists()


def test_orders_of_a_router_that_the_file_does_not_hold_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Eager, path: Path, weights: dict[str, Tensor] | None = None) -> Forward:
        if weights:
            raise KeyError("folded")
        return self.model

    Eager.model = sparse("token", layers="last:1", router="hash")  # the class token, which alone is read, has one route
    monkeypatch.setitem(FORMATS, "eager", Eager)
    monkeypatch.setattr(vimoe.models.export.folder, "program_of", lambda *_: None)
    monkeypatch.setattr(Eager, "load", load)
    out = vimoe.export(Eager.model, tmp_path / "out", format="eager")
    checked = json.loads((out / "export.json").read_text())["checked"]
    assert len(checked["unreached"]["blocks.1.mlp"]) == 3 and checked["router_orders"] == 1


def test_the_model_stays_as_it_is(eager: nn.Module, tmp_path: Path) -> None:
    Eager.model = copy.deepcopy(eager)
    before = {name: value.clone() for name, value in eager.double().train().state_dict().items()}
    vimoe.export(eager, tmp_path / "out", format="eager")
    assert eager.training and all(torch.equal(value, before[name]) for name, value in eager.state_dict().items())
    assert json.loads((tmp_path / "out" / "preprocessing.json").read_text())["input_size"] == [3, 32, 32]
    assert json.loads((tmp_path / "out" / "labels.json").read_text())["labels"] == list("01234")


def test_a_file_that_computes_something_else_is_refused_and_nothing_is_left(eager: nn.Module, tmp_path: Path) -> None:
    Eager.added = 1e-3
    with pytest.raises(
        vimoe.VimoeError, match=r"model.eager gives logits that differ from the model's by 0.000"
    ) as error:
        vimoe.export(eager, tmp_path / "out", format="eager")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    Eager.model = vit(num_classes=4)
    with pytest.raises(vimoe.VimoeError, match=r"gives \(1, 4\) for 1 image: expected \(1, 5\)"):
        vimoe.export(eager, tmp_path / "out", format="eager")
    assert not list(tmp_path.iterdir())


def test_what_is_measured_is_called_as_the_model_is(eager: nn.Module, tmp_path: Path) -> None:
    def measure(models: dict[str, nn.Module]) -> dict[str, object]:
        (only,) = models.values()
        x: Tensor = images(eager)
        assert only is not eager and vimoe.models.interface.label_names(only) == list("01234")
        return {"same": bool(torch.equal(only(x), eager(x))), "names": list(models)}

    vimoe.export(eager, tmp_path / "out", format="eager", measure=measure)
    receipt = json.loads((tmp_path / "out" / "export.json").read_text())
    assert receipt["same"] and receipt["names"] == ["model.eager"]


def test_mistakes_are_one_line_and_leave_nothing(
    eager: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    mistakes = [
        ({"format": "onxn"}, "format='onxn': expected one of onnx, torch"),
        ({"format": "eager", "int8": True}, "int8=True with format='eager': expected format='onnx'"),
        ({"format": "eager", "path": tmp_path / "there"}, "already exists"),
    ]
    for changes, said in mistakes:
        with pytest.raises(vimoe.VimoeError, match=said):
            vimoe.export(eager, **{"path": tmp_path / "out", **changes})
    with pytest.raises(vimoe.VimoeError, match=r"images of \(2, 3, 8, 8\): expected \(M, 3, 32, 32\)"):
        vimoe.export(eager, tmp_path / "out", format="eager", images=torch.zeros(2, 3, 8, 8))
    with pytest.raises(vimoe.VimoeError, match="no family knows Linear"):
        vimoe.export(nn.Linear(2, 2), tmp_path / "out", format="eager")
    eager.pretrained_cfg = {**eager.pretrained_cfg, "label_names": ["one"]}
    with pytest.raises(vimoe.VimoeError, match="classes and 1 label name:"):
        vimoe.export(eager, tmp_path / "out", format="eager")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_layer_that_cannot_be_traced_is_named_with_a_remedy(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = sparse(layers=[1], experts="low_rank")
    with pytest.raises(
        vimoe.VimoeError, match=r"blocks.1.mlp with moe.router='softmax' and moe.experts='low_rank'"
    ) as error:
        vimoe.export(model, tmp_path / "out", format="torch")
    assert "vimoe.densify (how=shared, merge, matched)" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()) and capfd.readouterr().err == ""


def test_a_model_that_has_no_such_layer_is_named_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, x: forward(self, x) if x.sum() > 0 else x)
    with pytest.raises(vimoe.VimoeError, match="VisionTransformer cannot be exported: .*; expected a ViT"):
        vimoe.export(model, tmp_path / "out", format="torch")


def test_a_format_says_which_library_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(TorchFile, "needs", ("torch", "nowhere"))
    with pytest.raises(vimoe.VimoeError, match="needs torch, nowhere, and nowhere is not installed: pip install"):
        vimoe.export(vit(), tmp_path / "out", format="torch")
