"""Image files of all kinds as a model would see them."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import picture
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from vimoe.data import images
from vimoe.data.image_check import check_images
from vimoe.data.image_files import find_images
from vimoe.data.images import image_size, open_image
from vimoe.data.masks import Legend
from vimoe.errors import DataError

WHITE, BLACK, RED, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255)


def row(mode: str, *pixels: object) -> Image.Image:
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def palette(**info: object) -> Image.Image:
    image = row("P", 0, 1)
    image.putpalette([*RED, *BLUE])
    image.info.update(info)
    return image


SEEN = {
    "grey": (row("L", 0, 100), "x.png", {}, [BLACK, (100, 100, 100)]),
    "grey and alpha": (row("LA", (0, 0), (100, 255), (0, 153)), "x.png", {}, [WHITE, (100,) * 3, (102,) * 3]),
    "colour and alpha": (
        row("RGBA", (1, 2, 3, 0), (1, 2, 3, 255), (*RED, 153)), "x.png", {}, [WHITE, (1, 2, 3), (255, 102, 102)],
    ),
    "a transparent colour": (row("RGB", RED, BLUE), "x.png", {"transparency": RED}, [WHITE, BLUE]),
    "a transparent grey": (row("L", 7, 100), "x.png", {"transparency": 7}, [WHITE, (100, 100, 100)]),
    "a transparent grey of 16 bits": (
        Image.fromarray(np.array([[7, 25700]], "uint16")), "x.png", {"transparency": 7}, [WHITE, (100, 100, 100)],
    ),
    "palette": (palette(), "x.png", {}, [RED, BLUE]),
    "palette with transparency": (palette(), "x.png", {"transparency": 0}, [WHITE, BLUE]),
    "palette with alpha": (palette(), "x.png", {"transparency": b"\xff\x99"}, [RED, (102, 102, 255)]),
    "palette with transparency, as GIF": (palette(), "x.gif", {"transparency": 0}, [WHITE, BLUE]),
    "one bit": (row("1", 0, 1), "x.png", {}, [BLACK, WHITE]),
    "inks, as TIFF": (row("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "x.tif", {}, [RED, BLACK]),
    "PNG named JPEG": (row("RGB", RED, BLUE), "x.jpg", {"format": "PNG"}, [RED, BLUE]),
    "an ending in capitals": (row("RGB", RED, BLUE), "x.BMP", {}, [RED, BLUE]),
}  # fmt: skip


@pytest.mark.parametrize("kind", SEEN)
def test_every_kind_of_image_is_what_a_person_would_see_on_white_paper(tmp_path: Path, kind: str) -> None:
    image, name, options, expected = SEEN[kind]
    image.save(tmp_path / name, **options)
    seen = open_image(tmp_path / name)
    assert seen.mode == "RGB" and list(map(tuple, np.asarray(seen)[0].tolist())) == expected
    assert find_images(tmp_path) == ([tmp_path / name], {})


def test_inks_in_a_jpeg_are_not_inverted(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=95)
    assert np.abs(np.asarray(open_image(tmp_path / "x.jpg")).astype(int) - RED).max() < 8


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.arange(2**16, dtype="uint16").reshape(256, 256)
    for name in ("x.png", "x.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert (np.asarray(open_image(tmp_path / name))[..., 0] == (values / 257).round()).all()


@pytest.mark.parametrize("most", [2**16 - 1, 4095])
def test_a_pgm_of_more_than_eight_bits_is_scaled_by_the_white_level_that_it_names(tmp_path: Path, most: int) -> None:
    grey = np.array([[0, most // 5, most]])
    (tmp_path / "x.pgm").write_bytes(b"P5 3 1 %d\n" % most + grey.astype(">u2").tobytes())
    assert np.asarray(open_image(tmp_path / "x.pgm"))[0, :, 0].tolist() == [0, 51, 255]


def moved_behind_the_pixels(path: Path) -> None:
    """Bring the metadata of a PNG to its end, where some programs write them."""
    content = path.read_bytes()
    at = content.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(content[at : at + 4])
    last = len(content) - 12  # IEND
    path.write_bytes(content[:at] + content[end:last] + content[at:end] + content[last:])


@pytest.mark.parametrize("name", ["x.png", "behind.png", "x.webp", "x.tif"])
def test_exif_orientation_is_applied(tmp_path: Path, name: str) -> None:
    exif, path = Image.Exif(), tmp_path / name
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    row("RGB", RED, BLUE, BLUE).save(path, exif=exif, **({"lossless": True} if name == "x.webp" else {}))
    if name == "behind.png":
        moved_behind_the_pixels(path)
    assert np.asarray(open_image(path)).tolist() == [[list(RED)], [list(BLUE)], [list(BLUE)]]
    assert image_size(path) == (3, 1)


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.jpg"])
def test_damaged_metadata_leave_an_image_as_it_is(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (3, 1), RED).save(tmp_path / name, exif=b"Exif\0\0no tags")
    assert open_image(tmp_path / name).size == (3, 1) and image_size(tmp_path / name) == (1, 3)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif", "x.webp", "x.gif"])
def test_the_size_of_an_image_is_read_without_its_pixels(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (5, 4)).save(tmp_path / name)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert image_size(tmp_path / name) == (4, 5)


@pytest.mark.parametrize("name", ["x.gif", "x.webp"])
def test_of_an_animation_the_first_frame_is_seen(tmp_path: Path, name: str) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE))
    red.save(tmp_path / name, save_all=True, append_images=[blue], lossless=True)
    with Image.open(tmp_path / name) as written:
        assert written.n_frames == 2
    assert np.asarray(open_image(tmp_path / name))[0, 0].tolist() == list(RED)


def jpeg(path: Path) -> bytes:
    picture(RED, 0, size=64).save(path, "JPEG")
    return path.read_bytes()


UNREADABLE = {
    "zero bytes": (lambda path: path.write_bytes(b""), r"\(the file is empty\)"),
    "a web page": (lambda path: path.write_text("<html> ..."), r"no known image format, it begins with b'<html>"),
    "cut short": (lambda path: path.write_bytes(jpeg(path)[:-40]), "truncated"),
    "a folder": (lambda path: path.mkdir(), "not a regular file"),
    "a pipe that nobody writes to": (os.mkfifo, "not a regular file"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "whole numbers of 32 bits": (lambda path: row("I", 1).save(path, "TIFF"), r"32 bits a pixel \(mode I\)"),
    "fractions": (lambda path: row("F", 0.5).save(path, "TIFF"), r"32 bits a pixel \(mode F\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_whole_image_is_named_with_the_reason_when_opened_and_when_tried(tmp_path: Path, kind: str) -> None:
    make, reason = UNREADABLE[kind]
    path = tmp_path / "x.jpg"
    make(path)
    with pytest.raises(DataError, match=rf"x\.jpg cannot be read as an image .*{reason}") as error:
        open_image(path)
    assert "\n" not in str(error.value)
    checked = check_images([path], tmp_path)
    assert not checked.digests and checked.errors[path] in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    assert check_images([tmp_path / "x.jpg"], tmp_path).errors == {tmp_path / "x.jpg": "not a regular file"}


OTHER_FORMATS = {
    "EPS": b"%!PS-Adobe",
    "PDF": b"%PDF",
    "ICO": b"\x00\x00\x01\x00",
    "TGA": b"\x00\x00\x02\x00",
    "PCX": b"\n\x05\x01",
}


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_files_of_other_formats_are_refused_with_what_they_begin_with(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.jpg"
    picture(RED, 0).save(path, kind)
    start = re.escape(repr(OTHER_FORMATS[kind])[:-1])
    for look in (open_image, image_size):
        with pytest.raises(DataError, match=rf"x\.jpg cannot be read as an image \(no known .* begins with {start}"):
            look(path)
    with pytest.raises(DataError, match=rf"x\.jpg: cannot be read as a mask \(no known .* begins with {start}"):
        Legend(("a", "b"), (0, 1)).read(path)
    assert "no known image format" in check_images([path], tmp_path).errors[path]


def test_no_other_program_is_started_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("subprocess.Popen.__init__", lambda self, *args, **_: started.append(args))
    picture(RED, 0).save(tmp_path / "x.png", "EPS")
    check_images([tmp_path / "x.png"], tmp_path)
    assert not started


def opened_without_formats(source: str) -> list[int]:
    """Lines where a source opens an image by whatever format Pillow knows, or by another library."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [(ast.unparse(call.func), call) for call in calls]
    return [
        call.lineno
        for name, call in named
        if (name.endswith("Image.open") and all(keyword.arg != "formats" for keyword in call.keywords))
        or name.split(".")[-1] in ("imread", "read_image", "decode_image", "default_loader", "pil_loader")
    ]


