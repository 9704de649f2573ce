"""Write the first page and the tutorials as notebooks: `python docs/notebooks.py FOLDER`; `make site` does it too.

A notebook is its page: text as it is, each block as a cell that runs. So there is one source, whose blocks the tests
run. It is written as JSON by hand (nbformat 4.5), which is a few lines; jupytext would know neither the files that a
block names nor the links that lead out of a notebook.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGES = (DOCS / "start.md", *sorted((DOCS / "tutorials").glob("*.md")))
BLOCK = re.compile(r"^```(yaml|bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
AWAY = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]*\)")  # a link to another page, which is not beside the notebook


def notebook(page: str) -> dict[str, Any]:
    """Return a page in Markdown as the content of a notebook.

    A Python block becomes a cell, a bash block a cell that stops at a command that fails, and a YAML block a cell
    that writes the file that its first line names.
    """
    first, *rest = BLOCK.split(page)  # text, then a kind, a block and the text after it, and so on
    cells = [_text(first)]
    for kind, code, after in zip(*[iter(rest)] * 3, strict=True):
        file = code.split()[1] if kind == "yaml" else ""
        begin = {"python": "", "bash": "%%bash -e\n", "yaml": f"%%writefile {file}\n"}[kind]
        cells += [_code(begin + code.rstrip("\n")), _text(after)]
    kept = [cell for cell in cells if cell["source"]]
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        },
        "cells": [{"id": f"cell-{i}", **cell} for i, cell in enumerate(kept)],
    }


def _text(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": AWAY.sub(r"\1", text.strip())}


def _code(code: str) -> dict[str, Any]:
    return {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "source": code}


def write_notebooks(folder: Path) -> list[Path]:
    """Write the notebook of each page where the page is in docs/, but in another folder, and return their paths."""
    written = []
    for page in PAGES:
        path = folder / page.relative_to(DOCS).with_suffix(".ipynb")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(notebook(page.read_text("utf-8")), indent=1, ensure_ascii=False) + "\n", "utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    for each in write_notebooks(Path(sys.argv[1])):
        print(each)
