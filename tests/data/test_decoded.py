"""Images decoded once are the images, wherever they are kept."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.pictures import picture
from PIL import Image

import vimoe.data.decoded
from vimoe.data.decoded import Decoded, Shrink, decode
from vimoe.data.images import open_image
from vimoe.data.labelled_images import Sample
from vimoe.data.loaders import decoded_for_evaluation
from vimoe.data.user_cache import cache_folder
from vimoe.errors import DataError, FolderError, VimoeError

SIZES = ((16, 16), (40, 24), (7, 50), (33, 31))
WIDE = Shrink(1000)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    found: list[Sample] = []
    for i, size in enumerate(SIZES):
        file = tmp_path / f"{i}.{'jpg' if i % 2 else 'png'}"
        picture((200, 90, 10), i, 50).resize(size).save(file)
        found.append((file, i % 3))
    return [*found, (picture((10, 20, 30), 9), 1)]


def arrays(samples: object) -> list[np.ndarray]:
    return [np.array(open_image(source)) for source, _ in samples]


def same(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return len(some) == len(others) and all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def no_decoding(*_: object) -> None:
    raise AssertionError("an image was decoded")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_decoded_images_are_what_opening_the_files_gives(samples: list[Sample], where: str) -> None:
    decoded = decode(samples, WIDE, where)
    assert same(arrays(decoded), arrays(samples))
    assert same(list(decoded.pixels), arrays(samples))
    assert [label for _, label in decoded] == [label for _, label in samples]


def test_no_more_images_are_decoded_than_are_soon_stored(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vimoe.data.decoded, "AHEAD", 8)
    opened: list[object] = []
    monkeypatch.setattr(vimoe.data.decoded, "open_image", lambda source: opened.append(source) or open_image(source))
    stored = 0
    for _ in vimoe.data.decoded._decode(samples * 20, WIDE):
        stored += 1
        assert len(opened) <= stored + 8
    assert stored == len(opened) == 100


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_large_images_are_shrunk_to_the_shorter_side_and_small_ones_are_not(samples: list[Sample], where: str) -> None:
    decoded = decode(samples, Shrink(20), where)
    assert [source.size for source, _ in decoded] == [(16, 16), (33, 20), (7, 50), (21, 20), (16, 16)]


def test_the_file_is_found_again_by_a_later_call(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    before = arrays(decode(samples, WIDE, "disk"))
    monkeypatch.setattr(vimoe.data.decoded, "open_image", no_decoding)
    assert same([np.array(image) for image, _ in decode(samples, WIDE, "disk")], before)
    relabelled = [(source, 7) for source, _ in samples]
    assert decode(relabelled, WIDE, "disk").labels == [7] * 5  # labels are the caller's, not the file's


@pytest.mark.parametrize("change", ["content", "order", "fit", "image in memory"])
def test_another_content_is_decoded_anew(samples: list[Sample], change: str) -> None:
    decode(samples, WIDE, "disk")
    fit = Shrink(20) if change == "fit" else WIDE
    if change == "content":
        file = samples[0][0]
        status = file.stat()
        picture((1, 2, 3), 4).save(file)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    elif change == "order":
        samples = samples[::-1]
    elif change == "image in memory":
        samples = [*samples[:-1], (picture((11, 20, 30), 9), 1)]
    expected = [np.array(fit(open_image(source))) for source, _ in samples]
    assert same(arrays(decode(samples, fit, "disk")), expected)
    assert len(list((cache_folder() / "decoded").iterdir())) == 4  # pixels and sizes, twice


class Planted:
    """A pickle that would leave a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def test_borders_have_the_colour_of_the_mean_that_is_asked_for(samples: list[Sample]) -> None:
    asked = {"input_size": (3, 32, 32), "std": (1, 1, 1), "crop_pct": 1.0, "crop_mode": "border"}
    for mean in (0.2, 0.4):
        prepared = {**asked, "interpolation": "bilinear", "mean": (mean,) * 3}
        decoded = decoded_for_evaluation(samples, prepared, "disk")
        assert decoded.pixels[2][0, 0].tolist() == [255 * mean] * 3  # beside an image of 7 x 50


