"""A trained run becomes a file that runs without vimoe, by the command line; and what it says of mistakes."""

from __future__ import annotations

import ast
import json
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.commands import QUICK, TINY, call, refused
from helpers.pickles import PICKLE
from helpers.pictures import roles
from helpers.scene_runs import MOE, SCENES
from helpers.scenery import scenes
from PIL import Image
from sklearn.datasets import load_sample_images

from vimoe.cli import main
from vimoe.experiments.finished_run import FinishedRun
from vimoe.models.export.onnx_file import OnnxFile


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    photos, out = roles(tmp_path_factory.mktemp("photos")), tmp_path_factory.mktemp("runs") / "photos"
    moe = ["--moe.layers=last:1", "--moe.num_experts=4"]
    assert main(["train", "--data.path", str(photos), *TINY, *QUICK, *moe, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    assert main(["export", str(run), "--int8=true"]) == 0
    return run / "onnx"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    files = [folder / f"{i}.png" for i in range(2)]
    for file, pixels in zip(files, load_sample_images().images, strict=True):
        Image.fromarray(pixels).save(file)
    return files


def test_the_folder_has_the_file_and_what_was_checked(run: Path, exported: Path) -> None:
    names = ["export.json", "labels.json", "model-int8.onnx", "model.onnx", "predict.py", "preprocessing.json"]
    assert sorted(path.name for path in exported.iterdir()) == names
    receipt = json.loads((exported / "export.json").read_text())
    assert receipt["checked"]["experts"] == {"blocks.1.mlp": 4} and receipt["checked"]["unreached"] == {}
    assert receipt["checked"]["batches"][:2] == [1, 7] and receipt["checked"]["images"] > 8
    assert receipt["split"] == "test" and set(receipt["scores"]) == {"model.onnx", "model-int8.onnx"}
    assert {score["images"] for score in receipt["scores"].values()} == {9}
    assert set(receipt["images_per_second"]) == set(receipt["scores"])
    assert json.loads((exported / "labels.json").read_text()) == {"labels": ["blue", "green", "red"]}
    small, whole = (exported / name for name in names[2:4])
    assert small.stat().st_size < whole.stat().st_size


def test_the_script_says_what_vimoe_predict_says(
    run: Path, exported: Path, photographs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = call(capsys, "predict", run, *photographs, "--top=3")["predictions"]
    code = (
        "import json, predict, sys; print(json.dumps([predict.LABELS, predict.probabilities(sys.argv[1:]).tolist()]))"
    )
    command = [sys.executable, "-c", code, *map(str, photographs)]
    labels, found = json.loads(subprocess.run(command, cwd=exported, check=True, capture_output=True).stdout)
    for prediction, row in zip(said, found, strict=True):
        ours = {each["name"]: each["probability"] for each in prediction["classes"]}
        assert [ours[name] for name in labels] == pytest.approx(row, abs=1e-5)
    assert not np.allclose(*found, atol=1e-3)  # else a blank image would do


def test_the_script_needs_onnxruntime_numpy_and_pillow_alone(exported: Path) -> None:
    tree = ast.parse((exported / "predict.py").read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in found} - sys.stdlib_module_names == {"onnxruntime", "numpy", "PIL"}


EDITED = {
    "a pickle renamed": "ONNXRuntimeError",
    "truncated": "ONNXRuntimeError",
    "weights elsewhere": "escapes model directory",
    "code in its settings": "Expecting value",
}


@pytest.mark.parametrize("what", EDITED)
def test_a_folder_edited_by_hand_is_refused_and_nothing_in_it_runs(
    exported: Path, photographs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = shutil.copytree(exported, tmp_path / "onnx")
    file = folder / "model.onnx"
    if what == "a pickle renamed":
        file.write_bytes(PICKLE)
    elif what == "truncated":
        file.write_bytes(file.read_bytes()[:-99])
    elif what == "weights elsewhere":
        model = onnx.load(file)
        weight = model.graph.initializer[0]
        (tmp_path / "elsewhere").write_bytes(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="../elsewhere")
        file.write_bytes(model.SerializeToString())
    else:
        (folder / "preprocessing.json").write_text('{"mean": __import__("os").system("touch executed")}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=EDITED[what]):
        runpy.run_path(str(folder / "predict.py"))["probabilities"]([str(photographs[0])])
    assert not (tmp_path / "executed").exists()


def test_a_run_whose_images_are_gone_is_compared_on_random_ones(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    finished = FinishedRun(run)
    images, data = finished._few_images(), Path(finished.run.settings.data.path)
    assert images is not None and images.shape == (9, 3, 16, 16)
    data.rename(data.with_name("elsewhere"))
    try:
        assert FinishedRun(run)._few_images() is None
    finally:
        data.with_name("elsewhere").rename(data)
    assert "compared on random images alone" in caplog.text


@pytest.mark.slow  # 7 s
def test_a_segmentation_run_is_scored_by_windows_of_its_crop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", f"--data.path={scenes(tmp_path / 'street')}", *SCENES, *MOE, f"--out={run}"]) == 0
    said = refused(capsys, "export", run, "--int8=true", "--data.inference=whole")
    assert "data.inference='whole': expected 'slide'" in said and not (run / "onnx").exists()
    assert main(["export", str(run), "--int8=true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("compared with the model on ") and lines[-1] == str(run / "onnx")
    assert [line for line in lines if line.startswith("model-int8.onnx: ") and line.endswith(" images/s")]
    found, own = json.loads((run / "onnx" / "export.json").read_text()), call(capsys, "evaluate", run)
    assert found["scores"]["model.onnx"]["miou"] == pytest.approx(own["miou"], abs=1e-3)
    assert set(found["scores"]) == {"model.onnx", "model-int8.onnx"} and not (run / "onnx" / "predict.py").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert "make room" in refused(capsys, "export", run, "--format=torch", "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "format='onxn': expected one of onnx, torch" in refused(capsys, "export", run, "--format=onxn")
    assert "no such run" in refused(capsys, "export", tmp_path / "nowhere")
    assert "already exists" in refused(capsys, "export", run, "--out", exported)
    assert "int8=True with format='torch'" in refused(capsys, "export", run, "--format=torch", "--int8=true")
    out = tmp_path / "out"
    monkeypatch.setattr(OnnxFile, "needs", ("nowhere",))
    said = refused(capsys, "export", run, "--out", out)
    assert 'nowhere is not installed: pip install "vimoe[export]"' in said and not out.exists()
