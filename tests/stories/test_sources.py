"""Every kind of data gives what the same images in folders give: classes, labels, roles, pixels, and a training."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import QUICK, TINY, call, refused
from helpers.packing import as_csv, as_idx, as_parquet, as_shards, as_tar, as_tars, png, tar
from helpers.pickles import PICKLE
from helpers.pictures import folder, picture, roles
from helpers.slow import one_in
from helpers.tiny import vit
from PIL import Image, ImageColor
from safetensors.torch import load_file

import vimoe.data.decoded
from vimoe.cli import main
from vimoe.config.data import DataConfig
from vimoe.data import image_check
from vimoe.data.archives import find_archives
from vimoe.data.classification import load_data, load_folder
from vimoe.data.data_path import absolute
from vimoe.data.decoded import Shrink, decode
from vimoe.data.image_check import check_images
from vimoe.data.images import open_image
from vimoe.data.labelled_images import Data
from vimoe.data.listing import in_order
from vimoe.data.loaders import eval_loader, preprocessing
from vimoe.data.scan import scan
from vimoe.data.splits import split_in
from vimoe.errors import DataError
from vimoe.tasks.classification_job import fingerprint

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module", autouse=True)
def _own_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hugging Face tables are not kept in the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("tables"))
        yield


def hfds(photos: Path, out: Path) -> str:
    return f"hfds/{as_parquet(photos, out)}"


def saved_to_disk(photos: Path, out: Path) -> str:
    import datasets

    table = datasets.load_dataset(str(as_parquet(photos, out.with_name(f"{out.name}-parquet"))))
    table.save_to_disk(str(out))
    return f"hfds/{out}"


# what makes a data path of a folder; `out` is a path without an ending
KINDS: dict[str, Callable[[Path, Path], object]] = {
    "csv": lambda photos, out: as_csv(photos, out.with_suffix(".csv")),
    "tar": lambda photos, out: as_tar(photos, out.with_suffix(".tar")),
    "tar of .": lambda photos, out: as_tar(photos, out.with_suffix(".tar"), "./"),
    "tar of a folder": lambda photos, out: as_tar(photos, out.with_suffix(".tar"), "photos/"),
    "tars": as_tars,
    "shards": as_shards,
    "shards with numbers": lambda photos, out: as_shards(photos, out, CLASSES),
    "shards with json": lambda photos, out: as_shards(photos, out, CLASSES, "json"),
    "parquet": hfds,
    "arrow": saved_to_disk,
}


def shards_in_folders(photos: Path, out: Path) -> Path:
    for role in ("train", "val", "test"):
        as_shards(photos / role, out / role)
    return out


def tars_in_folders(photos: Path, out: Path) -> Path:
    for role in ("train", "val", "test"):
        as_tars(photos / role, out / role)
    return out


def config(path: object, **settings: object) -> DataConfig:
    return DataConfig(path=str(path), **settings)


def contents(data: Data) -> list[list[tuple[bytes, int]]]:
    return [
        [(open_image(source).tobytes(), label) for source, label in role] for role in (data.train, data.val, data.test)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"images_per_class": 3, "seed": 2}], ids=["all", "some"])
def test_a_kind_with_roles_is_what_the_folder_is(tmp_path: Path, kind: str, settings: dict) -> None:
    photos = roles(tmp_path / "photos")
    expected, data = (
        load_data(config(photos, **settings)),
        load_data(config(KINDS[kind](photos, tmp_path / "packed"), **settings)),
    )
    assert data.classes == expected.classes and contents(data) == contents(expected) and not data.split_off
    assert scan(data).to_dict() == {**scan(expected).to_dict(), "junk": data.junk}


@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow"])
def test_decoded_images_of_a_kind_are_found_again_until_its_file_changes(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(vimoe.data.decoded, "open_image", lambda source: opened.append(source) or open_image(source))
    photos = folder(tmp_path / "photos", 4)
    for seed in (0, 1):
        opened: list[object] = []
        data = load_data(config(KINDS[kind](folder(photos, 4, seed=seed), tmp_path / f"packed{seed}")))
        for _ in range(2):
            decoded = decode(data.train, Shrink(100), "disk")
            assert [s.tobytes() for s, _ in decoded] == [open_image(s).tobytes() for s, _ in data.train]
        assert len(opened) == len(data.train)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_without_roles_is_split_as_the_folder_is(tmp_path: Path, kind: str) -> None:
    photos = folder(tmp_path / "photos", 10)
    settings = {"val_fraction": 0.3, "seed": 1}
    expected, packed = (
        load_data(config(photos, **settings)),
        config(KINDS[kind](photos, tmp_path / "packed"), **settings),
    )
    data = load_data(packed)
    assert data.split_off and len(data.val) == 9 and contents(data) == contents(expected)
    names = data.names(data.val)
    assert len(set(names)) == 9 and not any(str(tmp_path) in name for name in names)
    again = load_data(replace(packed, seed=7), validation=names)
    assert again.val == data.val and again.train == data.train
    with pytest.raises(DataError, match=r"1 of the run's 10 validation images are missing"):
        load_data(packed, validation=[*names, "gone.png"])


def some_tars_in_folders(photos: Path, out: Path) -> Path:
    as_tars(photos / "train", out / "train")
    for role in ("val", "test"):
        as_tar(photos / role, out / f"{role}.tar")
    return out


@pytest.mark.parametrize("make", [shards_in_folders, tars_in_folders, some_tars_in_folders])
def test_archives_in_folders_have_the_roles_of_the_folders(tmp_path: Path, make: Callable) -> None:
    photos = roles(tmp_path / "photos")
    assert contents(load_data(config(make(photos, tmp_path / "packed")))) == contents(load_data(config(photos)))


def test_a_tar_for_each_role_may_hold_the_folder_of_the_role(tmp_path: Path) -> None:
    photos = roles(tmp_path / "photos", test=0)
    for role in ("train", "val"):
        as_tar(photos / role, tmp_path / "packed" / f"{role}.tar", f"./{role}/")
    assert contents(load_data(config(tmp_path / "packed"))) == contents(load_data(config(photos)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_evaluated_is_found_in_every_kind(tmp_path: Path, kind: str) -> None:
    photos, plain = roles(tmp_path / "photos"), folder(tmp_path / "plain", 2)
    for source, expected in ((photos, ("test", 9)), (plain, ("all", 6))):
        packed = KINDS[kind](source, tmp_path / f"of-{source.name}")
        role, samples = load_folder(str(packed), CLASSES)
        assert len(samples) == expected[1] and samples[-1][1] == 2
        always = kind in ("parquet", "arrow")  # such a table has a split, train, if nothing is said
        assert role == ("train" if always and expected[0] == "all" else expected[0])


@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_validation_do_not_shift_and_must_be_known(tmp_path: Path, kind: str) -> None:
    folder(tmp_path / "photos" / "train", 2)
    folder(tmp_path / "photos" / "val", 2, classes=("green", "red"))
    data = load_data(config(KINDS[kind](tmp_path / "photos", tmp_path / "packed")))
    assert [label for _, label in data.val] == [1, 1, 2, 2]
    folder(tmp_path / "more" / "train", 2, classes=("green", "red"))
    folder(tmp_path / "more" / "val", 2)
    with pytest.raises(DataError, match="no class 'blue' in the class map from train"):
        load_data(config(KINDS[kind](tmp_path / "more", tmp_path / "other")))


@pytest.mark.parametrize("kind", ["csv", "tar", "shards", "parquet"])
def test_the_scan_sees_into_every_kind(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    photos = roles(tmp_path / "photos")
    shutil.copy(photos / "train/red/003.png", photos / "test/red/001.png")
    shutil.copy(photos / "train/red/003.png", photos / "train/blue/003.png")
    (photos / "val/red/001.png").write_bytes(b"")
    whole = photos / "train/green/001.png"
    whole.write_bytes(whole.read_bytes()[:-40])
    packed = config(KINDS[kind](photos, tmp_path / "packed"))
    names = {
        "csv": ("photos/train/green/001.png", "photos/val/red/001.png"),
        "tar": ("train/green/001.png", "val/red/001.png"),
        "shards": ("train-000001.tar/green_001.png", "val-000001.tar/red_001.png"),
        "parquet": ("train/9", "validation/7"),
    }[kind]
    with pytest.raises(DataError, match="2 of 42 images cannot be read: ") as error:
        scan(load_data(packed))
    assert all(name in str(error.value) for name in names) and "leave them out with" in str(error.value)
    caplog.clear()
    found = scan(load_data(replace(packed, skip_unreadable=True))).to_dict()
    expected = scan(load_data(config(photos, skip_unreadable=True))).to_dict()
    assert {**found, "junk": {}} == {**expected, "junk": {}} and found["unreadable"] == 2
    assert (found["test_in_train"], found["contradicting"]) == (1, 2)
    with pytest.raises(DataError, match="cannot be read as an image") as error:
        for source, _ in load_data(packed).train:
            open_image(source)
    assert names[0] in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kind", ["csv", "tar", "shards", "parquet"])
def test_a_second_scan_opens_nothing_until_the_file_changes(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = image_check.decode
    monkeypatch.setattr(image_check, "decode", lambda file: (decoded.append(1), decode(file))[1])
    monkeypatch.setattr(image_check, "cache_folder", lambda: tmp_path / "cache")
    photos = roles(tmp_path / "photos", train=2, val=1, test=0)
    path = KINDS[kind](photos, tmp_path / "packed")
    first = scan(load_data(config(path)))
    assert len(decoded) == 9
    scan(load_data(config(path, val_split="none", images_per_class=2)))  # of train alone
    assert scan(load_data(config(path))) == first
    assert len(decoded) == 9 if kind != "parquet" else len(decoded) <= 12
    if kind == "tar":
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert scan(load_data(config(path))) == first and len(decoded) == 18


def test_data_workers_read_an_archive_and_a_table(tmp_path: Path) -> None:
    photos = roles(tmp_path / "photos")
    prepared = preprocessing(vit())
    expected = list(eval_loader(load_data(config(photos)).train, prepared, 8, workers=0))
    for kind in ("tar", "parquet"):
        data = load_data(config(KINDS[kind](photos, tmp_path / kind)))
        batches = list(eval_loader(data.train, prepared, 8, workers=2))
        assert all(a.equal(b) and y.equal(z) for (a, y), (b, z) in zip(batches, expected, strict=True))
        copied = pickle.loads(pickle.dumps(data.train))  # as to a process that was spawned
        assert copied == data.train and [open_image(s).tobytes() for s, _ in copied] == [
            p for p, _ in contents(data)[0]
        ]


def test_the_training_images_are_known_again_where_they_moved(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", 4)
    data = load_data(config(as_tar(photos, tmp_path / "a.tar")))
    (tmp_path / "b").mkdir()
    (tmp_path / "a.tar").rename(tmp_path / "b" / "a.tar")
    assert (
        fingerprint(load_data(config(tmp_path / "b" / "a.tar")))
        == fingerprint(data)
        != fingerprint(load_data(config("digits")))
    )
    assert fingerprint(data) != fingerprint(load_data(config(tmp_path / "b" / "a.tar", images_per_class=2)))


TRAIN = [*TINY, *QUICK, "--moe.layers=all", "--train.epochs=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, and the run of them; validation is split off."""
    root = tmp_path_factory.mktemp("trained")
    folder(root / "photos", 10)
    assert main(["train", "--data.path", str(root / "photos"), *TRAIN, "--out", str(root / "run")]) == 0
    return root