def test_every_image_is_opened_by_the_documented_formats() -> None:
    for path in Path(images.__file__).parents[1].rglob("*.py"):
        assert not opened_without_formats(path.read_text("utf-8")), path
    assert opened_without_formats("Image.open(x)\nPIL.Image.open(x, 'r')\nio.read_image(x)") == [1, 2, 3]
    assert not opened_without_formats("Image.open(x, formats=FORMATS)\npath.open()")


def test_of_a_photo_with_a_preview_beside_it_the_photo_is_seen(tmp_path: Path) -> None:
    photo, preview = picture(RED, 0, 64), picture(BLUE, 0, 16)
    photo.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[preview])
    assert open_image(tmp_path / "x.jpg").size == (64, 64)


def test_jfif_is_jpeg(tmp_path: Path) -> None:
    jpeg(tmp_path / "x.JFIF")
    assert find_images(tmp_path) == ([tmp_path / "x.JFIF"], {}) and open_image(tmp_path / "x.JFIF").size == (64, 64)


def sparse(path: Path, start: bytes, size: int) -> Path:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


@pytest.mark.parametrize("start", [b"", b"\xff\xd8\xff\xe0", b"II*\0\x08\0\0\0", b"RIFF\0\0\0\0WEBPVP8 "])
def test_a_file_larger_than_any_image_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    path = sparse(tmp_path / "x.png", start, 3 << 30)
    monkeypatch.setattr(images, "digest", None)
    tracemalloc.start()
    (why,) = check_images([path], tmp_path).errors.values()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert re.match(r"3\.2 GB that begin with b'.*more than 1\.1 GB; shrink it", why) and most < 10e6


