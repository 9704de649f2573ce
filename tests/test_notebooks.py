"""The notebooks have the text and the code of their pages, in the format of notebooks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from notebooks import DOCS, PAGES, notebook, write_notebooks

MAGIC = re.compile(r"\A%%\w+.*\n")


def check(made: dict[str, Any]) -> None:
    """Check a notebook against the format 4.5, by its own library where that is installed."""
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5) and made["metadata"]["kernelspec"]["name"]
    ids = [cell["id"] for cell in made["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", each) for each in ids)
    for cell in made["cells"]:
        of_code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell["cell_type"] in ("markdown", "code") and isinstance(cell["source"], str)
        assert set(cell) == {"id", "cell_type", "metadata", "source"} | of_code
    try:
        import nbformat
    except ImportError:
        return
    nbformat.validate(made)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_as_a_notebook(page: Path) -> None:
    text = page.read_text("utf-8")
    made = notebook(text)
    check(made)
    blocks = re.findall(r"^```\w+\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    code = [MAGIC.sub("", cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
    assert code == blocks and blocks
    words = " ".join(cell["source"] for cell in made["cells"] if cell["cell_type"] == "markdown")
    assert words.startswith("# ") and "```" not in words and not re.search(r"\]\((?!https?:)", words)


def test_each_kind_of_block_is_a_cell_that_runs() -> None:
    blocks = ["yaml\n# f.yaml\ng: 1", "bash\nls \\\n  -l", "\nno cell", "python\n1"]
    page = "# A [b](c.md) [d](https://e)\n\n" + "\nh\n".join(f"```{block}\n```" for block in blocks) + "\n"
    cells = [(cell["cell_type"], cell["source"]) for cell in notebook(page)["cells"]]
    assert cells == [
        ("markdown", "# A b [d](https://e)"), ("code", "%%writefile f.yaml\n# f.yaml\ng: 1"),
        ("markdown", "h"), ("code", "%%bash -e\nls \\\n  -l"), ("markdown", "h\n```\nno cell\n```\nh"), ("code", "1"),
    ]  # fmt: skip


def test_every_tutorial_has_a_notebook(tmp_path: Path) -> None:
    written = write_notebooks(tmp_path)
    names = {"start.ipynb", *(f"tutorials/{page.stem}.ipynb" for page in (DOCS / "tutorials").glob("*.md"))}
    assert {path.relative_to(tmp_path).as_posix() for path in written} == names and len(names) >= 6
    for path in written:
        check(json.loads(path.read_text("utf-8")))


def test_the_check_can_fail() -> None:
    made = notebook("# A\n")
    made["cells"].append(made["cells"][0])
    with pytest.raises(AssertionError):
        check(made)
