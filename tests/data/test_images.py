"""Image files of all kinds as a model would see them, what else folders hold, and what is remembered of a scan."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tracemalloc
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import folder, picture
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from vimoe.data import images
from vimoe.data.images import cache_folder, find_images, image_size, open_image, try_images
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


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    row("RGB", RED, BLUE, BLUE).save(tmp_path / "x.png", exif=exif)
    assert np.asarray(open_image(tmp_path / "x.png")).tolist() == [[list(RED)], [list(BLUE)], [list(BLUE)]]


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
    tried = try_images([path], tmp_path)
    assert not tried.digests and tried.errors[path] in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    assert try_images([tmp_path / "x.jpg"], tmp_path).errors == {tmp_path / "x.jpg": "not a regular file"}


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
    assert "no known image format" in try_images([path], tmp_path).errors[path]


def test_no_other_program_is_started_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("subprocess.Popen.__init__", lambda self, *args, **_: started.append(args))
    picture(RED, 0).save(tmp_path / "x.png", "EPS")
    try_images([tmp_path / "x.png"], tmp_path)
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
    monkeypatch.setattr(images, "_digest", None)
    tracemalloc.start()
    (why,) = try_images([path], tmp_path).errors.values()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert re.match(r"3\.2 GB that begin with b'.*more than 1\.1 GB; shrink it", why) and most < 10e6


def test_what_is_no_image_is_not_read_beyond_its_beginning(tmp_path: Path) -> None:
    path = sparse(tmp_path / "x.png", b"", 1 << 29)
    tracemalloc.start()
    (why,) = try_images([path], tmp_path).errors.values()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "no known image format" in why and most < 10e6


def test_a_file_is_hashed_in_pieces_to_the_hash_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    content = jpeg(path)
    with path.open("ab") as file:
        file.truncate(100 << 20)
    tracemalloc.start()
    (digest,) = try_images([path], tmp_path).digests.values()
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


def test_what_is_no_image_is_counted_by_kind(tmp_path: Path) -> None:
    folder(tmp_path, 1, classes=("red",))
    for name in ("red/Thumbs.db", "red/.DS_Store", "red/._000.png", "red/a.txt", "red/deep/b.TXT", "red/README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("red/none", "red/.cache", "red/__MACOSX", "red/sub.jpg"):
        (tmp_path / name).mkdir()
    for name in ("red/.cache/1.png", "red/__MACOSX/1.png", "red/sub.jpg/1.png"):
        picture(RED, 0).save(tmp_path / name)
    files, junk = find_images(tmp_path / "red")
    assert files == [tmp_path / "red" / "000.png", tmp_path / "red" / "sub.jpg" / "1.png"]
    expected = {".db files": 1, "hidden files": 2, ".txt files": 2, "files without an ending": 1}
    assert junk == {**expected, "empty folders": 1, "hidden folders": 2}


def test_loops_of_links_end(tmp_path: Path) -> None:
    folder(tmp_path, 2, classes=("red",))
    (tmp_path / "red" / "again").symlink_to(tmp_path / "red")
    (tmp_path / "red" / "up").symlink_to(tmp_path)
    files, junk = find_images(tmp_path / "red")
    assert len(files) == 2 and junk == {"links to folders": 2}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"red cannot be listed \(Permission denied\)"):
        find_images(tmp_path / "red")


class Remembered:
    """A folder that was tried once, with a damaged file; what is decoded from now on is noted."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.root = tmp_path / "cache", folder(tmp_path / "data", 3)
        monkeypatch.setattr(images, "cache_folder", lambda: self.cache)
        self.bad = self.root / "red" / "000.png"
        self.bad.write_bytes(b"")
        self.first = self.again()
        self.decoded: list[bytes] = []
        decode = images._decode

        def noting(file: BytesIO) -> Image.Image:
            self.decoded.append(file.read())
            file.seek(0)
            return decode(file)

        monkeypatch.setattr(images, "_decode", noting)

    def again(self) -> images.Tried:
        return try_images(find_images(self.root)[0], self.root)

    @property
    def stored(self) -> dict:
        (file,) = self.cache.iterdir()
        return json.loads(file.read_text())


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remembered:
    return Remembered(tmp_path, monkeypatch)


def test_a_second_scan_opens_what_was_damaged_alone(remembered: Remembered) -> None:
    assert len(remembered.first.digests) == 8 and remembered.first.errors == {remembered.bad: "the file is empty"}
    assert remembered.again() == remembered.first and len(remembered.decoded) == 1
    assert sorted(remembered.stored["files"]) == [
        str(file.relative_to(remembered.root)) for file in sorted(remembered.first.digests)
    ]