@pytest.mark.parametrize("kind", one_in(4, ["shards", "csv", "parquet", "tar"]))
def test_a_training_is_the_same_to_the_bit_and_all_verbs_go_on_from_it(
    trained: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "photos", "photos")
    path, run = KINDS[kind](Path("photos"), Path("packed")), tmp_path / "run"
    train = ["train", "--data.path", path, *TRAIN, "--out", run]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the first epoch's steps, before its end
        patch.setattr("vimoe.training.state.Best.offer", interrupt)
        assert main([*map(str, train)]) == 130
    monkeypatch.chdir("/")  # what the run knows of its data is not relative
    values = call(capsys, "train", "--resume", run)
    expected, got = (load_file(place / "run" / "model" / "model.safetensors") for place in (trained, tmp_path))
    assert expected.keys() == got.keys() and all(expected[name].equal(got[name]) for name in expected)
    assert values["scan"]["opened"] == 30 and len((run / "validation.txt").read_text().splitlines()) == 3
    score = call(capsys, "evaluate", run)
    assert score == call(capsys, "evaluate", trained / "run") and score["images"] == 3
    if kind in ("tar", "parquet"):
        assert call(capsys, "analyze", run, "--draws=1")["base"]["images"] == 3
        assert call(capsys, "prune", run, "--tolerance=100", "--out", tmp_path / "pruned")["before"]["images"] == 3
        assert (tmp_path / "pruned" / "validation.txt").read_text() == (run / "validation.txt").read_text()
        other = as_csv(tmp_path / "photos", tmp_path / "other.csv")
        everything = call(capsys, "evaluate", run, "--data.path", other)
        assert everything["images"] == 30 and everything["split"] == "all"
        packed = call(
            capsys, "evaluate", trained / "run", "--data.path", as_tar(tmp_path / "photos", tmp_path / "x.tar")
        )
        assert packed == everything


