"""The wheel and the source distribution have what the package reads, and no more; the package is light to import."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import vimoe

ROOT = Path(__file__).parent.parent
READ = (".py", ".yaml", ".html", ".css", ".js", "py.typed")
BESIDE = {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt", "CHANGELOG.md", "CITATION.cff"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the repository that packages are made of, in a folder where building leaves its own."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for name in filter(None, listed.split("\0")):
        if name.startswith(("vimoe/", "tests/test_")) or "/" not in name:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    if not listed:
        pytest.skip("no git repository, whose files packages are made of")
    return folder


def files_of_the_package(source: Path) -> set[str]:
    return {path.relative_to(source).as_posix() for path in (source / "vimoe").rglob("*") if path.is_file()}


def test_the_wheel_has_every_file_of_the_package_and_no_other(source: Path, tmp_path: Path) -> None:
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("vimoe-*.whl")
    assert wheel.name.startswith(f"vimoe-{vimoe.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as opened:
        packed = {name for name in opened.namelist() if not name.partition("/")[0].endswith(".dist-info")}
    assert packed == files_of_the_package(source)
    assert all(name.endswith(READ) for name in packed)


def test_the_source_distribution_has_the_package_and_no_part_of_the_tests(source: Path, tmp_path: Path) -> None:
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("vimoe-*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}
    own = {name for name in packed if not name.startswith("vimoe.egg-info/")}
    assert own - {"PKG-INFO", "setup.cfg"} == files_of_the_package(source) | BESIDE


def test_importing_the_package_imports_no_library() -> None:
    heavy = "{'torch', 'timm', 'numpy', 'matplotlib', 'sklearn', 'transformers', 'starlette', 'sphinx'}"
    code = f"import sys, vimoe; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