def test_a_file_of_another_time_or_size_is_opened_again(remembered: Remembered) -> None:
    one, other = remembered.root / "red" / "001.png", remembered.root / "red" / "002.png"
    os.utime(one, ns=(0, 0))
    status = other.stat()
    other.write_bytes(other.read_bytes()[:-30])
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = remembered.again()
    assert len(remembered.decoded) == 3 and set(again.errors) == {remembered.bad, other}
    assert again.digests[one] == remembered.first.digests[one]


def test_a_mended_file_is_seen_even_with_its_old_time(remembered: Remembered) -> None:
    status = remembered.bad.stat()
    remembered.bad.write_bytes((remembered.root / "red" / "001.png").read_bytes())
    os.utime(remembered.bad, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not remembered.again().errors


def test_a_cache_forgets_files_that_are_gone_and_keeps_those_not_asked_for(remembered: Remembered) -> None:
    (remembered.root / "red" / "001.png").unlink()
    remembered.again()
    assert "red/001.png" not in remembered.stored["files"] and len(remembered.stored["files"]) == 7
    (remembered.root / "red" / "002.png").unlink()
    try_images(find_images(remembered.root / "blue")[0], remembered.root)
    assert sorted({name.split("/")[0] for name in remembered.stored["files"]}) == ["blue", "green"]


DAMAGED = ["", "{", "[]", "null", "{}", '{"made_by": 1}', "[" * 100_000, "\xff"]
DAMAGED += [json.dumps({"made_by": images.MADE_BY, **rest}) for rest in ({}, {"files": []})]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_cache_is_ignored_and_written_anew(remembered: Remembered, damage: str) -> None:
    good = remembered.stored
    (file,) = remembered.cache.iterdir()
    file.write_bytes(damage.encode("latin-1"))
    assert remembered.again() == remembered.first and len(remembered.decoded) == 9 and remembered.stored == good


@pytest.mark.parametrize("entry", [None, 3, "abc", [1, 2], [1, "x", "y"], {"a": 1}])
def test_a_damaged_entry_is_ignored(remembered: Remembered, entry: object) -> None:
    (file,) = remembered.cache.iterdir()
    file.write_text(json.dumps({**remembered.stored, "files": {**remembered.stored["files"], "red/001.png": entry}}))
    assert remembered.again() == remembered.first and len(remembered.decoded) == 9


def test_what_another_pillow_could_read_is_tried_again(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MADE_BY", "vimoe 1, Pillow 99")
    assert remembered.again() == remembered.first and len(remembered.decoded) == 9


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(images, "cache_folder", lambda: tmp_path / "file" / "vimoe")
    root = folder(tmp_path / "data", 1)
    assert len(try_images(find_images(root)[0], root).digests) == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "is not remembered" in caplog.text

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(images, "cache_folder", homeless)
    assert len(try_images(find_images(root)[0], root).digests) == 3
    assert "Could not determine home directory" in caplog.text


def test_an_interrupted_scan_keeps_what_it_did(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    before = remembered.stored["files"]
    new = folder(remembered.root, 60)  # in each class more than the first pieces of work

    def interrupted(results: object, *_: object, **__: object) -> object:
        for done, result in enumerate(results):
            if done == 40:
                raise KeyboardInterrupt
            yield result

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(images, "track", interrupted)
        try_images(find_images(new)[0], new)
    kept = remembered.stored["files"]
    assert len(kept) > 40 and before.keys() <= kept.keys()
    remembered.decoded.clear()
    assert len(remembered.again().digests) == 180
    assert 0 < len(set(remembered.decoded)) <= 180 - 40  # a set: threads may be finishing what was interrupted


def test_the_cache_is_where_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/vimoe")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/vimoe")


def test_folders_have_each_their_own_cache_however_they_are_named(
    remembered: Remembered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(remembered.root)
    here = try_images(find_images(Path())[0], Path())
    assert len(remembered.decoded) == 1 and len(here.digests) == 8  # the same folder
    other = folder(remembered.root.parent / "other" / "data", 3)
    try_images(find_images(other)[0], other)
    assert len(list(remembered.cache.iterdir())) == 2 and len(remembered.decoded) == 10


def test_a_folder_with_a_long_name_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(images, "cache_folder", lambda: tmp_path / "cache")
    root = folder(tmp_path / ("\U0001f600" * 63), 1)
    assert len(try_images(find_images(root)[0], root).digests) == 3 and not caplog.records
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_many_unreadable_images_are_a_line(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / f"{name}.png").write_bytes(b"")
    line = str(try_images(find_images(tmp_path)[0], tmp_path))
    empty = "(the file is empty)"
    assert line == f"5 of 5 images cannot be read: a.png {empty}, b.png {empty}, c.png {empty}, 2 more"
