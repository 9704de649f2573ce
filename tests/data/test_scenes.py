"""Which images and masks belong together, which role they have, and what stops a training before it starts."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.scenery import NAMES, PALETTE, VOID, YAML, mask, painted, scene, scenes
from PIL import Image

from vimoe.config.data import DataConfig
from vimoe.data.mask_colours import colour
from vimoe.data.scene_scan import scan_scenes
from vimoe.data.scenes import Scenes, load_others, load_scenes, sequence
from vimoe.errors import ConfigError, DataError


def load(root: Path, **settings: object) -> Scenes:
    return load_scenes(DataConfig(path=str(root), **settings))


def scanned(root: Path, **settings: object) -> dict:
    return scan_scenes(load(root, **settings), root).to_dict()


def counts(found: Scenes) -> tuple[int, int, int]:
    return len(found.train), len(found.val), len(found.test)


def test_images_and_masks_are_paired_by_name(tmp_path: Path) -> None:
    found = load(scenes(tmp_path))
    assert counts(found) == (6, 2, 2) and found.classes == NAMES and not found.split_off
    assert all(image.stem == mask.stem for image, mask in (*found.train, *found.val, *found.test))
    assert str(found) == "6 train, 2 validation, 2 test scenes of 3 classes"


def test_ade20ks_role_names_and_folders_inside(tmp_path: Path) -> None:
    for role in ("training", "validation"):
        scene(tmp_path, role, "street/a001", mask(1))
        scene(tmp_path, role, "kitchen/a001", mask(2))
    found = load(tmp_path.joinpath(), test_split="none")
    assert counts(found) == (2, 2, 0)


def test_roles_in_capital_letters_and_a_folder_without_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i, role in enumerate(("Train", "Train", "Val", "Test", "Dev")):
        scene(tmp_path, role, f"s{i}", mask(i))
    (tmp_path / "classes.yaml").write_text(YAML)
    assert counts(load(tmp_path)) == (2, 1, 1)
    assert f"{tmp_path / 'images'}: folder without a role: Dev; left out" in caplog.text


def test_a_flat_folder_is_all_for_training(tmp_path: Path) -> None:
    for i in range(4):
        scene(tmp_path, "", f"{'abcd'[i]}", mask(i))
    (tmp_path / "classes.yaml").write_text(YAML)
    found = load(tmp_path, val_fraction=0.5)
    assert counts(found) == (2, 2, 0) and found.split_off


@pytest.mark.parametrize(("images", "val"), [(2, 1), (3, 1), (4, 2), (14, 2), (15, 2), (25, 2), (30, 3)])
def test_of_four_images_two_are_split_off_so_that_an_analysis_has_intervals(
    tmp_path: Path, images: int, val: int
) -> None:
    found = load(scenes(tmp_path, train=images, val=0, test=0))
    assert counts(found) == (images - val, val, 0)


def test_test_images_without_masks_are_left_out(tmp_path: Path) -> None:
    shutil.rmtree(scenes(tmp_path) / "annotations" / "test")
    assert counts(load(tmp_path)) == (6, 2, 0)


def test_without_a_legend_classes_come_from_the_train_masks(tmp_path: Path) -> None:
    found = load(scenes(tmp_path, yaml=""))
    assert found.classes == tuple("01234567")  # 7 is void's value, and nothing says so


def test_other_scenes_are_read_by_the_names_of_the_runs_splits_if_they_have_them(tmp_path: Path) -> None:
    root = scenes(tmp_path)
    for kind in ("images", "annotations"):
        shutil.move(root / kind / "test", root / kind / "night")
    legend = load(root, test_split="night").legend

    def of(**splits: str) -> tuple[str, int]:
        which, found = load_others(str(root), NAMES, legend, DataConfig(path="elsewhere", **splits))
        return which, len(found.test)

    assert of(test_split="night") == ("test", 2)
    assert of(test_split="dusk") == of(test_split="dusk+dawn") == of() == ("validation", 2)
    assert of(test_split="val", val_split="none") == ("test", 2)  # and none is read twice
    assert of(test_split="none", val_split="none") == ("validation", 2)
    for kind in ("images", "annotations"):
        shutil.move(root / kind / "val", root / kind / "dawn")
    assert of() == ("train", 6)
    for kind in ("images", "annotations"):
        shutil.copytree(root / kind / "night", root / kind / "test")
    for mask_ in (root / "annotations" / "night").iterdir():
        mask_.unlink()
    (root / "annotations" / "night").rmdir()
    assert of(test_split="night") == ("test", 2)  # no image of night with a mask of test
    which, found = load_others(str(root), NAMES, legend, DataConfig(path="elsewhere", test_split="night"))
    assert {image.parent.name for image, _ in found.test} == {"test"}


def test_test_masks_of_cityscapes_are_blank_for_every_run(tmp_path: Path) -> None:
    root = cityscapes(tmp_path)
    legend = load(root).legend
    for splits in ({}, {"test_split": "none"}, {"test_split": "night"}, {"val_split": "none", "test_split": "val"}):
        which, found = load_others(str(root), legend.names, legend, DataConfig(path="elsewhere", **splits))
        assert (which, len(found.test)) == ("test" if splits.get("test_split") == "val" else "validation", 1)
        assert {image.parent.parent.name for image, _ in found.test} == {"val"}


def test_other_scenes_of_pascal_voc_need_no_list_for_train(tmp_path: Path) -> None:
    root = voc(tmp_path)
    legend = load(root).legend
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink()
    which, found = load_others(str(root), legend.names, legend, DataConfig(path="elsewhere", train_split="aug"))
    assert (which, len(found.test)) == ("validation", 1)
    with pytest.raises(DataError, match="lists no mask to train on: expected train.txt"):
        load(root)


def test_two_roles_of_scenes_have_two_splits(tmp_path: Path) -> None:
    root = scenes(tmp_path)
    for kind in ("images", "annotations"):
        shutil.move(root / kind / "train", root / kind / "training")
    with pytest.raises(ConfigError, match="'training' has the roles data.train_split and data.val_split: expected one"):
        load(root, val_split="training")


@pytest.mark.parametrize("make", [scenes, lambda root: voc(root)])
def test_scenes_of_several_splits_are_not_joined(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(
        ConfigError, match=r"data.train_split='train\+val' with data.task='segmentation': expected one "
    ):
        load(make(tmp_path), train_split="train+val", val_split="none")


def test_a_model_with_other_classes_is_refused(tmp_path: Path) -> None:
    root = scenes(tmp_path)
    assert load_scenes(DataConfig(path=str(root)), NAMES).classes == NAMES
    with pytest.raises(DataError, match="has the classes sky, road, car: expected the model's road, sky, car"):
        load_scenes(DataConfig(path=str(root)), ("road", "sky", "car"))


@pytest.mark.parametrize(
    ("name", "video"),
    [
        ("0006R0_f00930", "0006R0_f"), ("0001TP_006690", "0001TP"), ("Seq05VD_f00000", "Seq05VD_f"),
        ("a/frame_0001", "a/frame"), ("aachen_000000_000019", "aachen"), ("2007_000032", ""), ("cat", "cat"),
        ("v2_cat", "v"), ("_", "_"),
    ],
)  # fmt: skip
def test_a_sequence_is_what_stands_before_the_frames_number(name: str, video: str) -> None:
    assert sequence(name) == video


def split(root: Path, videos: dict[str, int], **settings: object) -> tuple[list[str], list[str]]:
    for video, frames in videos.items():
        for i in range(frames):
            scene(root, "train", f"{video}{i:04d}", mask(i))
    (root / "classes.yaml").write_text(YAML)
    found = load(root, **settings)
    assert not set(found.train) & set(found.val) and len(found.train) + len(found.val) == sum(videos.values())
    return tuple([image.stem for image, _ in role] for role in (found.train, found.val))


def test_a_split_parts_no_sequence(tmp_path: Path) -> None:
    train, val = split(tmp_path, {f"v{c}_": 4 for c in "abcdefgh"}, val_fraction=0.25)
    assert len(val) == 8 and not {sequence(name) for name in train} & {sequence(name) for name in val}
    again = load(tmp_path, val_fraction=0.25)
    assert [image.stem for image, _ in again.val] == val
    assert any([i.stem for i, _ in load(tmp_path, val_fraction=0.25, seed=s).val] != val for s in (1, 2, 3))


def test_where_no_sequence_fits_the_shortest_goes(tmp_path: Path) -> None:
    _, val = split(tmp_path, {"a_": 9, "b_": 4, "c_": 11}, val_fraction=0.1)
    assert {sequence(name) for name in val} == {"b"}


def test_a_stray_frame_is_no_validation(tmp_path: Path) -> None:
    train, val = split(tmp_path, {"a_": 24, "b_": 12, "c_": 24, "stray_": 1}, val_fraction=0.1)
    assert {sequence(name) for name in val} == {"b", "stray"} and len(train) == 48
    for seed in range(4):
        found = load(tmp_path, val_fraction=0.1, seed=seed)
        assert len(found.val) >= 3


@pytest.mark.parametrize("videos", [{"a_": 20}, {"a_": 11, "b_": 9}, {"": 20}], ids=str)
def test_without_sequences_that_fit_single_images_go(tmp_path: Path, videos: dict) -> None:
    _, val = split(tmp_path, videos, val_fraction=0.1)
    assert len(val) == 2


def test_a_run_finds_its_validation_again(tmp_path: Path) -> None:
    split(tmp_path, {"a_": 20})
    first = load(tmp_path)
    listed = [image.relative_to(tmp_path).as_posix() for image, _ in first.val]
    other = DataConfig(path=str(tmp_path), seed=5)
    assert load_scenes(other, validation=listed) == first != load_scenes(other)
    first.val[0][0].unlink()
    with pytest.raises(DataError, match="1 of the run's 2 validation images are missing"):
        load_scenes(other, validation=listed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "annotations"), "no known layout of masks: expected images/ and annot"),
        (lambda root: shutil.rmtree(root / "annotations" / "train"), "has no folder 'train'"),
        (lambda root: [p.unlink() for p in (root / "annotations/train").iterdir()], "6 images and 0 masks"),
        (lambda root: painted(mask(0)).save(root / "images/train/a001.jpg"), "a001.* have the same name"),
    ],
)  # fmt: skip
def test_missing_folders_are_one_line(tmp_path: Path, change: object, message: str) -> None:
    change(scenes(tmp_path))
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "nowhere")


def test_a_good_folder_is_counted_and_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = scanned(scenes(tmp_path, train=1, val=1, test=0))
    values = mask(0)
    assert found["pixels"]["train"] == [int((values == c).sum()) for c in range(3)]
    assert found["void"]["train"] == int((values == VOID).sum()) == 12
    assert sum(found["pixels"]["test"]) == 0 and found["absent"] == {"train": [], "validation": []}
    assert (found["train"], found["validation"], found["test"], found["opened"]) == (1, 1, 0, 4)
    assert json.loads(json.dumps(found)) == found and not caplog.records


def save(values: np.ndarray, path: Path) -> None:
    Image.fromarray(values).save(path)


@pytest.mark.parametrize("role", ["train", "val", "test"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image, mask_: mask_.unlink(), r"^1 image has no mask: images/{}/extra\.png; add masks"),
        (lambda image, mask_: image.unlink(), r"^1 mask has no image: annotations/{}/extra\.png; add images"),
        (
            lambda image, mask_: save(mask(0, 20, 32), mask_),
            r"^1 of 7 masks has another size than its image: annotations/{}/extra\.png \(32x20, the image 32x24\)",
        ),
        (
            lambda image, mask_: save(np.full((24, 32), 9, "uint8"), mask_),
            r"^1 of 7 masks cannot be used: annotations/{}/extra\.png \(a pixel has the value 9: expected 0 to 2, or 7",
        ),
        (lambda image, mask_: mask_.write_bytes(b""), r"^1 of 7 masks cannot be used: .*extra\.png \(cannot be read"),
        (
            lambda image, mask_: image.write_bytes(b""),
            r"^1 of 7 images cannot be read: .*extra\.png \(the file is empty",
        ),
        (
            lambda image, mask_: shutil.copy(image, mask_),
            r"^1 of 7 masks cannot be used: .*\(the mask is in colour, .* give a palette",
        ),
    ],
)
def test_what_stops_a_training(tmp_path: Path, role: str, change: object, message: str) -> None:
    root = scenes(tmp_path, 2, 2, 2)
    scene(root, role, "extra", mask(50))
    change(root / "images" / role / "extra.png", root / "annotations" / role / "extra.png")
    with pytest.raises(DataError, match=message.format(role)) as error:
        scanned(root)
    assert "\n" not in str(error.value)


def test_first_names_and_the_rest_are_told(tmp_path: Path) -> None:
    root = scenes(tmp_path)
    for path in (root / "annotations" / "train").iterdir():
        save(np.full((24, 32), 9, "uint8"), path)
    with pytest.raises(DataError, match=r"^6 of 10 masks cannot be used: .*a000.*a001.*a002.*, 3 more$"):
        scanned(root)


def test_an_image_is_turned_before_sizes_are_compared(tmp_path: Path) -> None:
    root = scenes(tmp_path, 2, 1, 0)
    exif = Image.Exif()
    exif[274] = 6
    painted(mask(0)).transpose(Image.Transpose.ROTATE_90).save(root / "images/train/a000.png", exif=exif)
    assert scanned(root)["train"] == 2
    painted(mask(0)).save(root / "images/train/a000.png", exif=exif)
    with pytest.raises(DataError, match=r"a000\.png \(32x24, the image 24x32\)"):
        scanned(root)


@pytest.mark.parametrize(("role", "told"), [("train", "train"), ("val", "validation")])
def test_a_role_without_a_pixel_of_a_class_stops_a_training(tmp_path: Path, role: str, told: str) -> None:
    root = scenes(tmp_path, 2, 2, 1)
    for path in (root / "annotations" / role).iterdir():
        save(np.full((24, 32), VOID, "uint8"), path)
    message = rf"^all masks of {told} are entirely void, such as annotations/{role}/a\d00\.png: expected pixels"
    with pytest.raises(DataError, match=message):
        scanned(root)


def test_absent_classes_and_void_masks_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = scenes(tmp_path, 2, 1, 1)
    scene(root, "val", "a100", np.where((values := mask(100)) == 2, 0, values).astype("uint8"))
    scene(root, "train", "void", np.full((24, 32), VOID, "uint8"))
    found = scanned(root)
    assert found["absent"] == {"train": [], "validation": ["car"]} and found["all_void"] == 1
    assert "1 of 3 classes has no pixel in validation, such as car" in caplog.text
    assert "1 of 5 masks is entirely void, such as annotations/train/void.png" in caplog.text
    assert len(caplog.records) == 2


def test_a_class_that_train_lacks_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert scanned(scenes(tmp_path, yaml=YAML.replace("car", "car, tree")))["absent"]["train"] == ["tree"]
    assert "no pixel in train, such as tree: they cannot be learned" in caplog.text


def test_images_of_train_in_validation_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = scenes(tmp_path)
    shutil.copy(root / "images/train/a000.png", root / "images/val/a100.png")
    assert scanned(root)["validation_in_train"] == 1
    assert "1 of 2 validation images is in train too, such as images/val/a100.png" in caplog.text


def test_images_that_cannot_be_read_are_told_by_their_endings(tmp_path: Path) -> None:
    root = scenes(tmp_path, val=0, test=0)
    for path in (root / "images/train").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"0 images \(6 \.heic files were passed over; .*convert them\) and 6 masks"):
        load(root)


def test_scenes_that_are_lines_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = scenes(tmp_path)
    scene(root, "val", "a100", np.zeros((1, 40), "uint8"))
    scanned(root)
    assert "1 of 10 images is more than 16 times as long as wide, such as images/val/a100.png (40x1)" in caplog.text


# of the data: background, aeroplane, bicycle, bird; black elsewhere but for void
COLOUR_MAP = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), *[(0, 0, 0)] * 251, (224, 224, 192)]


def voc(root: Path) -> Path:
    year = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (year / folder).mkdir(parents=True)
    for i, role in enumerate(("train", "train", "val", "test", "listed nowhere")):
        name = f"2007_{i:06d}"
        painted(mask(i, void=False)).save(year / "JPEGImages" / f"{name}.jpg")
        with (year / "ImageSets/Segmentation" / f"{role}.txt").open("a") as file:
            file.write(f"{name}\n")
        if role != "test":
            values = mask(i, void=False)
            values[0, 0] = 255
            colour(values, COLOUR_MAP).save(year / "SegmentationClass" / f"{name}.png")
    return root


def test_pascal_voc_as_torchvision_unpacks_it(tmp_path: Path) -> None:
    root = voc(tmp_path)
    found = load(root)
    assert counts(found) == (2, 1, 0)
    assert found.classes[:3] == ("__background__", "aeroplane", "bicycle") and len(found.classes) == 21
    assert found.palette[:4] == tuple(COLOUR_MAP[:4]) and found.palette[20] == (0, 64, 128)
    assert scanned(root)["void"] == {"train": 2, "validation": 1, "test": 0}
    assert load(root / "VOCdevkit" / "VOC2012").train
    with pytest.raises(DataError, match=r"data.val_split='vall': no such list in .*; did you mean 'val'"):
        load(root, val_split="vall")
    (root / "VOCdevkit/VOC2012/SegmentationClass/2007_000001.png").unlink()
    with pytest.raises(DataError, match="1 image has no mask: .*2007_000001.jpg"):
        scanned(root)


def test_masks_of_pascal_voc_that_were_quantized_are_what_they_were(tmp_path: Path) -> None:
    root = voc(tmp_path)
    expected = scanned(root)
    for path in (root / "VOCdevkit/VOC2012/SegmentationClass").iterdir():
        with Image.open(path) as opened:
            opened.convert("RGB").quantize(4).save(path)
    assert scanned(root) == expected


ODD = ("shot 1", "a\u2028b", "a\x0bb", "a\x85b", "käse", "7 -1", "x.y")


def test_names_of_pascal_voc_are_lines(tmp_path: Path) -> None:
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for i, name in enumerate(ODD):
        painted(mask(i)).save(root / "JPEGImages" / f"{name}.jpg")
        Image.fromarray(mask(i)).save(root / "SegmentationClass" / f"{name}.png")
    text = "\ufeff" + "".join(f"{name} \r\n" for name in ODD) + "\n"
    (root / "ImageSets/Segmentation/train.txt").write_bytes(text.encode())
    (root / "ImageSets/Segmentation/val.txt").write_bytes(ODD[0].encode())
    found = load(root)
    assert {image.stem for image, _ in found.train} == set(ODD) and counts(found) == (7, 1, 0)


def test_names_of_pascal_voc_without_files_are_told(tmp_path: Path) -> None:
    root = voc(tmp_path)
    year = root / "VOCdevkit/VOC2012"
    (year / "JPEGImages/2007_000001.jpg").unlink()
    with pytest.raises(DataError, match=r"1 mask has no image: .*2007_000001\.png"):
        scanned(root)
    (year / "SegmentationClass/2007_000001.png").unlink()
    with pytest.raises(DataError, match=r"train\.txt: 1 of 2 names have neither image nor mask, such as '2007_000001'"):
        load(root)
    (year / "ImageSets/Segmentation/train.txt").write_bytes(b"2007_000000\n2007_000004\n")
    (year / "SegmentationClass/2007_000002.png").unlink()
    with pytest.raises(DataError, match=r"1 image has no mask: .*2007_000002\.jpg"):
        scanned(root)  # a validation without masks is none that was withheld
    (year / "ImageSets/Segmentation/train.txt").write_bytes(b"k\xe4se\n")
    with pytest.raises(DataError, match=r"neither image nor mask, such as 'k\\udce4se'"):
        load(root)


def cityscapes(root: Path) -> Path:
    for role, city, name in (("train", "aachen", "aachen_000000_000019"), ("val", "ulm", "ulm_000001_000019")):
        image = root / "leftImg8bit" / role / city / f"{name}_leftImg8bit.png"
        label = root / "gtFine" / role / city / f"{name}_gtFine_labelIds.png"
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        painted(mask(0)).save(image)
        Image.fromarray(np.tile(np.array([0, 7, 8, 33, 255, 9, 26], "uint8"), (24, 5))[:, :32]).save(label)
        shutil.copy(label, label.with_name(f"{name}_gtFine_instanceIds.png"))
    shutil.copytree(root / "leftImg8bit" / "val", root / "leftImg8bit" / "test")
    shutil.copytree(root / "gtFine" / "val", root / "gtFine" / "test")
    return root


def test_cityscapes_as_it_is_downloaded(tmp_path: Path) -> None:
    root = cityscapes(tmp_path)
    path = root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    Image.fromarray(np.tile(np.array([0, 7, 8, 33, 255, 9, 26, 1], "uint8"), (24, 4))).save(path)
    found = load(root)
    assert counts(found) == (1, 1, 0) and len(found.classes) == 19
    assert (found.classes[0], found.classes[18]) == ("road", "bicycle")
    assert found.palette[0] == (128, 64, 128)
    assert found.legend.read(path)[0, :8].tolist() == [255, 0, 1, 18, 255, 255, 13, 255]
    assert scanned(root)["train"] == 1
    assert found.sequences == ("ulm/ulm_000001",) and found.legend.sequences(["ulm/ulm_5a"]) == ["ulm/ulm_5a"]


def test_colours_of_the_legend_are_the_palette(tmp_path: Path) -> None:
    yaml = YAML + f"palette: {[list(colour) for colour in PALETTE]}\n"
    root = scenes(tmp_path, yaml=yaml)
    for role in ("train", "val", "test"):
        for path in (root / "annotations" / role).iterdir():
            shutil.copy(root / "images" / role / path.name, path)  # masks in colour
    assert load(root).palette == PALETTE[:3]
    assert scanned(root)["pixels"] == scanned(scenes(tmp_path / "b"))["pixels"]


def test_flat_splits_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vimoe"):
        split(tmp_path, {"a_": 10})
    assert "by image" in caplog.text


def test_palettes_that_differ_are_warned_of_where_only_names_are_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Values count then; programs that give each file an order of its own have permuted them."""
    colours = [(40, 80, 220), (120, 120, 120), (220, 40, 40)]
    values = np.repeat([[0], [1], [2]], 8, axis=0).repeat(32, axis=1).astype("uint8")
    for name, order in {"a": (0, 1, 2), "b": (2, 1, 0), "c": (0, 1, 2)}.items():
        scene(tmp_path, "train", name, values)
        permuted = Image.fromarray(values)
        permuted.putpalette([channel for i in order for channel in colours[i]])
        permuted.save(tmp_path / "annotations" / "train" / f"{name}.png")
    (tmp_path / "classes.yaml").write_text("names: [sky, road, car]")
    scanned(tmp_path)
    assert "class 'sky' has the colour [40, 80, 220] in annotations/train/" in caplog.text
    assert "values count, since there is no palette; if colours count, give a palette in classes" in caplog.text
    caplog.clear()
    (tmp_path / "classes.yaml").write_text(f"names: [sky, road, car]\npalette: {[list(each) for each in colours]}")
    scanned(tmp_path)
    assert "values count" not in caplog.text