@pytest.mark.parametrize("damage", ["short", "long", "no sizes", "empty sizes", "pickled sizes", "sizes of another"])
def test_a_damaged_cache_is_decoded_anew(samples: list[Sample], tmp_path: Path, damage: str) -> None:
    decode(samples, WIDE, "disk")
    pixels, sizes = sorted((cache_folder() / "decoded").iterdir())
    if damage == "short":
        pixels.write_bytes(pixels.read_bytes()[:-1])
    elif damage == "long":
        pixels.write_bytes(pixels.read_bytes() + b"x")
    elif damage == "no sizes":
        sizes.unlink()
    elif damage == "empty sizes":
        sizes.write_bytes(b"")
    elif damage == "pickled sizes":
        np.save(sizes, np.array([Planted(tmp_path / "left")] * 5), allow_pickle=True)
    else:
        np.save(sizes, np.load(sizes)[:-1])
    assert same(arrays(decode(samples, WIDE, "disk")), arrays(samples))
    assert not (tmp_path / "left").exists()


def test_a_worker_maps_the_file_in_place_of_getting_its_content(samples: list[Sample]) -> None:
    decoded = decode([(source, label) for source, label in samples] * 50, WIDE, "disk")
    sent = pickle.dumps(decoded)
    assert len(sent) < decoded.pixels.flat.nbytes / 20
    received = pickle.loads(sent)
    assert isinstance(received, Decoded)
    assert same(arrays(received), arrays(decoded))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_no_room_is_one_line_before_all_is_decoded(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    needed = sum(array.nbytes for array in arrays(samples))
    free = {"memory": 10**12, "disk": 10**12, where: 700}
    monkeypatch.setattr(vimoe.data.decoded.psutil, "virtual_memory", lambda: SimpleNamespace(available=free["memory"]))
    monkeypatch.setattr(vimoe.data.decoded.shutil, "disk_usage", lambda _: SimpleNamespace(free=free["disk"]))
    monkeypatch.setattr(vimoe.data.decoded, "LOOK", 1)
    with pytest.raises(DataError, match=rf"data.cache='{where}': about .* GB for 5 images: expected at most") as raised:
        decode(samples, WIDE, where)
    assert "\n" not in str(raised.value)
    assert not (cache_folder() / "decoded").exists() or not list((cache_folder() / "decoded").iterdir())
    free[where] = 2 * needed
    assert same(arrays(decode(samples, WIDE, where)), arrays(samples))


def test_an_image_that_cannot_be_read_is_named_and_nothing_is_left(samples: list[Sample], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes((tmp_path / "0.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"bad\.png cannot be read as an image"):
        decode([*samples, (bad, 0)], WIDE, "disk")
    assert not list((cache_folder() / "decoded").iterdir())


def test_a_cache_folder_that_cannot_be_made_is_one_line(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(samples[0][0]))  # a file
    with pytest.raises(
        FolderError, match=r"cannot be created .*XDG_CACHE_HOME to another folder, or use data.cache=memory"
    ):
        decode(samples, WIDE, "disk")


def test_a_file_that_is_gone_is_one_line(samples: list[Sample]) -> None:
    Path(samples[0][0]).unlink()
    for where in ("memory", "disk"):
        with pytest.raises(VimoeError, match=r"0\.png cannot be read"):
            decode(samples, WIDE, where)


def test_images_need_not_be_contiguous(tmp_path: Path) -> None:
    turned = picture((5, 6, 7), 1).resize((9, 5)).transpose(Image.Transpose.TRANSPOSE)
    assert same(arrays(decode([(turned, 0)], WIDE, "disk")), [np.array(turned)])