# CSV files


def test_a_csv_file_may_have_a_byte_order_mark_other_columns_and_absolute_paths(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", 3)
    elsewhere = folder(tmp_path / "elsewhere", 1)
    (tmp_path / "lists").mkdir()
    text = (
        as_csv(photos, tmp_path / "list.csv")
        .read_text()
        .replace("path,label", "file,kind")
        .replace("photos/", "../photos/")
    )
    text += f"{elsewhere}/red/000.png,red\n../photos/red/000.png,red\n"  # a row twice is one image
    (tmp_path / "lists" / "list.csv").write_text(text, encoding="utf-8-sig")
    data = load_data(
        config(tmp_path / "lists" / "list.csv", image_column="file", label_column="kind", val_fraction=0.5)
    )
    assert [len(data.train), len(data.val)] == [4, 6]
    assert str(elsewhere / "red/000.png") in data.names((*data.train, *data.val))
    assert scan(data).opened == 10
    with pytest.raises(DataError, match="has no column 'path'"):
        load_data(config(tmp_path / "lists" / "list.csv"))


def test_splits_of_a_csv_file_may_have_other_names(tmp_path: Path) -> None:
    photos = roles(tmp_path / "photos")
    text = as_csv(photos, tmp_path / "list.csv").read_text()
    text = text.replace(",train", ",Training").replace(",val", ",validation").replace(",test", ",fold9")
    (tmp_path / "list.csv").write_text(text)
    data = load_data(config(tmp_path / "list.csv", test_split="fold9"))
    assert contents(data) == contents(load_data(config(photos)))


def test_shards_whose_name_has_no_role_are_a_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Beside shards of roles; they were dropped, and a setting could not ask for them."""
    photos = roles(tmp_path / "photos")
    expected = contents(load_data(config(photos)))
    packed = as_shards(photos, tmp_path / "packed")
    for shard in packed.glob("val-*.tar"):
        shard.rename(packed / shard.name.replace("val", "extra"))
    assert load_data(config(packed)).split_off
    assert "split 'extra' has no role, and its " in caplog.text and "set --data.val_split extra" in caplog.text
    assert contents(load_data(config(packed, val_split="extra"))) == expected
    tar(packed / "unsorted.tar", [("1.png", png())])  # whatever it is, it does not stop a training
    data = load_data(config(packed, val_split="extra"))
    assert contents(data) == expected and data.junk["images without a label in archives without a role"] == 1


def test_splits_of_a_csv_file_without_a_role_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As those of a folder are."""
    photos = roles(tmp_path / "photos")
    text = as_csv(photos, tmp_path / "list.csv").read_text()
    (tmp_path / "list.csv").write_text(text.replace(",val", ",2019").replace(",test", ",2020"))
    data = load_data(config(tmp_path / "list.csv"))
    assert len(data.train) + len(data.val) == 24 and not data.test and data.split_off
    assert "split '2019' has no role, and its " in caplog.text and "set --data.val_split 2019" in caplog.text
    assert {"images in 2019, which has no role", "images in 2020, which has no role"} == set(data.junk)


def test_a_table_of_which_no_split_is_to_train_on_is_refused(tmp_path: Path) -> None:
    photos = roles(tmp_path / "photos")
    text = as_csv(photos, tmp_path / "list.csv").read_text()
    text = text.replace(",train", ",2019").replace(",val", ",2020").replace(",test", ",2021")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match="list.csv has no split 'train': expected one to train on; set --data.train_s"):
        load_data(config(tmp_path / "list.csv"))
    data = load_data(config(tmp_path / "list.csv", train_split="none"))
    assert len(data.train) + len(data.val) == len(text.splitlines()) - 1 and not data.junk
    names = data.names(data.val)  # a run of an earlier version took all, too
    assert load_data(config(tmp_path / "list.csv"), data.classes, names).train == data.train
    one = text.replace(",2020", ",2019").replace(",2021", ",2019")  # of a single split nothing is left out
    (tmp_path / "one.csv").write_text(one)
    assert load_data(config(tmp_path / "one.csv")).train == data.train
    assert len(load_data(config(tmp_path / "list.csv", train_split="2019+2020", test_split="2021")).parts) == 2


