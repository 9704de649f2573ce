"""Files are written whole, read in UTF-8, and deleted only where they are vimoe's own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from vimoe import files
from vimoe.errors import FolderError
from vimoe.files import TEMPORARY

PACKAGE = Path(files.__file__).parent
SOURCES = [
    path for part in (PACKAGE, PACKAGE.parent / "studies", PACKAGE.parent / "benchmarks") for path in part.rglob("*.py")
]
DELETING = {"rmtree", "unlink", "rmdir", "os.remove", "os.removedirs", "TemporaryDirectory"}


def calls(source: str) -> list[tuple[str, ast.Call]]:
    """The calls in a source, by the last part of the name that is called; those of `os` by the whole of it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            found.append((f"os.{name}" if owner == "os" else name, node))
    return found


def text_without_encoding(source: str) -> list[str]:
    """Calls that read or write text in the locale's encoding."""
    found = []
    for name, node in calls(source):
        given = {keyword.arg for keyword in node.keywords}
        words = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        opened = name == "open" and not any("b" in word and set(word) <= set("rwabx+") for word in words)
        opened &= not ast.unparse(node.func).startswith(("Image.", "tarfile."))
        if (name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute) or opened) and (
            "encoding" not in given
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", sorted(SOURCES), ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_text_depends_on_the_locale_and_one_file_deletes(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert text_without_encoding(source) == []
    if path != PACKAGE / "files.py" and path.is_relative_to(PACKAGE):
        assert [name for name, _ in calls(source) if name in DELETING] == []


def test_these_checks_can_fail() -> None:
    for line in ("path.read_text()", "path.open()", "open(name, newline='')", "path.write_text('bytes')"):
        assert text_without_encoding(line), line
    for line in ("path.read_text(encoding='utf-8')", "path.open('rb')", "Image.open(path)", "read_text(path)"):
        assert not text_without_encoding(line), line
    assert [name for name, _ in calls("shutil.rmtree(x); handle.remove(); os.remove(x)") if name in DELETING] == [
        "rmtree", "os.remove",
    ]  # fmt: skip


def test_only_temporary_names_are_deleted(tmp_path: Path) -> None:
    mine, theirs = tmp_path / f"{TEMPORARY}a", tmp_path / "notes"
    theirs.mkdir()
    (theirs / "text").touch()
    mine.symlink_to(theirs)
    (tmp_path / f"{TEMPORARY}b").mkdir()
    (tmp_path / f"{TEMPORARY}b" / "half").touch()
    (tmp_path / ".model-abc").touch()
    with pytest.raises(AssertionError, match="not vimoe's to delete"):
        files.discard(theirs)
    files.discard_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model-abc", "notes"] and (theirs / "text").exists()
    files.discard_file(theirs / "text")
    files.discard_file(theirs / "text")  # which is gone
    assert [path.name for path in tmp_path.iterdir()] == [".model-abc"]


def test_a_folder_goes_whole_whatever_a_killed_process_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in (run / "figures", tmp_path / f"{TEMPORARY}run" / "figures"):
        folder.mkdir(parents=True)
        (folder / "a.png").touch()
    files.discard_folder(run)
    files.discard_folder(run)  # which is gone
    assert not list(tmp_path.iterdir())


def test_what_was_there_stays_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127 + "x")  # 255 bytes, the longest name that there is
    files.write_text(path, "before\r\nis kept")
    with pytest.raises(FolderError, match="could not be written: no room"), files.written_whole(path) as file:
        file.write(b"half")
        raise OSError("no room")
    assert files.read_text(path) == "before\r\nis kept" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ZeroDivisionError), files.temporary_folder(tmp_path) as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(b"\xff")
    with pytest.raises(FolderError, match="invalid start byte at byte 0; save it in UTF-8"):
        files.read_text(path)


def test_a_folder_takes_the_place_of_another_one(tmp_path: Path) -> None:
    old = tmp_path / "model"
    old.mkdir()
    (old / "old").touch()
    with files.temporary_folder(tmp_path) as folder:
        (folder / "new").touch()
        files.rename(folder, old)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and [p.name for p in old.iterdir()] == ["new"]


def test_sizes_for_the_reader() -> None:
    assert [files.in_units(size) for size in (0, 56_700, 2_070_000, 1.2e9)] == ["0 kB", "57 kB", "2.07 MB", "1.20 GB"]


def test_settings_and_files_import_no_torch() -> None:
    code = "import vimoe.files, vimoe.run_folder, vimoe.report.run_report, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["a", "a" * 255, "ü" * 127, "\U0001f600" * 63])
def test_a_name_may_be_as_long_as_the_file_system_lets_it_be(tmp_path: Path, name: str) -> None:
    files.write_text(tmp_path / name, "x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_is_not_finished_is_known_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.written_whole(tmp_path / "x.bin") as file:
        file.write(b"half")
        (only,) = tmp_path.iterdir()
        assert only.name.startswith(TEMPORARY) and "x.bin" not in only.name
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="could not be written: File name too long"):
        files.write_text(tmp_path / ("a" * 256), "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_who_may_read_is_the_umask_s_to_say(tmp_path: Path, umask: int) -> None:
    code = (
        f"import os; os.umask({umask}); from pathlib import Path; from vimoe import files\n"
        f"here = Path({str(tmp_path)!r})\n"
        "files.write_text(here / 'file', 'x'); open(here / 'usual', 'w', encoding='utf-8').close()\n"
        "with files.temporary_folder(here) as folder: folder.rename(here / 'folder')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"file": 0o666 & ~umask, "usual": 0o666 & ~umask, "folder": 0o777 & ~umask}