def test_classes_that_were_guessed_are_told_with_the_way_to_name_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (scenes(tmp_path) / "classes.yaml").unlink()
    for path in (tmp_path / "annotations").rglob("*.png"):
        values = np.array(Image.open(path))
        save(np.where(values == VOID, 255, values), path)
    found = load(tmp_path)
    assert found.classes == ("0", "1", "2") and len(caplog.messages) == 1
    assert f"{tmp_path} has no classes.yaml: the values 0 to 2 in train's masks are taken for 3 classes" in caplog.text
    assert "give names in a classes.yaml beside the images, such as 'names: [sky, road]'" in caplog.text
    caplog.clear()
    load_scenes(DataConfig(path=str(tmp_path)), found.classes)  # as a trained model does
    assert not caplog.records


def test_a_mask_of_another_ending_is_told(tmp_path: Path) -> None:
    scene(scenes(tmp_path), "train", "extra", mask(0))
    png = tmp_path / "annotations" / "train" / "extra.png"
    png.rename(png.with_suffix(".jpg"))
    said = (
        r"images/train/extra\.png; add masks, or remove the images; 1 file of such a name was passed over, such as "
        r"annotations/train/extra\.jpg: save masks as \.png, because other formats change values$"
    )
    with pytest.raises(DataError, match=rf"^1 image has no mask: {said}"):
        scanned(tmp_path)
    with pytest.raises(
        DataError, match=r"1 image has no mask and 0 masks no image.*remove them; 1 file of such a name"
    ):
        load_others(str(tmp_path), NAMES, load(tmp_path).legend)
