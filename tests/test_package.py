"""The wheel has what the package reads, and no more; the package is light to import."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vimoe

ROOT = Path(__file__).parent.parent
READ = (".py", ".yaml", ".html", ".css", ".js", "py.typed")


def test_the_wheel_has_every_file_of_the_package_and_no_other(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for name in subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0"):
        if name.startswith("vimoe/") or name in ("pyproject.toml", "README.md", "LICENSE"):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    if not source.exists():
        pytest.skip("no git repository, whose files a wheel is made of")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("vimoe-*.whl")
    assert wheel.name.startswith(f"vimoe-{vimoe.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as opened:
        packed = {name for name in opened.namelist() if name.startswith("vimoe/")}
    assert packed == {path.relative_to(source).as_posix() for path in (source / "vimoe").rglob("*") if path.is_file()}
    assert all(name.endswith(READ) for name in packed)


def test_importing_the_package_imports_no_library() -> None:
    heavy = "{'torch', 'timm', 'numpy', 'matplotlib', 'sklearn', 'transformers', 'starlette', 'sphinx'}"
    code = f"import sys, vimoe; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
