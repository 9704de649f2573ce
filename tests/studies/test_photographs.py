"""The photographs of the studies are made of what their repositories have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from studies import photographs


def image(path: Path, size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    Image.fromarray(np.random.default_rng(seed).integers(0, 11, shape, np.uint8)).save(path)


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as opened:
        return opened.size


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def made(name: str, source: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    photographs.main([name, str(source), "--out", str(out)])
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    assert f"where the studies have {photographs.DIGESTS[name]}" in capsys.readouterr().out
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def test_birds_are_in_the_split_of_the_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    birds = tmp_path / "vision" / "ex03" / "task2" / "bird_dataset"
    places = ["Owl/0000.jpg", "Owl/0001.jpg", "Owl/0002.jpg", "Wren/0000.jpg", "Wren/0001.jpg"]
    for place in places:
        image(birds / "images" / place, (227, 227))
    text(birds / "images.txt", *(f"{i}, {place}" for i, place in enumerate(places)))
    text(birds / "train_test_split.txt", *(f"{i}, {flag}" for i, flag in enumerate([1, 0, 1, 0, 1])))
    text(birds / "classes.txt", "0, Owl", "1, Wren")
    files = made("cub100", tmp_path / "vision", tmp_path / "out", capsys)
    assert files == [
        "README.txt", "classes.csv", "test/Owl/0000.jpg", "test/Owl/0001.jpg", "test/Wren/0000.jpg",
        "train/Owl/0000.jpg", "train/Wren/0000.jpg",
    ]  # fmt: skip
    assert (tmp_path / "out" / "classes.csv").read_text() == "id,class,n_train,n_test\n0,Owl,1,2\n1,Wren,1,1\n"
    assert size(tmp_path / "out" / "test" / "Owl" / "0000.jpg") == (160, 160)


def test_frames_have_their_masks_and_the_legend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, role in enumerate(("train", "val", "test")):
        image(tmp_path / "SegNet" / "CamVid" / role / f"{i}.png", (48, 36))
        image(tmp_path / "SegNet" / "CamVid" / f"{role}annot" / f"{i}.png", (48, 36), "L")
    files = made("camvid", tmp_path / "SegNet", tmp_path / "out", capsys)
    assert files == [
        "annotations/test/2.png", "annotations/train/0.png", "annotations/val/1.png", "classes.yaml",
        "images/test/2.jpg", "images/train/0.jpg", "images/val/1.jpg",
    ]  # fmt: skip
    masks = [folder / "val" for folder in (tmp_path / "SegNet" / "CamVid", tmp_path / "out" / "annotations")]
    masks[0] = masks[0].with_name("valannot")
    assert np.array_equal(*(np.asarray(Image.open(folder / "1.png")) for folder in masks))


def test_a_fifth_of_the_dressed_people_is_for_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "ccp"
    for i in range(10):
        image(source / "photos" / f"{i:04d}.jpg", (100, 896))
        mask = np.zeros((896, 100), np.uint8)
        mask[:448] = i % 2
        (source / "annotations" / "pixel-level").mkdir(parents=True, exist_ok=True)
        savemat(source / "annotations" / "pixel-level" / f"{i:04d}.mat", {"groundtruth": mask})
    savemat(source / "label_list.mat", {"label_list": np.array([["null", "bag"]], dtype=object)})
    files = made("ccp59", source, tmp_path / "out", capsys)
    test = [name for name in files if name.startswith("images/test")]
    assert len(test) == 2 and sum(name.startswith("images/train") for name in files) == 8
    assert size(tmp_path / "out" / test[0]) == (50, 448)
    mask = np.asarray(Image.open(tmp_path / "out" / test[0].replace("images", "annotations").replace("jpg", "png")))
    odd = int(Path(test[0]).stem) % 2
    assert (mask[:224] == odd).all() and (mask[224:] == 0).all()
    header, null, bag = (tmp_path / "out" / "classes.csv").read_text().splitlines()
    assert (header, null) == ("id,class,pixel_share,n_train,n_test", "0,null,0.75000,8,2")
    in_test = sum(int(Path(name).stem) % 2 for name in test)
    assert bag == f"1,bag,0.25000,{5 - in_test},{in_test}"


def test_what_is_there_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        photographs.main(["cub100", str(tmp_path), "--out", str(tmp_path)])
    assert f"--out={tmp_path} exists: name another folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", photographs.SETS)
def test_another_folder_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        photographs.main([name, str(tmp_path), "--out", str(tmp_path / "out")])
    assert f"{tmp_path} has no folder {photographs.INSIDE[name]}: expected a clone" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
