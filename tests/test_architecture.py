"""The package reads from top to bottom: a file imports only from files above it in the README's tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def order() -> list[str]:
    """Module names in the README's tree, from top to bottom."""
    tree = re.search(r"```\nvimoe/\n(.*?)^tests/", (ROOT / "README.md").read_text(), re.S | re.M).group(1)
    names, package = [], ""
    for indent, name in re.findall(r"^( +)([\w.]+/?)", tree, re.M):
        package = package if len(indent) > 2 else ""
        if name.endswith("/"):
            package = name[:-1] + "."
        else:
            names.append(package + name.removesuffix(".py"))
    return names


def imports(source: str) -> set[str]:
    """Modules of this package that a source imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vimoe":
            module = node.module.removeprefix("vimoe").lstrip(".")
            found |= {module} if module else {alias.name for alias in node.names if alias.name != "__version__"}
    return found


def violations(name: str, source: str, above: list[str]) -> list[str]:
    whole = [module for module in order() if module.startswith("moe.")]
    public = {"moe"} if whole[-1] in above else set()  # the package offers its last member
    return [f"{name} imports {module}" for module in imports(source) if module not in above and module not in public]


def test_the_tree_names_every_module() -> None:
    package = ROOT / "vimoe"
    files = {str(p.relative_to(package).with_suffix("")).replace("/", ".") for p in package.rglob("*.py")}
    assert {name for name in files if not name.endswith("__init__")} == set(order())


@pytest.mark.parametrize("name", order())
def test_a_module_imports_only_from_above(name: str) -> None:
    source = (ROOT / "vimoe" / (name.replace(".", "/") + ".py")).read_text()
    assert not violations(name, source, order()[: order().index(name)])


def test_the_check_sees_a_violation() -> None:
    assert violations("ffn", "from vimoe.upcycling import plan", ["errors", "config"]) == ["ffn imports upcycling"]
    assert violations("ffn", "from vimoe import runs", ["errors"]) == ["ffn imports runs"]
    assert not violations("ffn", "from vimoe.errors import X\nfrom vimoe.moe import MoE", ["errors", "moe.layer"])
