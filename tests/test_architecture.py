"""The package reads from top to bottom: a part imports only from parts above it in the README's tree."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vimoe"
MOST = 20  # entries of the package: more is a list, not a structure


def parts() -> list[str]:
    """Names of the parts in the README's tree, from top to bottom."""
    tree = re.search(r"```\nvimoe/\n(.*?)^tests/", (ROOT / "README.md").read_text("utf-8"), re.S | re.M).group(1)
    return [name.removesuffix("/").removesuffix(".py") for name in re.findall(r"^  ([\w.]+/?)", tree, re.M)]


def sources() -> dict[str, str]:
    """The text of each module by its name within the package ("moe.layer"); a part's own is "moe.__init__"."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file.read_text("utf-8") for file in files}


def imports(source: str) -> set[str]:
    """Modules of this package that a source imports, inside functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name[6:] for alias in node.names if alias.name.startswith("vimoe.")}
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vimoe":
            base = node.module[6:]
            below = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name for name in below if name in sources()} or ({base} if base else set())
    return found


def violations(part: str, source: str, order: list[str]) -> list[str]:
    """Parts that a module of a part imports and that do not stand above it."""
    allowed = order[: order.index(part) + 1]
    return sorted(f"{part} imports {name}" for name in imports(source) if name.partition(".")[0] not in allowed)


def test_the_tree_names_every_part() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__"} == set(parts())
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MOST


@pytest.mark.parametrize("module", sorted(set(sources()) - {"__init__"}))
def test_a_part_imports_only_from_above(module: str) -> None:
    assert not violations(module.partition(".")[0], sources()[module], parts())


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {name: imports(source) & set(sources()) for name, source in sources().items()}
    TopologicalSorter(graph).prepare()


def test_the_checks_see_what_is_wrong() -> None:
    order = parts()
    assert violations("moe", "from vimoe.models.upcycling import plan", order) == ["moe imports models.upcycling"]
    assert violations("moe", "from vimoe import run_folder, cli", order) == ["moe imports cli"]
    assert violations("config", "def f():\n    import vimoe.moe.layer", order) == ["config imports moe.layer"]
    assert not violations("moe", "from vimoe.errors import X\nfrom vimoe.moe import ffn", order)
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