def test_what_is_no_image_is_not_read_beyond_its_beginning(tmp_path: Path) -> None:
    path = sparse(tmp_path / "x.png", b"", 1 << 29)
    tracemalloc.start()
    (why,) = check_images([path], tmp_path).errors.values()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "no known image format" in why and most < 10e6


def test_a_file_is_hashed_in_pieces_to_the_hash_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    content = jpeg(path)
    with path.open("ab") as file:
        file.truncate(100 << 20)
    tracemalloc.start()
    (digest,) = check_images([path], tmp_path).digests.values()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = content + bytes((100 << 20) - len(content))
    assert digest == hashlib.blake2b(whole, digest_size=16).hexdigest() and most < 10e6


def test_large_metadata_do_not_keep_an_image_from_being_read(tmp_path: Path) -> None:
    text = PngInfo()
    text.add_text("workflow", "x" * (2 << 20), zip=True)
    profile = bytes(2 << 20)
    picture(RED, 0).save(tmp_path / "x.png", pnginfo=text, icc_profile=profile)
    assert (np.asarray(open_image(tmp_path / "x.png")) == np.asarray(picture(RED, 0))).all()
    Image.fromarray(np.eye(4, dtype="uint8")).save(tmp_path / "m.png", pnginfo=text, icc_profile=profile)
    assert (Legend(("a", "b"), (0, 1)).read(tmp_path / "m.png") == np.eye(4)).all()


def test_metadata_beyond_the_bound_are_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(RED, 0).save(tmp_path / "x.png", icc_profile=bytes(2 << 20))
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 20)
    with pytest.raises(DataError, match=r"a colour profile of more than 64 MB; save it again without metadata"):
        open_image(tmp_path / "x.png")


def test_large_images_are_read_without_a_warning(tmp_path: Path) -> None:
    picture(RED, 0, 40).save(tmp_path / "x.png")
    code = (
        "from pathlib import Path; from PIL import Image; from vimoe.data.images import open_image\n"
        "Image.MAX_IMAGE_PIXELS = 1000; print(open_image(Path('x.png')).size)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::Warning:PIL", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("(40, 40)\n", "")


def test_a_decompression_bomb_is_told_with_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(DataError, match=r"x\.png .*more than 1,400 pixels; shrink it"):
        open_image(tmp_path / "x.png")
