"""The package reads from top to bottom: a part imports only from parts above it in the README's tree."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import pytest
from architecture import PACKAGE, PICTURE, draw, implied, imports, parts, sources

APART = {"__init__", "__main__"}  # the names of the package, and its start as a module
MOST = 23  # parts of the package: more is a list, not a structure


def violations(part: str, source: str, order: list[str]) -> list[str]:
    """Imports of a module that are not of its own part or of a part above it."""
    allowed = order[: order.index(part) + 1]
    return sorted(f"{part} imports {name}" for name in imports(source) if name.partition(".")[0] not in allowed)


def test_the_tree_names_every_part() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - APART == set(parts())
    assert len(there - APART) <= MOST


@pytest.mark.parametrize("module", sorted(set(sources()) - APART))
def test_a_part_imports_only_from_above(module: str) -> None:
    assert not violations(module.partition(".")[0], sources()[module], list(parts()))


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {name: imports(source) & set(sources()) for name, source in sources().items()}
    TopologicalSorter(graph).prepare()


def test_the_checks_see_what_is_wrong() -> None:
    order = list(parts())
    assert violations("moe", "from vimoe.models.upcycling import plan", order) == ["moe imports models.upcycling"]
    assert violations("moe", "from vimoe import run_folder, cli", order) == ["moe imports cli"]
    assert violations("config", "def f():\n    import vimoe.moe.layer", order) == ["config imports moe.layer"]
    assert not violations("moe", "from vimoe.errors import X\nfrom vimoe.moe import ffn", order)
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_the_picture_shows_the_imports_as_they_are() -> None:
    assert max(map(len, parts().values())) <= 92, "a sentence would leave the picture at the right"
    assert PICTURE.read_text(encoding="utf-8") == draw(), "draw it again: python docs/architecture.py"


def test_an_import_that_others_imply_is_found() -> None:
    graph = {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"a", "b", "c"}}
    assert implied(graph, "d") == {"a", "b"} and not implied(graph, "c")
