"""The scan before training: what stops it, what is left out, what is warned of, and what a run tells of it."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.commands import QUICK, TINY, call, refused
from helpers.pictures import folder, roles
from PIL import Image

from vimoe.config.data import DataConfig
from vimoe.data.classification import load_data, load_folder
from vimoe.data.labelled_images import Data
from vimoe.data.scan import scan
from vimoe.errors import DataError
from vimoe.experiments.finished_run import FinishedRun


def scanned(root: Path, **settings: object) -> dict:
    return scan(load_data(DataConfig(path=str(root), **settings))).to_dict()


def damage(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).write_bytes(b"")
    return root


def test_whole_images_are_counted_and_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert scanned(roles(tmp_path)) == {
        "train": 24, "validation": 9, "test": 9, "classes": 3, "opened": 42, "unreadable": 0,
        "validation_in_train": 0, "test_in_train": 0, "contradicting": 0, "junk": {},
    }  # fmt: skip
    assert not caplog.records


@pytest.mark.parametrize("role", ["train", "val", "test"])
def test_an_unreadable_image_of_any_role_stops_with_reason_and_remedy(tmp_path: Path, role: str) -> None:
    damage(roles(tmp_path), f"{role}/red/001.png")
    message = (
        f"1 of 42 images cannot be read: {role}/red/001.png (the file is empty); remove them, or leave them out with "
    )
    with pytest.raises(DataError) as error:
        scanned(tmp_path)
    assert str(error.value) == f"{message}--data.skip_unreadable true"


def test_what_is_skipped_is_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(roles(tmp_path), "train/red/001.png", "val/blue/000.png", "test/red/000.png")
    found = scanned(tmp_path, skip_unreadable=True)
    assert [found[key] for key in ("train", "validation", "test", "opened", "unreadable")] == [23, 8, 8, 42, 3]
    assert len(caplog.records) == 1 and caplog.messages[0].startswith(
        "3 of 42 images cannot be read: train/red/001.png"
    )
    assert caplog.messages[0].endswith("left out")


@pytest.mark.parametrize("settings", [{}, {"images_per_class": 5}, {"val_fraction": 0.4, "seed": 3}], ids=str)
def test_to_skip_images_is_to_have_removed_them(tmp_path: Path, settings: dict) -> None:
    bad = ("red/001.png", "red/007.png", "blue/019.png")
    config = DataConfig(path=str(damage(folder(tmp_path, 20), *bad)), skip_unreadable=True, **settings)
    skipped = load_data(config)
    for name in bad:
        (tmp_path / name).unlink()
    assert load_data(config) == skipped == load_data(replace(config, skip_unreadable=False))


def test_a_class_that_loses_all_its_images_is_an_error(tmp_path: Path) -> None:
    damage(roles(tmp_path, train=2), "train/red/000.png", "train/red/001.png")
    with pytest.raises(DataError, match=r"no image of class 'red' can be read: .* 2 of 24 images .*red/000\.png"):
        scanned(tmp_path, skip_unreadable=True)


def test_images_of_another_folder_are_skipped_where_the_run_skips(tmp_path: Path) -> None:
    classes = ("blue", "green", "red")
    damage(roles(tmp_path), "test/red/001.png")
    assert len(load_folder(tmp_path, classes)[1]) == 9
    assert len(load_folder(tmp_path, classes, DataConfig(skip_unreadable=True))[1]) == 8


def test_junk_is_counted_and_loose_images_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path, 2)
    for name in ("Thumbs.db", ".DS_Store", "classes.txt", "loose.jpg", "loose.png", "red/notes.txt"):
        (root / name).write_bytes(b"x")
    for name in (".git", "red/empty"):
        (root / name).mkdir()
    (root / "all").symlink_to(root)
    expected = {"images beside the class folders": 2, ".txt files": 2, "links to folders": 1, ".db files": 1}
    expected |= {"hidden files": 1, "hidden folders": 1, "empty folders": 1}
    assert scanned(root)["junk"] == expected
    line = str(scan(load_data(DataConfig(path=str(root)))))
    assert line.startswith("3 train, 3 validation, 0 test images of 3 classes; 6 opened, 0 unreadable;")
    assert (
        "passed over: images beside the class folders (2), .txt files (2), .db files (1), " in line
        and line.endswith(", ...")
    )
    assert not caplog.records


def test_duplicates_between_roles_are_warned_of_with_a_pair(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = roles(tmp_path)
    shutil.copy(root / "train/red/003.png", root / "test/red/001.png")
    shutil.copy(root / "train/red/003.png", root / "test/blue/002.png")
    shutil.copy(root / "train/blue/000.png", root / "val/blue/new.png")
    shutil.copy(root / "val/red/000.png", root / "val/red/again.png")  # harmless
    found = scanned(root)
    assert (found["test_in_train"], found["validation_in_train"], found["contradicting"]) == (2, 1, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert caplog.messages[0].startswith(
        "1 of 11 validation images is in train too, such as val/blue/new.png = train/blue/000"
    )
    assert "2 of 9 test images are in train too, such as test/blue/002.png = train/red/003.png: " in caplog.messages[1]


def test_one_content_of_several_labels_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = roles(tmp_path)
    for copy in ("blue/a", "blue/b", "red/c", "green/d", "green/e"):
        shutil.copy(root / "train/blue/000.png", root / f"train/{copy}.png")
    shutil.copy(root / "train/red/000.png", root / "train/red/again.png")  # the same label: no contradiction
    assert scanned(root)["contradicting"] == 6
    assert len(caplog.records) == 1
    assert "6 of 30 train images contradict one another" in caplog.text
    assert "such as train/blue/000.png = train/green/d.png;" in caplog.text


def test_classes_without_an_image_in_a_role_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = roles(tmp_path / "data")
    shutil.rmtree(root / "test" / "red")
    shutil.rmtree(root / "val" / "blue"), shutil.rmtree(root / "val" / "green")
    scanned(root)
    assert caplog.messages == [
        "2 of 3 classes have no image in validation, such as blue: its scores leave them out, and they choose the "
        "epoch",
        "1 of 3 classes has no image in test, red: its scores leave it out",
    ]
    caplog.clear()
    few = folder(tmp_path / "few", 4)
    for path in list((few / "red").iterdir())[1:]:
        path.unlink()
    scanned(few)  # a test that is not there has no classes either
    assert caplog.messages == [
        "1 of 3 classes has no image in validation, split off train, red: its scores leave it out, and they choose the "
        "epoch"
    ]


def test_an_evaluation_tells_of_classes_without_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    photos, run = roles(tmp_path / "photos"), tmp_path / "run"
    shutil.rmtree(photos / "test" / "red")
    call(capsys, "train", "--data.path", photos, *TINY, *QUICK, "--moe.layers=none", "--out", run)
    caplog.clear()
    call(capsys, "evaluate", run)
    call(capsys, "evaluate", run, "--data.path", photos)
    call(capsys, "evaluate", run, "--data.path", photos / "test")
    where = ("test", f"test of {photos}", f"{photos / 'test'}")
    assert [message for message in caplog.messages if "no image in" in message] == [
        f"1 of 3 classes has no image in {each}, red: its scores leave it out" for each in where
    ]


def test_images_in_memory_are_not_opened(tmp_path: Path) -> None:
    data = load_data(DataConfig(path="digits", skip_unreadable=True))
    found = scan(data).to_dict()
    assert found["opened"] == 0 and found["train"] + found["validation"] + found["test"] == 1797
    mixed = Data(data.classes, data.train[:2], data.val[:1], ((folder(tmp_path, 1) / "red" / "000.png", 0),))
    assert scan(mixed).opened == 1


def test_training_stops_before_it_leaves_anything_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = damage(roles(tmp_path / "photos"), "test/red/001.png")
    train = ["train", "--data.path", photos, *TINY, *QUICK, "--out", tmp_path / "run"]
    assert "1 of 42 images cannot be read: test/red/001.png" in refused(capsys, *train)
    assert not (tmp_path / "run").exists()


def test_cheap_mistakes_are_told_before_the_scan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = damage(roles(tmp_path / "photos"), "test/red/001.png")
    train = ["train", "--data.path", photos, *TINY, *QUICK, "--out", tmp_path / "run"]
    for mistake in (
        "--train.warmup_epochs=99",
        "--model.num_classes=7",
        "--moe.layers=last:9",
        "--train.auto_augment=rnd",
    ):
        assert "cannot be read" not in refused(capsys, *train, mistake)


def test_a_run_tells_of_its_scan_and_later_verbs_see_the_same_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    bad = ("red/001.png", "green/002.png", "blue/003.png", "blue/004.png", "blue/005.png")
    photos, run = damage(folder(tmp_path / "photos", 20), *bad), tmp_path / "run"
    common = ["--data.path", photos, *TINY, *QUICK, "--moe.layers=all", "--data.images_per_class=12"]
    with caplog.at_level(logging.INFO, "vimoe"):
        trained = call(capsys, "train", *common, "--data.skip_unreadable=true", "--out", run)
    assert trained["scan"] == json.loads((run / "summary.json").read_text())["scan"]
    assert (trained["scan"]["train"], trained["scan"]["unreadable"]) == (36, 5)
    lines = [message for message in caplog.messages if message.startswith("36 train, 6 validation, 0 test images of")]
    assert len(lines) == 1 and "5 unreadable" in lines[0]
    listed = (run / "validation.txt").read_text().splitlines()
    assert len(listed) == 6 and not set(listed) & set(bad)

    first = FinishedRun(run).data
    assert call(capsys, "evaluate", run)["images"] == 6
    assert call(capsys, "evaluate", run, "--data.path", photos)["images"] == 55
    assert call(capsys, "analyze", run)["base"]["images"] == 6
    pruned = tmp_path / "pruned"
    assert call(capsys, "prune", run, "--tolerance=100", "--recover=1", "--out", pruned)["before"]["images"] == 6
    assert FinishedRun(pruned).data == first and len(first.train) == 36
    for name in bad:
        (photos / name).unlink()
    assert FinishedRun(run).data == first


def test_lines_are_warned_of_also_when_they_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = roles(tmp_path / "data")
    for name, size in (("train/red/000.png", (1, 17)), ("val/red/000.png", (400, 20)), ("test/red/000.png", (16, 1))):
        Image.new("RGB", size).save(root / name)
    message = "2 of 42 images are more than 16 times as long as wide, such as train/red/000.png (1x17): "
    for _ in range(2):
        caplog.clear()
        scanned(root)
        assert [text.startswith(message) for text in caplog.messages] == [True]