@pytest.mark.parametrize("word", ["train", "2", "a b", "\u00e9"])
def test_a_label_of_a_csv_file_is_never_a_split(tmp_path: Path, word: str) -> None:
    lines = [f"photos/{name}/00{i}.png,{word if name == 'red' else name}" for name in CLASSES for i in range(2)]
    folder(tmp_path / "photos", 2)
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    assert load_data(config(tmp_path / "list.csv")).classes == tuple(sorted(["blue", "green", word]))


def test_labels_that_are_numbers_are_ordered_as_numbers() -> None:
    assert in_order(["10", "9", "1", "9"]) == ["1", "9", "10"]
    assert in_order(["10", "9", "x"]) == ["10", "9", "x"]
    assert in_order(["01", "1"]) == ["01", "1"]


# Tar files


def test_the_last_of_several_members_with_one_name_counts_and_hard_links_are_followed(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", 2)
    path = as_tar(photos, tmp_path / "x.tar")
    newer = (photos / "red/001.png").read_bytes()
    tar(path, [("red/000.png", newer)], mode="a")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("blue/linked.png")
        link.type, link.linkname = tarfile.LNKTYPE, "blue/000.png"
        archive.addfile(link)
    data = load_data(config(path, val_fraction=0.001))
    known = {name: open_image(s).tobytes() for s, _ in (*data.train, *data.val) for name in data.names([(s, 0)])}
    assert len(known) == 7 and known["red/000.png"] == known["red/001.png"]
    assert known["blue/linked.png"] == known["blue/000.png"]


def test_what_is_no_image_in_an_archive_is_passed_over_and_counted(tmp_path: Path) -> None:
    path = as_tar(folder(tmp_path / "photos", 2), tmp_path / "x.tar")
    strange = [
        "../../outside.png",
        "red/../../../outside.png",
        "red/notes.txt",
        "._x.png",
        "red/.git/1.png",
        "loose.png",
    ]
    tar(path, [(name, png()) for name in strange], mode="a")
    with tarfile.open(path, "a") as archive:
        for name, kind in (
            ("red/s.png", tarfile.SYMTYPE),
            ("red/p.png", tarfile.FIFOTYPE),
            ("red/d.png", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        linked = tarfile.TarInfo("red/h.png")
        linked.type, linked.linkname = tarfile.LNKTYPE, "nowhere.png"
        archive.addfile(linked)
        empty = tarfile.TarInfo("green/empty")
        empty.type = tarfile.DIRTYPE
        archive.addfile(empty)
    data = load_data(config(path))
    assert len(data.train) + len(data.val) == 6
    assert data.junk == {
        "links and special files": 6,
        "hidden files": 2,
        ".txt files": 1,
        "images beside the class folders": 1,
    }


def test_absolute_names_in_an_archive_are_within_it(tmp_path: Path) -> None:
    path = as_tar(folder(tmp_path / "photos", 2), tmp_path / "x.tar", "//data/")
    data = load_data(config(path))
    assert data.classes == CLASSES and data.names(data.val)[0].startswith("data/blue/")


def test_an_archive_that_was_cut_since_is_named(tmp_path: Path) -> None:
    path = as_tar(folder(tmp_path / "photos", 2), tmp_path / "x.tar")
    source, _ = load_data(config(path)).val[-1]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"x\.tar/red/00.\.png cannot be read as an image \(x\.tar ends within it\)"):
        open_image(source)


def test_archives_beside_folders_are_not_data(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", 4)
    as_tar(photos, photos / "photos.tar")
    assert not find_archives(photos)
    data = load_data(config(photos))
    assert len(data.train) + len(data.val) == 12 and data.junk == {".tar files": 1}
    split = roles(tmp_path / "split")
    as_tar(photos, split / "train" / "photos.tar")
    assert len(load_data(config(split)).train) == 24


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("train-000001", "train"), ("imagenet1k-validation-07", "validation"), ("Test_3", "test"),
        ("train-0012-of-0099", "train"), ("training00", "training"), ("trainer-01", None), ("cat", None),
        ("test-tube-01", None), ("strain", None), ("0001", None),
    ],
)  # fmt: skip
def test_a_split_is_known_by_the_end_of_an_archives_name(name: str, split: str | None) -> None:
    assert split_in(name) == split


def test_a_shard_may_hold_other_images_and_files_of_a_sample(tmp_path: Path) -> None:
    members = [
        (f"{key}.{ending}", content)
        for key in ("a/1", "a/2", "b/1", "b/2")
        for ending, content in (
            ("jpg", png()),
            ("seg.png", png()),
            ("cls", key[0].encode()),
            ("json", b'{"label": "other"}'),
            ("npy", b"x"),
        )
    ]
    tar(tmp_path / "shards" / "0.tar", members)
    data = load_data(config(tmp_path / "shards"))
    assert data.classes == ("a", "b") and len(data.train) == len(data.val) == 2
    assert data.junk == {"further images of a sample": 4, ".npy files": 4}


@pytest.mark.parametrize(("ending", "label"), [("cls", "cat"), ("json", '{"label": "cat"}')])
def test_a_byte_order_mark_is_no_part_of_a_label(tmp_path: Path, ending: str, label: str) -> None:
    texts = [label.encode(), label.encode("utf-8-sig"), label.replace("cat", "dog").encode()]
    members = [(f"{i}.{e}", c) for i in range(6) for e, c in (("png", png()), (ending, texts[i % 3]))]
    tar(tmp_path / "0.tar", members)
    assert load_data(config(tmp_path / "0.tar")).classes == ("cat", "dog")


def test_numbers_of_classes_are_in_their_order_with_and_without_names(tmp_path: Path) -> None:
    members = [(f"{i:02d}.{e}", c) for i in range(24) for e, c in (("png", png()), ("cls", str(i // 2).encode()))]
    tar(tmp_path / "plain" / "0.tar", members)
    assert load_data(config(tmp_path / "plain")).classes == tuple(map(str, range(12)))
    shutil.copytree(tmp_path / "plain", tmp_path / "named")
    (tmp_path / "named" / "classnames.txt").write_text("\n".join(f"class {i:x}" for i in range(15, 0, -1)) + "\n\n")
    assert load_data(config(tmp_path / "named")).classes == tuple(f"class {i:x}" for i in range(15, 3, -1))
    assert load_data(config(tmp_path / "named" / "0.tar")).classes[0] == "class f"


# Hugging Face tables


def test_columns_of_a_table_are_found_or_named(tmp_path: Path) -> None:
    photos = roles(tmp_path / "photos")
    path = f"hfds/{as_parquet(photos, tmp_path / 'cifar', columns=('fine', 'coarse'))}"
    with pytest.raises(DataError, match="2 columns of type ClassLabel: .*--data.label_column; known: fine, coarse"):
        load_data(config(path))
    data = load_data(config(path, label_column="coarse", image_column="image"))
    assert contents(data) == contents(load_data(config(photos)))
    with pytest.raises(DataError, match="label_column='corse': no such column .* did you mean 'coarse'"):
        load_data(config(path, label_column="corse"))
    with pytest.raises(DataError, match="image_column='label': no such column of type Image"):
        load_data(config(path, image_column="label", label_column="label"))


def test_a_cache_does_not_take_one_column_of_images_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row has one file and one index, whichever of its images is read."""
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kinds = {"before": datasets.Image(), "after": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    colours = {"before": "red", "after": "blue"}
    values = {name: [Image.new("RGB", (8, 8), colour)] * 6 for name, colour in colours.items()}
    table = datasets.Dataset.from_dict({**values, "label": [0, 1] * 3}, datasets.Features(kinds))
    table.save_to_disk(str(tmp_path / "table"))
    for column, colour in colours.items():
        data = load_data(config(f"hfds/{tmp_path / 'table'}", image_column=column))
        assert decode(data.train, Shrink(8), "disk")[0][0].getpixel((0, 0)) == ImageColor.getrgb(colour)
        assert all(name.endswith(f"/{column}") for name in data.names(data.train))


def test_the_order_of_a_tables_class_names_is_kept_and_unused_ones_left_out(tmp_path: Path) -> None:
    photos = roles(tmp_path / "photos")
    names = ("red", "violet", "green", "blue")
    data = load_data(config(f"hfds/{as_parquet(photos, tmp_path / 'table', names)}"))
    assert data.classes == ("red", "green", "blue") and len(data.train) == 24


def test_a_split_without_labels_is_told_where_it_is_used(tmp_path: Path) -> None:
    photos = roles(tmp_path / "photos", test=0)
    folder(photos / "test", 2, classes=("unknown",))
    path = f"hfds/{as_parquet(photos, tmp_path / 'table')}"
    with pytest.raises(
        DataError, match=r"split 'test': 2 rows have no label, such as 0 \(-1\): .*--data.test_split none"
    ):
        load_data(config(path))
    assert len(load_data(config(path, test_split="none")).val) == 9


@pytest.mark.parametrize("split", ["test", "before"])
@pytest.mark.parametrize("column", ["image", "label"])
def test_a_split_without_a_column_is_told_where_it_is_used(tmp_path: Path, split: str, column: str) -> None:
    """Whichever split is the first: "before" sorts before "train"."""
    import datasets

    whole = datasets.load_dataset(str(as_parquet(roles(tmp_path / "photos", test=0), tmp_path / "table")))
    part = whole["train"].remove_columns(column)
    splits = {split: part, **whole} if split == "before" else {**whole, split: part}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    path = f"hfds/{tmp_path / 'saved'}"
    with pytest.raises(DataError, match=f"split '{split}' has no column '{column}': expected {column}s; leave the "):
        load_data(config(path, test_split=split))
    assert len(load_data(config(path, test_split="none")).val) == 9


def test_without_the_package_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "__version__", "3.6.0")  # which runs scripts that come with data
    with pytest.raises(DataError, match=r"expected version 4 or newer; pip install 'datasets>=4'"):
        load_data(config("hfds/beans"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hfds/beans needs the package datasets: .* pip install 'datasets>=4'"):
        load_data(config("hfds/beans"))


def test_a_hub_that_is_not_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(name: str, **_: object) -> None:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nmore of it")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(DataError, match="hfds/some/beans cannot be loaded .Couldn't reach .* the network") as error:
        load_data(config("hfds/some/beans"))
    assert "\n" not in str(error.value)


def test_only_tables_and_images_are_read_by_the_package(tmp_path: Path) -> None:
    as_tar(folder(tmp_path / "photos", 1), tmp_path / "shards" / "x.tar")
    with pytest.raises(DataError, match="its files are of kind webdataset: expected parquet, arrow"):
        load_data(config(f"hfds/{tmp_path / 'shards'}"))


# MNIST's files


def test_the_files_of_mnist_are_read_in_place(tmp_path: Path) -> None:
    root, pixels = as_idx(tmp_path)
    data = load_data(config(f"torch/mnist:{root}"))
    assert data.classes[3] == "3 - three" and [len(data.train), len(data.val), len(data.test)] == [30, 10, 10]
    for source, label in (*data.train, *data.val):
        number = int(source.path.name)
        assert label == number % 10
        assert (np.asarray(open_image(source)) == pixels["train"][number][..., None]).all()
    assert data.names(data.test)[0] == "MNIST/raw/t10k-images-idx3-ubyte/0" and scan(data).opened == 50


def test_fashion_has_its_own_names(tmp_path: Path) -> None:
    data = load_data(config(f"torch/fashion_mnist:{as_idx(tmp_path, 'FashionMNIST')[0]}"))
    assert data.classes[:2] == ("T-shirt/top", "Trouser")


# Paths and mistakes


def test_a_path_is_made_absolute_and_names_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "digits", "torch"):
        (tmp_path / name).mkdir()
    (tmp_path / "x.csv").write_text("")
    expected = {
        "photos": f"{tmp_path}/photos", "x.csv": f"{tmp_path}/x.csv",
        "digits": "digits", "./digits": f"{tmp_path}/digits",
        "hfds/photos": f"hfds/{tmp_path}/photos", "hfds/some/name": "hfds/some/name",
        "torch/mnist:photos": f"torch/mnist:{tmp_path}/photos", f"hfds/{tmp_path}": f"hfds/{tmp_path}",
    }  # fmt: skip
    assert {path: absolute(path) for path in expected} == expected


def written(name: str, text: str | bytes) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return name.split("/")[0] if name.endswith(".tar") and "/" in name else name

    return make


def rows(*lines: str, header: str = "path,label") -> Callable[[Path], str]:
    return written("x.csv", "\n".join([header, *lines]) + "\n")


def shard(*members: tuple[str, bytes], names: str = "") -> Callable[[Path], str]:
    def make(root: Path) -> str:
        tar(root / "shards" / "0.tar", members)
        if names:
            (root / "shards" / "classes.txt").write_text(names)
        return "shards"

    return make


def packed(kind: str, change: Callable[[bytes], bytes] = lambda content: content, name: str = "x.tar") -> Callable:
    def make(root: Path) -> str:
        path = as_tar(root / "photos", root / "packed.tar")
        if kind:
            with tarfile.open(root / "packed2.tar", f"w:{kind}") as archive:
                archive.add(root / "photos", "photos")
            path = root / "packed2.tar"
        (root / name).write_bytes(change(path.read_bytes()))
        return name

    return make


def parquet(change: Callable[[bytes], bytes]) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        for file in as_parquet(root / "photos", root / "table").iterdir():
            file.write_bytes(change(file.read_bytes()))
        return "hfds/table"

    return make


def idx(change: Callable[[bytes], bytes], name: str = "train-images-idx3-ubyte") -> Callable[[Path], str]:
    def make(root: Path) -> str:
        file = as_idx(root / "mnist")[0] / "MNIST" / "raw" / name
        file.write_bytes(change(file.read_bytes()))
        return "torch/mnist:mnist"

    return make


RED, BLUE = "photos/red/000.png,red", "photos/blue/000.png,blue"
A, B = ("1.png", png()), ("1.cls", b"cat")

MISTAKES: dict[str, tuple[Callable[[Path], str], str]] = {
    "csv: no such file": (lambda root: "x.csv", "data.path='x.csv': no such folder or file"),
    "csv: misspelt": (lambda root: (rows(RED)(root), "y.csv")[1], "did you mean 'x.csv'?"),
    "csv: empty": (written("x.csv", b""), "has no column 'path'"),
    "csv: a column twice": (
        rows("photos/red/000.png,red,blue", header="path,label,label"), "repeats the column 'label'",
    ),
    "csv: no rows": (rows(), "has no row: expected one for each image"),
    "csv: no label column": (rows("photos/red/000.png", header="path"), "has no column 'label'"),
    "csv: misspelt column": (rows(RED, header="path,labl"), "did you mean 'labl'?"),
    "csv: semicolons": (rows(RED, header="path;label"), "separated by commas; known: path;label"),
    "csv: no label": (rows(RED, "photos/blue/000.png, "), "line 3: no label"),
    "csv: a short row": (rows(RED, "photos/blue/000.png"), "line 3: no label"),
    "csv: no path": (rows(RED, ",red"), "line 3: no path"),
    "csv: images that are not there": (
        rows(RED, *(f"photos/{i}.png,red" for i in range(5))), "5 of 6 images are missing: ",
    ),
    "csv: a folder as an image": (rows(RED, "photos/blue,blue"), "1 of 2 images is missing: "),
    "csv: several labels": (
        rows(RED, BLUE, "./photos/red/000.png,blue"),
        "line 4: ./photos/red/000.png has label 'blue', and label 'red' in a row above",
    ),
    "csv: several splits": (
        rows(f"{RED},train", f"{RED},test", header="path,label,split"), "label 'red' in test, and label 'red' in train",
    ),
    "csv: an empty split": (
        rows(f"{RED},", header="path,label,split"), "line 2: no split: expected one in each row, such as train; add it",
    ),
    "csv: no train": (rows(f"{RED},val", header="path,label,split"), "x.csv has no split 'train'"),
    "csv: one class": (rows(RED), "x.csv: 1 class with images, 'red': expected at least 2 classes"),
    "csv: not UTF-8": (written("x.csv", b"path,label\nphotos/r\xe9.png,x\n"), "expected a CSV file in UTF-8"),
    "csv: labels that look alike": (rows(RED, BLUE, "photos/blue/001.png,Blue"), "differ only by case"),
    "csv: a pickle": (written("x.csv", PICKLE), "has no column 'path'"),
    "tar: no such file": (lambda root: "x.tar", "data.path='x.tar': no such folder or file"),
    "tar: empty": (written("x.tar", b""), "x.tar cannot be read as a tar file"),
    "tar: without members": (written("x.tar", bytes(10240)), "x.tar: no image with a class: expected"),
    "tar: no tar": (written("x.tar", b"<html>" * 1000), "x.tar cannot be read as a tar file"),
    "tar: a pickle": (written("x.tar", PICKLE), "x.tar cannot be read as a tar file"),
    "tar: cut in an image": (packed("", lambda content: content[:1000]), "x.tar cannot be read as a tar file"),
    "tar: cut in a header": (packed("", lambda content: content[: 6 * 512 + 100]), "x.tar"),
    "tar: damaged header": (
        packed("", lambda content: content[:3072] + b"\xff" * 300 + content[3372:]), "x.tar is damaged at byte 3072",
    ),
    "tar: two in one file": (packed("", lambda content: content + content), "or holds several archives"),
    "tar: gz": (packed("gz"), "x.tar is compressed, "),
    "tar: gz by name": (packed("gz", name="x.tar.gz"), "expected a plain tar file; decompress it, or unpack it"),
    "tar: xz": (packed("xz", name="x.txz"), "x.txz is compressed, "),
    "tar: bz2": (packed("bz2", name="x.tar.bz2"), "x.tar.bz2 is compressed, "),
    "tar: zip": (written("x.zip", b"PK"), "is a file: expected a folder, a .csv or a .tar file; unpack it"),
    "tar: compressed in a folder": (
        lambda root: (packed("gz")(root), (root / "t").mkdir(), (root / "x.tar").rename(root / "t/x.tgz"), "t")[-1],
        "x.tgz is compressed, ",
    ),
    "shards: no label": (shard(A, B, ("2.png", png())), "has no label, such as shards/0.tar/2.png: "),
    "shards: an empty label": (shard(A, B, ("2.png", png()), ("2.cls", b" \n")), "1 sample of shards has no label"),
    "shards: a class that is not listed": (
        shard(A, B, names="dog\ncta\n"), "shards/0.tar/1.png is of class 'cat': expected one of the list of classes",
    ),
    "shards: a number that is not listed": (
        shard(A, ("1.cls", b"2"), names="dog\ncat\n"), "is of class 2: expected 0 to 1; complete the list of classes",
    ),
    "shards: a class twice in the list": (
        shard(A, B, names="cat\ncat\n"), "classes.txt has an empty line or repeats a class",
    ),
    "shards: cut in a label": (
        lambda root: (
            shard(A, ("1.cls", b"cat" * 999))(root),
            os.truncate(root / "shards" / "0.tar", 3000),
            "shards",
        )[-1],
        "shards/0.tar cannot be read as a tar file",
    ),
    "shards: one class": (shard(A, B), "shards: 1 class with images, 'cat'"),
    "shards: a label that is a pickle": (shard(A, ("1.cls", PICKLE)), "1 class with images, "),
    "shards: a pickle beside an image": (shard(A, ("1.pyd", PICKLE)), "shards holds 1 image and no class folder"),
    "hfds: no files": (lambda root: ((root / "none").mkdir(), "hfds/none")[1], "hfds/none cannot be loaded"),
    "hfds: damaged": (parquet(lambda content: content[:200]), "hfds/table cannot be loaded"),
    "hfds: no parquet": (parquet(lambda content: PICKLE), "hfds/table cannot be loaded"),
    "hfds: a pickle": (written("pickles/train.pkl", PICKLE), "is a file"),
    "hfds: pickles": (
        lambda root: (written("pickles/train.pkl", PICKLE)(root), "hfds/pickles")[1], "pickles cannot be loaded",
    ),
    "torch: no folder": (lambda root: "torch/mnist", "torch/mnist:FOLDER"),
    "torch: not there": (lambda root: "torch/mnist:photos", "photos/MNIST/raw: no such folder"),
    "torch: cut short": (idx(lambda content: content[:-1]), "do not fit together"),
    "torch: empty": (idx(lambda content: b""), "raw cannot be read"),
    "torch: a pickle": (idx(lambda content: PICKLE), "raw cannot be read"),
    "torch: labels of others": (
        idx(lambda content: content[:-1] + b"\xff", "t10k-labels-idx1-ubyte"), "raw cannot be read",
    ),
    "torch: pickles": (lambda root: "torch/cifar10", "pickles, which can run code; give hfds/uoft-cs/cifar10"),
    "torch: a folder": (lambda root: "torch/imagenet", "give its folder itself"),
    "torch: unknown": (lambda root: "torch/places365", "known: torch/mnist:FOLDER"),
    "tfds": (lambda root: "tfds/beans", "it streams"),
    "hfids": (lambda root: "hfids/beans", "give it as hfds/NAME"),
    "wds": (lambda root: "wds/beans", "give the folder of the shards itself"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_what_is_wrong_with_data_is_said_in_one_line(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "photos", 2)
    make, said = MISTAKES[what]
    path = make(tmp_path)
    before = {path for path in tmp_path.rglob("*")}
    assert said in refused(capsys, "train", "--data.path", path, *TINY, *QUICK, "--out", "run")
    assert {path for path in tmp_path.rglob("*")} == before  # no run, and no pickle was run


def test_a_pickle_beside_the_data_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the index that timm keeps of archives."""
    monkeypatch.chdir(tmp_path)
    photos = folder(tmp_path / "photos", 3)
    as_tar(photos, tmp_path / "packed" / "photos.tar")
    as_parquet(photos, tmp_path / "table")
    for name in (
        "packed/_packed_tarinfos.pickle",
        "packed/_photos_tarinfos.pickle",
        "table/train.pkl",
        "table/script.py",
    ):
        (tmp_path / name).write_bytes(PICKLE if "pickle" in name or "pkl" in name else b"open('executed', 'w')")
    for path in ("packed", "packed/photos.tar", "hfds/table"):
        data = load_data(config(path))
        assert scan(data).opened == 9
    assert not (tmp_path / "executed").exists()
    pickle.loads(PICKLE)  # which the check would see
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "TIFF lzw", "WEBP", "GIF", "BMP", "PPM"])
def test_an_image_of_any_format_is_read_from_within_an_archive(tmp_path: Path, kind: str) -> None:
    """Decoders seek, and some would take the number of the open file and read the archive by it."""
    name, _, compression = kind.partition(" ")
    options = {"compression": f"tiff_{compression}"} if compression else {}
    for place in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        (tmp_path / "photos" / place).parent.mkdir(parents=True, exist_ok=True)
        picture((200, 30, 90), ord(place[0]) + int(place[2]), 40).save(tmp_path / "photos" / place, name, **options)
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(tmp_path / "photos", "photos")
    inside, outside = (load_data(DataConfig(path=str(tmp_path / name))) for name in ("photos.tar", "photos"))
    for (member, _), (file, _) in zip(inside.train, outside.train, strict=True):
        assert np.array_equal(open_image(member), open_image(file))
    assert [*scan_digests(inside)] == [*scan_digests(outside)]


def scan_digests(data: Data) -> list[str]:
    checked = check_images([source for source, _ in (*data.train, *data.val)], data.root)
    assert not checked.errors
    return list(checked.digests.values())


def test_class_names_are_the_lines_of_their_list(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", 3)
    shards = as_shards(photos, tmp_path / "shards", ("blue", "green", "red"))
    names = ["a\u2028b", "c\x0bd", "e\x85f"]
    (shards / "classes.txt").write_bytes("\r\n".join(names).encode())
    assert load_data(DataConfig(path=str(shards))).classes == tuple(names)
