"""Draw docs/architecture.svg: the parts of the package and their imports. Run it from anywhere, without arguments.

The parts, their order and their sentences are those of the tree in the README; the imports are read from the sources.
"""

from __future__ import annotations

import ast
import functools
import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vimoe"
PICTURE = ROOT / "docs" / "architecture.svg"
ROW, LEFT, BOX, WIDTH = 34, 176, 104, 860  # height of a row; left edge and width of the boxes; width of the picture


def parts() -> dict[str, str]:
    """Return the parts of the package in the README's order, each with its sentence."""
    tree = re.search(r"```\nvimoe/\n(.*?)^tests/", (ROOT / "README.md").read_text("utf-8"), re.S | re.M)
    assert tree is not None, "the README has no tree of the package"
    return dict(re.findall(r"^  (\w+)(?:/|\.py) +(.+)$", tree.group(1), re.M))


@functools.cache
def sources() -> dict[str, str]:
    """Return the text of each module by its name within the package, such as "moe.layer" or "moe.__init__"."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file.read_text("utf-8") for file in files}


@functools.cache
def imports(source: str) -> frozenset[str]:
    """Return the modules of this package that a source imports, also inside functions and for types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name[6:] for alias in node.names if alias.name.startswith("vimoe.")}
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vimoe":
            base = node.module[6:]
            below = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name for name in below if name in sources()} or ({base} if base else set())
    return frozenset(found)


def imports_of_parts() -> dict[str, set[str]]:
    """Return the other parts that each part imports."""
    found: dict[str, set[str]] = {part: set() for part in parts()}
    for module, source in sources().items():
        part = module.partition(".")[0]
        if part in found:
            found[part] |= {name.partition(".")[0] for name in imports(source)} - {part}
    return found


def implied(graph: dict[str, set[str]], part: str) -> set[str]:
    """Return the imports of a part that one of its other imports has too, directly or by others."""
    below: set[str] = set()
    queue = [other for name in graph[part] for other in graph[name]]
    while queue:
        name = queue.pop()
        if name not in below:
            below.add(name)
            queue += graph[name]
    return graph[part] & below


def draw() -> str:
    """Return the picture as SVG: a row for each part, and an arc to each part that it imports."""
    sentences, graph = parts(), imports_of_parts()
    height = {part: ROW * i + ROW // 2 for i, part in enumerate(sentences)}
    light, dark, rows = [], [], []
    for part, sentence in sentences.items():
        weak = implied(graph, part)
        for other in sorted(graph[part], key=list(height).index):
            y, end = height[part], height[other]
            bend = LEFT - 16 - round(0.5 * (y - end) ** 0.93)
            line = f'<path d="M{LEFT} {y - 5}C{bend} {y - 5} {bend} {end + 5} {LEFT - 7} {end + 5}"'
            (light if other in weak else dark).append(f"{line}/>")
        y = height[part]
        rows.append(f'<rect x="{LEFT}" y="{y - 12}" width="{BOX}" height="24" rx="4"/>')
        rows.append(f'<text x="{LEFT + BOX // 2}" y="{y + 5}" text-anchor="middle" class="part">{part}</text>')
        rows.append(f'<text x="{LEFT + BOX + 14}" y="{y + 5}">{escape(sentence)}</text>')
    size = f"{WIDTH} {ROW * len(sentences)}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="14">\n'
        "<title>The parts of vimoe and their imports</title>\n"
        "<style>path{fill:none;stroke-width:1.3} rect{fill:#e8eef7;stroke:#4a6fa5} .part{font-weight:bold} "
        ".dark{stroke:#4a6fa5;marker-end:url(#tip)} .light{stroke:#dddddd}</style>\n"
        '<marker id="tip" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L8 4L0 8z" style="fill:#4a6fa5"/></marker>\n'
        '<rect width="100%" height="100%" style="fill:#ffffff;stroke:none"/>\n'
    )
    groups = ['<g class="light">', *light, "</g>", *(line.replace("/>", ' class="dark"/>') for line in dark), *rows]
    return head + "\n".join([*groups, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), "utf-8")
    print(PICTURE)
