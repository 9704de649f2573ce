"""The script beside an exported model prepares images as vimoe does."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import vimoe.models.export.folder
from vimoe.data.images import open_image
from vimoe.data.loaders import _eval_transform

SCRIPT = Path(vimoe.models.export.folder.__file__).parent / "predict.py"
SETTINGS = {
    "input_size": [3, 56, 56], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 0.9,
    "crop_mode": "center", "interpolation": "bicubic",
}  # fmt: skip


def script(folder: Path, settings: dict) -> ModuleType:
    (folder / "preprocessing.json").write_text(json.dumps(settings))
    (folder / "labels.json").write_text('{"labels": ["a", "b"]}')
    (folder / "predict.py").write_text(SCRIPT.read_text())
    spec = importlib.util.spec_from_file_location("predict_script", folder / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photograph(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).crop((100, 50, 100 + size[0], 50 + size[1]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interpolation": "bilinear", "crop_pct": 1.0},
        {"crop_mode": "squash"},
        {"crop_mode": "border"},
        {"input_size": [3, 42, 70]},
    ],
)
@pytest.mark.parametrize("size", [(333, 211), (211, 333), (40, 300), (200, 200)])
def test_pixels_are_those_of_evaluation(changes: dict, size: tuple[int, int], tmp_path: Path) -> None:
    settings = {**SETTINGS, **changes}
    photograph(size).save(tmp_path / "image.png")
    expected = _eval_transform(settings)(open_image(tmp_path / "image.png")).numpy()
    found = script(tmp_path, settings).pixels(tmp_path / "image.png")
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        "transparent", "palette", "grey", "16 bits", "16 bits, transparent", "16 bits, PGM", "rotated",
        "damaged metadata",
    ],
)  # fmt: skip
def test_odd_files_are_read_as_vimoe_reads_them(kind: str, tmp_path: Path) -> None:
    image, file = photograph((120, 90)), tmp_path / ("image.pgm" if kind.endswith("PGM") else "image.png")
    options: dict = {}
    if kind == "transparent":
        image.putalpha(image.convert("L"))
    elif kind == "palette":
        image = image.quantize(16)
    elif kind == "grey":
        image = image.convert("L")
    elif kind.startswith("16 bits"):
        values = np.asarray(image.convert("L")).astype("uint16") * 257
        image, options = Image.fromarray(values), {"transparency": int(values[0, 0])} if "transparent" in kind else {}
    elif kind == "rotated":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    else:
        options["exif"] = b"no tags"
    image.save(file, **options)
    expected = _eval_transform(SETTINGS)(open_image(file)).numpy()
    np.testing.assert_allclose(script(tmp_path, SETTINGS).pixels(file), expected, atol=1e-5)
    assert torch.from_numpy(expected).std() > 0.1


def test_an_image_without_a_known_white_level_is_refused_as_vimoe_refuses_it(tmp_path: Path) -> None:
    Image.new("F", (8, 8)).save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match=r"image\.tif has 32 bits a pixel"):
        script(tmp_path, SETTINGS).pixels(tmp_path / "image.tif")


def test_without_a_file_it_says_how_to_call_it(tmp_path: Path) -> None:
    script(tmp_path, SETTINGS)
    done = subprocess.run([sys.executable, tmp_path / "predict.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "python predict.py IMAGE..." in done.stderr and "Traceback" not in done.stderr
