"""Roles, the class map, and images as they are found in the wild."""

from __future__ import annotations

import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.pictures import COLOURS, folder, picture, roles
from helpers.tiny import vit

from vimoe.config.data import DataConfig
from vimoe.config.train import TrainConfig
from vimoe.data.classification import load_data, load_folder
from vimoe.data.image_files import list_images
from vimoe.data.loaders import eval_loader, preprocessing, train_loader
from vimoe.errors import ConfigError, DataError


def test_folders_give_roles_and_sorted_classes(tmp_path: Path) -> None:
    data = load_data(DataConfig(path=str(roles(tmp_path))))
    assert data.classes == ("blue", "green", "red")
    assert (len(data.train), len(data.val), len(data.test)) == (24, 9, 9)
    assert all(path.parent.name == data.classes[label] for path, label in data.train + data.val + data.test)


def test_other_names_of_the_roles_are_understood(tmp_path: Path) -> None:
    folder(tmp_path / "training", 2), folder(tmp_path / "valid", 1), folder(tmp_path / "testing", 1)
    data = load_data(DataConfig(path=str(tmp_path)))
    assert (len(data.train), len(data.val), len(data.test)) == (6, 3, 3)


@pytest.mark.parametrize(
    "names", [("Train", "Val", "Test"), ("TRAIN", "Validation", "TEST"), ("Training", "val", "Testing")]
)
def test_roles_in_capital_letters_are_no_classes(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for name, images in zip(names, (2, 1, 1), strict=True):
        folder(tmp_path / "photos" / name, images)
    data = load_data(DataConfig(path=str(tmp_path / "photos")))
    assert (len(data.train), len(data.val), len(data.test)) == (6, 3, 3) and data.classes == ("blue", "green", "red")
    assert load_folder(tmp_path / "photos", data.classes)[0] == "test"
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(tmp_path / "photos", "photos")
    data = load_data(DataConfig(path=str(tmp_path / "photos.tar")))
    assert (len(data.train), len(data.val), len(data.test)) == (6, 3, 3)
    (tmp_path / "shards").mkdir()
    for name in names:
        with tarfile.open(tmp_path / "shards" / f"{name}.tar", "w") as archive:
            archive.add(tmp_path / "photos" / name, ".")
    data = load_data(DataConfig(path=str(tmp_path / "shards")))
    assert (len(data.train), len(data.val), len(data.test)) == (6, 3, 3)


def test_of_two_folders_for_a_role_the_one_in_small_letters_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, images in {"train": 3, "Train": 2, "Training": 1}.items():
        folder(tmp_path / name, images)
    data = load_data(DataConfig(path=str(tmp_path), val_fraction=0.4))
    assert len(data.train) + len(data.val) == 9
    assert dict(data.junk) == {
        "images in Train, which has no role": 6, "images in Training, which has no role": 3,
    }  # fmt: skip
    assert "Train has no role, and its 6 images are left out\n" in caplog.text  # a second train is no validation


def test_a_class_of_the_name_of_a_role_can_be_one(tmp_path: Path) -> None:
    folder(tmp_path / "kinds", 4, classes=("bus", "car", "train"))
    with pytest.raises(DataError, match=r"kinds/train holds 4 images and no class folder: .*data.train_split none"):
        load_data(DataConfig(path=str(tmp_path / "kinds")))
    assert load_data(DataConfig(path=str(tmp_path / "kinds"), train_split="none")).classes == ("bus", "car", "train")
    folder(tmp_path / "arms", 4, classes=("Control", "Test"))
    with pytest.raises(DataError, match=r"if 'Test' is a class, set --data.test_split none"):
        load_data(DataConfig(path=str(tmp_path / "arms")))
    assert load_data(DataConfig(path=str(tmp_path / "arms"), test_split="none")).classes == ("Control", "Test")


def test_roles_inside_of_classes_are_refused(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        folder(tmp_path / "photos" / name, 3, classes=("Train", "Test"))
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(tmp_path / "photos", ".")
    for path in ("photos", "photos.tar"):
        with pytest.raises(
            DataError, match=r"split folders inside of class folders, such as cat/Test: expected Test/cat"
        ):
            load_data(DataConfig(path=str(tmp_path / path)))
        with pytest.raises(DataError, match="split folders inside of class folders"):
            load_folder(tmp_path / path, ("cat", "dog"))
    folder(tmp_path / "photos" / "fox", 1, classes=("whole",))
    with pytest.raises(DataError, match="split folders inside of class folders"):  # of some classes
        load_data(DataConfig(path=str(tmp_path / "photos")))
    for name in ("cat", "dog"):  # then these are groups of some other kind
        folder(tmp_path / "photos" / name, 1, classes=("indoors",))
    assert load_data(DataConfig(path=str(tmp_path / "photos"))).classes == ("cat", "dog", "fox")


def test_a_folder_of_somebody_elses_beside_train_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as lost+found of a disk; root, who runs these tests, may list everything."""
    folder(tmp_path / "train", 4), (tmp_path / "lost+found").mkdir()
    real = Path.iterdir

    def iterdir(path: Path) -> object:
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert len(load_data(DataConfig(path=str(tmp_path))).classes) == 3


def test_images_without_a_role_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path / "train", 4), folder(tmp_path / "dev", 2), folder(tmp_path / ".hidden", 2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text.txt").touch()
    for i in range(2):
        picture((9, 9, 9), i).save(tmp_path / "notes" / f"{i}.png")
    data = load_data(DataConfig(path=str(tmp_path)))
    assert dict(data.junk) == {"images in dev, which has no role": 6, "images in notes, which has no role": 2}
    assert f"{tmp_path}/dev has no role, and its 6 images are left out; to use them, set --data.val_split dev" in (
        caplog.text
    )
    caplog.clear()
    assert len(load_data(DataConfig(path=str(tmp_path), val_split="dev", test_split="none")).val) == 6
    assert "dev" not in caplog.text


def renderings(root: Path, **classes: tuple[str, ...]) -> Path:
    """Folders of four images a class: `photo` and `sketch`, or those given; and `paint` for test."""
    for name, colours in (
        classes or {"photo": tuple(COLOURS), "sketch": tuple(COLOURS), "paint": tuple(COLOURS)}
    ).items():
        for colour in colours:
            (root / name / colour).mkdir(parents=True)
            for i in range(4):
                picture(COLOURS[colour], seed=i).save(root / name / colour / f"{name}{i}.png")
    return root


JOINED = {"train_split": "photo+sketch", "test_split": "paint", "val_fraction": 0.25}


@pytest.mark.parametrize("kind", ["folder", "table", "hugging face"])
def test_splits_are_joined_as_in_hugging_faces_datasets(tmp_path: Path, kind: str) -> None:
    root = path = renderings(tmp_path / "photos")
    if kind == "table":
        path = tmp_path / "list.csv"
        lines = [f"{file},{file.parent.name},{file.parent.parent.name}" for file in sorted(root.rglob("*.png"))]
        path.write_text("\n".join(["path,label,split", *lines]))
    if kind == "hugging face":
        datasets, path = pytest.importorskip("datasets"), tmp_path / "table"
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["blue", "green", "red"]))
        datasets.DatasetDict({
            split.name: datasets.Dataset.from_dict(
                {"image": [str(f) for f in sorted(split.rglob("*.png"))],
                 "label": [f.parent.name for f in sorted(split.rglob("*.png"))]}, features)
            for split in root.iterdir()
        }).save_to_disk(str(path))  # fmt: skip
    read = DataConfig(path=f"hfds/{path}" if kind == "hugging face" else str(path), **JOINED)
    data = load_data(read)
    assert (
        data.classes == ("blue", "green", "red") and [label for _, label in data.train] == [0] * 6 + [1] * 6 + [2] * 6
    )
    assert [part.split for part in data.parts] == ["photo", "sketch"] and data.split_off and len(data.test) == 12
    for part in data.parts:  # a quarter of each class of each split
        assert [label for _, label in part.train] == [0] * 3 + [1] * 3 + [2] * 3
        assert [label for _, label in part.val] == [0, 1, 2] and part.test == data.test
        assert set(map(id, part.train)) <= set(map(id, data.train)) and set(map(id, part.val)) <= set(map(id, data.val))
        if kind == "folder":
            assert {path.parent.parent.name for path, _ in part.train + part.val} == {part.split}
    assert not {id(s) for s in data.parts[0].train} & {id(s) for s in data.parts[1].train}
    again = load_data(read, data.classes, data.names(data.val))
    assert (again.train, again.val, again.test) == (data.train, data.val, data.test)
    assert [part.train for part in again.parts] == [part.train for part in data.parts]
    other = load_data(replace(read, train_split="sketch+photo"))
    assert [part.split for part in other.parts] == ["sketch", "photo"] and len(other.train) == len(data.train)


@pytest.mark.parametrize("kind", ["folder", "table", "numbers"])
def test_the_order_of_joining_does_not_order_the_classes(tmp_path: Path, kind: str) -> None:
    names = (
        {"photo": ("10", "2"), "sketch": ("9", "1")}
        if kind == "numbers"
        else {"photo": ("b", "z"), "sketch": ("c", "a")}
    )
    lines = ["path,label,split"]
    for split, classes in names.items():
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                picture(COLOURS["red"], i).save(tmp_path / split / name / f"{i}.png")
                lines.append(f"{split}/{name}/{i}.png,{name},{split}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    path = str(tmp_path if kind == "folder" else tmp_path / "list.csv")
    found = [load_data(DataConfig(path=path, train_split=given)).classes for given in ("photo+sketch", "sketch+photo")]
    assert found[0] == found[1] == (("1", "2", "9", "10") if kind == "numbers" else ("a", "b", "c", "z"))


def test_a_subset_is_drawn_from_all_joined_splits(tmp_path: Path) -> None:
    path = str(renderings(tmp_path))
    assert load_data(DataConfig(path=path, **{**JOINED, "train_split": "photo"})).parts == ()
    few = load_data(DataConfig(path=path, images_per_class=2, **JOINED))
    assert len(few.train) == 6 and sum(len(part.train) for part in few.parts) == 6


def test_every_joined_split_may_have_classes_of_its_own(tmp_path: Path) -> None:
    path = renderings(tmp_path, photo=("blue", "green"), sketch=("blue", "red"), paint=("red",))
    data = load_data(DataConfig(path=str(path), **JOINED))
    assert data.classes == ("blue", "green", "red") and [label for _, label in data.test] == [2] * 4
    assert [sorted({label for _, label in part.train}) for part in data.parts] == [[0, 1], [0, 2]]


def test_validation_and_test_are_joined_too(tmp_path: Path) -> None:
    data = load_data(DataConfig(path=str(renderings(tmp_path)), train_split="photo", val_split="sketch+paint"))
    assert (len(data.train), len(data.val), len(data.test), data.parts) == (12, 24, 0, ())


def test_a_name_with_a_plus_is_one_split_if_there_is_one(tmp_path: Path) -> None:
    data = load_data(DataConfig(path=str(renderings(tmp_path, **{"C++": ("blue", "red")})), train_split="C++"))
    assert len(data.train) + len(data.val) == 8 and data.parts == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_split": "photo+sketsch"}, r"data.train_split='photo\+sketsch': no folder 'sketsch' .* mean 'sketch'"),
        ({"train_split": "photo+train"}, r"data.train_split='photo\+train': no folder 'train' in "),
        ({"train_split": "photo+none"}, r"data.train_split='photo\+none': no folder 'none' in "),
        ({"train_split": "photo+"}, r"data.train_split='photo\+': no folder '' in "),
        ({"train_split": "photo + sketsch"}, r"data.train_split='photo \+ sketsch': no folder 'sketsch' in "),
        ({"train_split": "none"}, r".*: data.train_split='none' takes all images, and 'paint' is for test: "),
        ({"train_split": "photo+photo"}, "data.train_split has 'photo' twice: expected each split once"),
        ({"test_split": "paint+sketch"}, "'sketch' has the roles data.train_split and data.test_split: expected one"),
    ],
)  # fmt: skip
def test_splits_that_cannot_be_joined_are_one_line(tmp_path: Path, given: dict, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=f"^{message}"):
        load_data(DataConfig(path=str(renderings(tmp_path)), **{**JOINED, **given}))


def test_classes_of_two_splits_that_differ_by_case_are_both_named(tmp_path: Path) -> None:
    renderings(tmp_path, photo=("blue", "red"), paint=("red",))
    (tmp_path / "sketch").mkdir()
    for name in ("Blue", "red"):
        (tmp_path / "sketch" / name).mkdir()
        picture(COLOURS["blue"], 9).save(tmp_path / "sketch" / name / "1.png")
    with pytest.raises(DataError, match="classes 'Blue' and 'blue' differ only by case"):
        load_data(DataConfig(path=str(tmp_path), **JOINED))


def test_an_unreadable_class_is_missed_only_if_no_split_has_it(tmp_path: Path) -> None:
    renderings(tmp_path)
    for file in (tmp_path / "sketch" / "red").iterdir():
        file.write_bytes(b"no image")
    read = DataConfig(path=str(tmp_path), skip_unreadable=True, **JOINED)
    assert [len(part.train) + len(part.val) for part in load_data(read).parts] == [12, 8]
    for file in (tmp_path / "photo" / "red").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match="^no image of class 'red' can be read"):
        load_data(read)


def test_a_split_of_which_no_image_can_be_read_is_named(tmp_path: Path) -> None:
    renderings(tmp_path)
    for file in (tmp_path / "paint").rglob("*.png"):
        file.write_bytes(b"no image")
    read = DataConfig(path=str(tmp_path), skip_unreadable=True, **JOINED)
    message = rf"^{tmp_path}/paint: of 12 images none can be read: expected some; restore them, or give the role "
    with pytest.raises(DataError, match=message):
        load_data(read)
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path, ("blue", "green", "red"), read)


def test_spaces_around_a_plus_do_not_matter(tmp_path: Path) -> None:
    config = DataConfig(path=str(renderings(tmp_path)), **{**JOINED, "train_split": "photo + sketch"}, tasks="splits")
    assert [part.split for part in load_data(config).parts] == ["photo", "sketch"]
    one = DataConfig(path=str(tmp_path), train_split=" photo", val_split="none", test_split="paint + sketch ")
    assert len(load_data(one).test) == 2 * len(load_data(config).test) == 24


def test_digits_have_roles_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"data.train_split='a\+b' with data.path='digits': expected no joined"):
        load_data(DataConfig(path="digits", train_split="a+b"))
    assert load_data(DataConfig(path="digits", val_split="none")).val  # as a preset has it
    assert load_folder("digits", tuple("0123456789"), DataConfig(test_split="paint"))[0] == "test"


def test_a_class_missing_from_validation_shifts_no_label(tmp_path: Path) -> None:
    folder(tmp_path / "train", 2)
    folder(tmp_path / "val", 2, classes=("green", "red"))
    data = load_data(DataConfig(path=str(tmp_path)))
    assert {(path.parent.name, label) for path, label in data.val} == {("green", 1), ("red", 2)}


def test_a_class_that_train_has_not_is_named(tmp_path: Path) -> None:
    folder(tmp_path / "train", 2)
    folder(tmp_path / "val", 1, classes=("green", "gren"))
    with pytest.raises(DataError, match=r"no class 'gren' .* did you mean 'green'"):
        load_data(DataConfig(path=str(tmp_path)))


def test_validation_is_split_off_by_class_and_seed(tmp_path: Path) -> None:
    config = DataConfig(path=str(folder(tmp_path, 20)))
    data, again, other = load_data(config), load_data(config), load_data(replace(config, seed=1))
    assert Counter(label for _, label in data.val) == {0: 2, 1: 2, 2: 2}
    assert not {path for path, _ in data.train} & {path for path, _ in data.val}
    assert len(data.train) + len(data.val) == 60 and not data.test
    assert data == again and data.val != other.val


def test_a_listed_validation_split_is_found_again_and_missed_when_gone(tmp_path: Path) -> None:
    config = DataConfig(path=str(folder(tmp_path, 20)))
    listed = [str(path.relative_to(tmp_path)) for path, _ in load_data(config).val]
    folder(tmp_path, 25)  # more images came since: the seed alone would draw others
    again = load_data(config, validation=listed)
    assert [str(path.relative_to(tmp_path)) for path, _ in again.val] == listed
    assert load_data(config).val != again.val
    (tmp_path / listed[0]).unlink()
    with pytest.raises(DataError, match="1 of the run's 6 validation images are missing"):
        load_data(config, validation=listed)


def test_a_class_is_never_split_off_whole(tmp_path: Path) -> None:
    data = load_data(DataConfig(path=str(folder(tmp_path, 2)), val_fraction=0.9))
    assert Counter(label for _, label in data.train) == Counter(label for _, label in data.val) == {0: 1, 1: 1, 2: 1}


def test_a_subset_has_as_many_images_of_each_class(tmp_path: Path) -> None:
    data = load_data(DataConfig(path=str(roles(tmp_path, train=8)), images_per_class=5))
    assert Counter(label for _, label in data.train) == {0: 5, 1: 5, 2: 5} and len(data.val) == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ""}, "data.path is empty"),
        ({"path": "nowhere"}, "'nowhere': no such folder"),
        ({"train_split": "trian"}, r"no such folder in .* did you mean 'train'"),
        ({"test_split": "tset"}, r"data.test_split='tset': .* did you mean 'test'"),
    ],
)
def test_a_missing_folder_is_one_line_with_the_remedy(tmp_path: Path, settings: dict, message: str) -> None:
    roles(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        load_data(DataConfig(**{"path": str(tmp_path), **settings}))
    assert "\n" not in str(error.value)


def test_what_decides_must_not_be_what_is_reported() -> None:
    with pytest.raises(ConfigError, match="both 'val'"):
        DataConfig(path="x", test_split="val")


def test_files_that_are_no_images_are_left_out(tmp_path: Path) -> None:
    folder(tmp_path, 4)
    (tmp_path / "red" / "notes.txt").write_text("x")
    (tmp_path / "red" / ".hidden.png").write_bytes(b"x")
    data = load_data(DataConfig(path=str(tmp_path)))
    assert len(data.train) + len(data.val) == 12 and data.classes == ("blue", "green", "red")


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    (folder(tmp_path, 4) / "zebra").mkdir()
    with pytest.raises(DataError, match="zebra holds no image"):
        load_data(DataConfig(path=str(tmp_path)))


def test_files_that_phones_make_are_told_by_their_endings(tmp_path: Path) -> None:
    for i, name in enumerate(("cat/0.HEIC", "cat/1.heic", "cat/2.avif", "dog/3.heic")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes([i]))
    with pytest.raises(
        DataError, match=r"cat holds no image \(2 \.heic files, 1 \.avif file were .*\.jpg.*convert them"
    ):
        load_data(DataConfig(path=str(tmp_path)))
    with pytest.raises(DataError, match=r"dog holds no image \(1 \.heic file was passed over; .*convert them"):
        list_images([tmp_path / "dog"])


LAYOUTS: dict[str, tuple[tuple[str, ...], str]] = {
    "images alone": (
        ("0.png", "1.png"), "data holds 2 images and no class folder: expected a folder of images .*data/cat; move each"
    ),
    "one image in train, two in test": (
        ("train/0.png", "test/0.png", "test/1.png"), "data/train holds 1 image and no class folder: .*train_split none",
    ),
    "nothing": ((), "data: no image with a class: expected a folder of images for each class, at least 2; add"),
    "notes alone": (("a.txt",), r"data: no image with a class \(1 \.txt file was passed over; .*\): expected a folder"),
    "one class": (
        ("train/cat/0.png", "test/cat/1.png"), "data/train: 1 class with images, 'cat': expected .*at least 2; add",
    ),
    "masks": (("images/train/0.png", "annotations/train/0.png"), "has images/ and annotations/, images with masks"),
    "masks of Pascal VOC": (
        ("JPEGImages/0.png", "SegmentationClass/0.png", "ImageSets/Segmentation/train.txt"),
        "has JPEGImages/ and SegmentationClass/, images with masks: .*data.task segmentation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LAYOUTS)
def test_folders_without_classes_are_told_by_what_they_hold(what: str, tmp_path: Path) -> None:
    files, said = LAYOUTS[what]
    (tmp_path / "data").mkdir()
    for i, name in enumerate(files):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        picture((9, 9, 9), i).save(tmp_path / "data" / name, "png")
    with pytest.raises(DataError, match=said):
        load_data(DataConfig(path=str(tmp_path / "data")))


def test_other_images_for_a_trained_model_are_told_by_what_they_hold(tmp_path: Path) -> None:
    for name in ("flat/0.png", "scenes/images/train/0.png", "scenes/annotations/train/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture((9, 9, 9), 0).save(tmp_path / name)
    with pytest.raises(DataError, match="flat holds 1 image and no class folder"):
        load_folder(tmp_path / "flat", ("cat", "dog"))
    with pytest.raises(DataError, match="has images/ and annotations/, images with masks: expected a folder for each"):
        load_folder(tmp_path / "scenes", ("cat", "dog"))


def test_the_digits_have_three_disjoint_roles() -> None:
    data = load_data(DataConfig(path="digits"))
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    drawn = [{image.tobytes() for image, _ in role} for role in (data.train, data.val, data.test)]
    assert not drawn[0] & drawn[1] and not drawn[0] & drawn[2] and not drawn[1] & drawn[2]
    other = load_data(DataConfig(path="digits", seed=5))
    assert [y for _, y in other.test] == [y for _, y in data.test] and other.val != data.val


def test_loaders_give_normalised_batches_of_the_models_size(tmp_path: Path) -> None:
    data = load_data(DataConfig(path=str(roles(tmp_path))))
    model = vit()
    prepared = preprocessing(model)
    images, labels = next(iter(train_loader(data.train, prepared, TrainConfig(batch_size=8), workers=0)))
    assert images.shape == (8, 3, *model.patch_embed.img_size) and labels.shape == (8,)
    images, labels = next(iter(eval_loader(data.test, prepared, 9, workers=0)))
    red = images[labels == 2].mean(dim=(0, 2, 3))
    assert red[0] > 0.2 and red[1] < -0.5  # the model's mean and std are 0.5


def test_settings_of_the_data_overrule_the_models_preprocessing() -> None:
    prepared = preprocessing(vit(), DataConfig(crop_pct=1.0, interpolation="bilinear", mean=(0.1, 0.2, 0.3)))
    assert (prepared["crop_pct"], prepared["interpolation"], prepared["mean"]) == (1.0, "bilinear", (0.1, 0.2, 0.3))


def test_images_are_found_among_files_and_folders(tmp_path: Path) -> None:
    folder(tmp_path, 2)
    assert len(list_images([tmp_path, tmp_path / "red" / "000.png"])) == 7
    with pytest.raises(DataError, match="did you mean"):
        list_images([tmp_path / "red" / "00.png"])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        list_images([tmp_path / "none"])


def test_a_folder_says_which_images_it_gave(tmp_path: Path) -> None:
    classes = ("blue", "green", "red")
    role, samples = load_folder(folder(tmp_path / "plain", 2), classes)
    assert (role, len(samples)) == ("all", 6)
    assert load_folder(roles(tmp_path / "roles", test=0), classes)[0] == "validation"
    assert load_folder(roles(tmp_path / "roles", test=1), classes)[0] == "test"
    folder(tmp_path / "one" / "train", 2)
    role, samples = load_folder(tmp_path / "one", classes)
    assert (role, len(samples)) == ("train", 6)


def test_other_data_are_read_by_the_names_of_the_runs_splits_if_they_have_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    classes, run = ("blue", "green", "red"), DataConfig(**JOINED)

    def of(root: Path, config: DataConfig) -> tuple[str, set[str]]:
        role, samples = load_folder(root, classes, config)
        return role, {path.parent.parent.name for path, _ in samples}

    renderings(tmp_path / "named")
    assert of(tmp_path / "named", run) == ("test", {"paint"})
    assert of(tmp_path / "named", DataConfig(test_split="photo+paint")) == ("test", {"photo", "paint"})
    assert of(tmp_path / "named", DataConfig(train_split="photo+sketch")) == ("train", {"photo", "sketch"})
    roles(tmp_path / "usual", test=1)
    assert of(tmp_path / "usual", run) == ("test", {"test"})
    assert of(tmp_path / "usual", DataConfig(test_split="none")) == ("test", {"test"})
    assert "images are those of" in caplog.text and "/usual" not in caplog.text
    caplog.clear()
    assert of(tmp_path / "usual", DataConfig(val_split="none", test_split="val")) == ("test", {"val"})
    assert f"test images are those of {tmp_path}/usual/val" in caplog.text


def test_a_class_that_is_named_like_a_role_is_one_where_the_run_says_none(tmp_path: Path) -> None:
    classes = ("test", "train", "x")
    folder(tmp_path, 2, classes=classes)
    run = DataConfig(path=str(tmp_path), train_split="none", val_split="none", test_split="none")
    assert load_data(run).classes == classes
    role, samples = load_folder(tmp_path, classes, run)
    assert (role, len(samples)) == ("all", 6)
    with pytest.raises(DataError, match="/test holds 2 images and no class folder: [^;]*; move each image [^;]*$"):
        load_folder(tmp_path, classes)
    (tmp_path / "other").mkdir()
    folder(tmp_path / "other" / "train", 2)
    (tmp_path / "other" / "test").mkdir()
    picture((9, 9, 9), 1).save(tmp_path / "other" / "test" / "1.png")
    with pytest.raises(DataError, match="/test holds 1 image and no class folder"):
        load_data(DataConfig(path=str(tmp_path / "other")))


def test_digits_are_the_embedded_ones_whatever_is_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "digits", 2)
    assert len(load_data(DataConfig(path="digits")).classes) == 10
    assert len(load_data(DataConfig(path="./digits")).classes) == 3


@pytest.mark.parametrize(("one", "other"), [("red", "Red"), ("caf\u00e9", "cafe\u0301"), ("CAF\u00c9", "cafe\u0301")])
def test_classes_that_differ_by_case_or_normalisation_are_both_named(tmp_path: Path, one: str, other: str) -> None:
    folder(tmp_path / "plain", 2, classes=("blue", one, other))
    with pytest.raises(DataError, match="differ only by case") as error:
        load_data(DataConfig(path=str(tmp_path / "plain")))
    assert ascii(one) in str(error.value) and ascii(other) in str(error.value)
    folder(tmp_path / "roles" / "train", 2, classes=("blue", one))
    folder(tmp_path / "roles" / "val", 2, classes=("blue", other))
    with pytest.raises(DataError, match="differ only by case"):
        load_data(DataConfig(path=str(tmp_path / "roles")))


def test_an_image_of_the_listed_validation_that_was_damaged_since_is_missed(tmp_path: Path) -> None:
    config = DataConfig(path=str(folder(tmp_path, 20)), skip_unreadable=True)
    listed = [str(path.relative_to(tmp_path)) for path, _ in load_data(config).val]
    (tmp_path / listed[0]).write_bytes(b"")
    with pytest.raises(DataError, match="1 of the run's 6 validation images are missing or damaged"):
        load_data(config, validation=listed)
