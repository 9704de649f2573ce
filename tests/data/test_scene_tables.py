"""The same scenes as a folder and as a table are the same data, from the roles to the trained weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import call
from helpers.packing import scenes_as_parquet
from helpers.scene_runs import MOE, SCENES
from helpers.scenery import NAMES, mask, scenes
from PIL import Image
from safetensors.numpy import load_file

from vimoe.cli import main
from vimoe.config.data import DataConfig
from vimoe.data.images import open_image
from vimoe.data.scene_scan import scan_scenes
from vimoe.data.scenes import Scenes, load_scenes
from vimoe.errors import ConfigError, DataError


def load(path: Path | str, **settings: object) -> Scenes:
    return load_scenes(DataConfig(path=str(path), task="segmentation", **settings))


def packed(root: Path, out: Path, **options: object) -> str:
    return f"hfds/{scenes_as_parquet(root, out, **options)}"


def pixels(found: Scenes) -> list[list[np.ndarray]]:
    """Of each scene of each role its pixels and class numbers."""
    every = [scene for role in (found.train, found.val, found.test) for scene in role]
    return [[np.asarray(open_image(image)), found.legend.read(truth)] for image, truth in every]


def alike(one: Scenes, other: Scenes) -> bool:
    counts = [(len(each.train), len(each.val), len(each.test)) for each in (one, other)]
    pairs = zip(pixels(one), pixels(other), strict=True)
    return counts[0] == counts[1] and all(np.array_equal(a, b) for each in pairs for a, b in zip(*each, strict=True))


@pytest.mark.parametrize("columns", [("image", "annotation"), ("pixel_values", "label"), ("before", "mask")], ids=str)
def test_a_table_has_the_folders_scenes(tmp_path: Path, columns: tuple[str, ...]) -> None:
    root = scenes(tmp_path / "scenes", train=12)  # as many as give row numbers of two digits
    folder, table = load(root), load(packed(root, tmp_path / "table", columns=columns))
    assert alike(folder, table) and table.legend == folder.legend and table.classes == NAMES
    assert scan_scenes(table, table.root).to_dict() == scan_scenes(folder, folder.root).to_dict()
    assert table.names(table.train[:2]) == [f"train/0/{columns[0]}", f"train/1/{columns[0]}"]


def test_a_table_that_datasets_saved_has_them_too(tmp_path: Path) -> None:
    import datasets

    root = scenes(tmp_path / "scenes")
    table = scenes_as_parquet(root, tmp_path / "table")
    loaded = datasets.load_dataset(str(table), cache_dir=str(tmp_path / "cache"))
    loaded.save_to_disk(str(tmp_path / "saved"))
    shutil.copy(table / "classes.yaml", tmp_path / "saved")
    assert alike(load(root), load(f"hfds/{tmp_path / 'saved'}"))


def test_without_a_legend_classes_come_from_the_train_masks(tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes", yaml="")
    assert load(packed(root, tmp_path / "table")).legend == load(root).legend


def test_validation_that_was_split_off_is_found_again(tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes", train=20, val=0, test=0)
    path = packed(root, tmp_path / "table")
    folder, table = load(root, seed=3), load(path, seed=3)
    assert table.split_off and alike(folder, table) and len(table.val) == 2
    again = load_scenes(DataConfig(path=path, seed=5), validation=table.names(table.val))
    assert again.names(again.val) == table.names(table.val)


def test_a_row_without_mask_or_image_stops_the_scan(tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes")
    found = load(packed(root, tmp_path / "table", without=("annotations/a003",)))
    with pytest.raises(DataError, match="^1 image has no mask: train/3/image; add masks"):
        scan_scenes(found, found.root)
    found = load(packed(root, tmp_path / "other", without=("images/a001", "images/a100")))
    with pytest.raises(
        DataError, match="^2 masks have no image: train/1/annotation, validation/0/annotation; add images"
    ):
        scan_scenes(found, found.root)


def test_test_images_without_masks_are_left_out(tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes")
    found = load(packed(root, tmp_path / "table", without=("annotations/a200", "annotations/a201")))
    assert not found.test and len(found.train) == 6 and not found.images_alone


@pytest.mark.parametrize("order", [("train", "validation", "test"), ("test", "train", "validation")], ids=str)
def test_test_images_without_a_column_of_masks_are_left_out(tmp_path: Path, order: tuple[str, ...]) -> None:
    import datasets

    table = scenes_as_parquet(scenes(tmp_path / "scenes"), tmp_path / "table")
    loaded = datasets.load_dataset(str(table), cache_dir=str(tmp_path / "cache"))
    loaded["test"] = loaded["test"].remove_columns("annotation")
    datasets.DatasetDict({split: loaded[split] for split in order}).save_to_disk(str(tmp_path / "saved"))
    found = load(f"hfds/{tmp_path / 'saved'}")
    assert not found.test and (len(found.train), len(found.val)) == (6, 2)
    loaded["train"] = loaded["train"].remove_columns("annotation")
    loaded.save_to_disk(str(tmp_path / "no masks"))
    with pytest.raises(DataError, match="6 images and 0 masks, and no pair of them in train"):
        load(f"hfds/{tmp_path / 'no masks'}")


def test_what_the_scan_refuses_is_named_by_row_and_column(tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes")
    Image.fromarray(np.full((24, 32), 9, "uint8")).save(root / "annotations/train/a002.png")
    found = load(packed(root, tmp_path / "values"))
    with pytest.raises(DataError, match=r"^1 of 10 masks cannot be used: train/2/annotation \(a pixel has the value 9"):
        scan_scenes(found, found.root)
    Image.fromarray(mask(2)[:-1]).save(root / "annotations/train/a002.png")
    found = load(packed(root, tmp_path / "sizes"))
    with pytest.raises(DataError, match=r"another size than its image: train/2/annotation \(32x23, the image 32x24"):
        scan_scenes(found, found.root)
    (root / "images/train/a002.png").write_bytes(b"no image")
    found = load(packed(root, tmp_path / "damaged"))
    with pytest.raises(DataError, match=r"^1 of 10 images cannot be read: train/2/image \(no known image format"):
        scan_scenes(found, found.root)


THREE = (
    "has 3 columns of type Image (image, photo, scan): expected one of images and one of masks with usual names; name"
)


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (("image", "photo", "scan"), {}, THREE),
        (("image", "photo", "scan"), {"label_column": "image"}, "has 3 columns of type Image (image, photo, scan)"),
        (("image", "mask", "label"), {}, "has 3 columns of type Image (image, mask, label)"),
        (("left", "right"), {}, "has 2 columns of type Image (left, right)"),
        (("image",), {}, "has 1 columns of type Image (image)"),
        (("image", "mask"), {"label_column": "maks"}, "data.label_column='maks': no such column of type Image in"),
        (("image", "mask"), {"image_column": "seen"}, "data.image_column='seen': no such column of type Image in"),
        (("image", "mask"), {"image_column": "mask", "label_column": "mask"}, "has 2 columns of type Image"),
        (("image", "mask"), {"val_split": "vall"}, "data.val_split='vall': no such split in hfds/"),
    ],
)
def test_columns_that_are_not_clear_are_one_line(
    tmp_path: Path, columns: tuple[str, ...], settings: dict, message: str
) -> None:
    path = packed(scenes(tmp_path / "scenes"), tmp_path / "table", columns=columns)
    with pytest.raises(DataError) as error:
        load(path, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_named_columns_are_taken(tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes")
    path = packed(root, tmp_path / "table", columns=("image", "outline", "depth"))
    assert alike(load(path, label_column="outline"), load(root))
    other = scenes(tmp_path / "others", train=5)
    assert not alike(load(root), load(packed(other, tmp_path / "other table")))  # the check can fail


def test_a_folder_has_no_columns(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^data.label_column='mask' with a folder: expected it for a table"):
        load(scenes(tmp_path), label_column="mask")


def test_a_table_with_no_row_of_both_is_one_line(tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes", train=1, val=0, test=0)
    with pytest.raises(DataError, match="1 image and 0 masks, and no pair of them in train"):
        load(packed(root, tmp_path / "table", without=("annotations/a000",)))


def test_a_run_on_a_table_is_the_run_on_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same weights to the last bit; and it is evaluated, analysed and goes elsewhere."""
    root = scenes(tmp_path / "scenes", train=9, val=0)
    runs = {"folder": str(root), "table": packed(root, tmp_path / "table", columns=("image", "outline", "depth"))}
    for name, path in runs.items():
        column = ["--data.label_column", "outline"] if name == "table" else []
        data = ["--data.path", path, *column, "--data.val_fraction", "0.2"]
        assert main(["train", *data, *SCENES, *MOE, "--out", str(tmp_path / f"{name}-run")]) == 0
    one, other = (load_file(tmp_path / f"{name}-run/model/model.safetensors") for name in runs)
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    scores = [call(capsys, "evaluate", tmp_path / f"{name}-run")["miou"] for name in runs]
    assert scores[0] == scores[1]
    assert call(capsys, "analyze", tmp_path / "table-run", "--draws", 1)["images"] == 2
    elsewhere = packed(scenes(tmp_path / "more", test=3), tmp_path / "more table", columns=("image", "outline", "more"))
    there = call(capsys, "evaluate", tmp_path / "table-run", "--data.path", elsewhere)
    assert there["images"] == 3
    assert json.loads((tmp_path / "table-run/summary.json").read_text())["scan"]["train"] == 7
