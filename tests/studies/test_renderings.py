"""Photographs in four renderings: who is in which domain, and what the renderings do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from studies import renderings
from vimoe.config.data import DataConfig
from vimoe.data.classification import load_data


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    drawn = np.random.default_rng(0)
    for part, count in (("train", 7), ("test", 2)):
        for label in ("owl", "wren"):
            folder = tmp_path / "photos" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(drawn.integers(0, 256, (24, 20, 3), np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_train_images_are_in_three_domains_and_test_images_in_the_fourth(photos: Path, tmp_path: Path) -> None:
    renderings.main([str(photos), "--out", str(tmp_path / "out"), "--held_out", "edges"])
    names = sorted(path.name for path in (tmp_path / "out" / "train" / "owl").iterdir())
    assert names == [
        "0-photograph.png", "1-posterised.png", "2-inverted.png", "3-photograph.png", "4-posterised.png",
        "5-inverted.png", "6-photograph.png",
    ]  # fmt: skip
    test = sorted(path.name for path in (tmp_path / "out" / "test" / "wren").iterdir())
    assert test == ["0-edges.png", "1-edges.png"]
    same = [
        Image.open(root / "train" / "owl" / name) for root, name in ((photos, "3.png"), (tmp_path / "out", names[3]))
    ]
    assert np.array_equal(*same)


def test_renderings_apart_are_splits_of_the_data(photos: Path, tmp_path: Path) -> None:
    renderings.main([str(photos), "--out", str(tmp_path / "out"), "--held_out", "none", "--apart"])
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == sorted([*renderings.RENDERINGS, "test"])
    assert sorted(path.name for path in (out / "edges" / "owl").iterdir()) == [
        "1-edges.png",
        "5-edges.png",
    ]
    assert sorted(path.name for path in (out / "test" / "owl").iterdir()) == [
        "0-photograph.png", "1-edges.png"
    ]  # fmt: skip
    data = load_data(DataConfig(path=str(tmp_path / "out"), train_split="+".join(renderings.RENDERINGS)))
    assert {part.split: len(part.train + part.val) for part in data.parts} == {
        "photograph": 4, "edges": 4, "posterised": 4, "inverted": 2
    }  # fmt: skip


def test_some_of_the_classes_are_taken_over_all_names(photos: Path, tmp_path: Path) -> None:
    for name in ("auk", "tit"):
        (photos / "train" / name).mkdir(), (photos / "test" / name).mkdir()
        Image.new("RGB", (8, 8)).save(photos / "train" / name / "0.png")
        Image.new("RGB", (8, 8)).save(photos / "test" / name / "0.png")
    renderings.main([str(photos), "--out", str(tmp_path / "out"), "--classes", "2"])
    assert [sorted(path.name for path in (tmp_path / "out" / part).iterdir()) for part in ("train", "test")] == [
        ["auk", "tit"], ["auk", "tit"]
    ]  # fmt: skip


def test_a_folder_that_is_there_is_left_as_it_is(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        renderings.main([str(photos), "--out", str(photos)])
    assert sorted(path.name for path in photos.iterdir()) == ["test", "train"]


def test_each_rendering_keeps_the_size_and_loses_what_it_says() -> None:
    half = np.full((40, 60, 3), (200, 40, 40), np.uint8)
    half[:, 30:] = (20, 40, 200)
    image = Image.fromarray(half)
    drawn = {name: np.asarray(render(image)).astype(int) for name, render in renderings.RENDERINGS.items()}
    assert {pixels.shape for pixels in drawn.values()} == {(40, 60, 3)}
    assert (drawn["photograph"] == half).all()
    for grey in ("edges", "posterised"):
        assert (drawn[grey] == drawn[grey][..., :1]).all()
    assert (drawn["edges"][:, :20] == 255).all() and drawn["edges"][:, 28:33].min() < 100
    assert len(np.unique(drawn["posterised"])) <= 4
    assert (drawn["inverted"][20, 5] == (55, 215, 215)).all()
