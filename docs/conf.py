"""Settings of the documentation site: `make site` builds it, and every warning is an error.

The source folder is the repository, so that pages link to one another, to studies and to code as they do on a forge.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes

import vimoe
from vimoe.files import read_text
from vimoe.report.html_page import LOOK

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import DOCS, PAGES, write_notebooks  # noqa: E402  beside this file


def look(dark: bool) -> dict[str, str]:
    """Return the look of reports and the explorer as variables of the theme, of light pages or of dark ones."""
    light, at_night = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in read_text(LOOK).split("@media"))
    colours = at_night if dark else light
    return {
        "font-stack": "system-ui, sans-serif",
        "color-foreground-primary": colours["text"],
        "color-foreground-secondary": colours["soft"],
        "color-background-primary": colours["back"],
        "color-background-secondary": colours["box"],
        "color-background-border": colours["line"],
        "color-brand-primary": colours["accent"],
        "color-brand-content": colours["accent"],
        "color-brand-visited": colours["accent"],
    }


FIGURES = re.compile(r"(?:[-+±\d.,%\[\]() ]|of)+")  # such as 78.96 ± 0.79, and 2 of 7

project = "vimoe"
version = release = vimoe.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
include_patterns = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/tutorials/*.md", "docs/guides/*.md",
    "docs/reference/*.md", "benchmarks/README.md", "studies/*/README.md",
]  # fmt: skip
root_doc = "docs/index"
default_role = "code"  # docstrings put names in single backquotes
python_maximum_signature_line_length = 88

html_theme = "furo"
html_theme_options = {"light_css_variables": look(dark=False), "dark_css_variables": look(dark=True)}
html_title = f"vimoe {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False

myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 4  # links to sections, as forges make them

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def add_notebook(_app: Any, name: str, source: list[str]) -> None:
    """Add to a page that has a notebook the link to it."""
    if DOCS.parent / f"{name}.md" in PAGES:
        source[0] += f'\n\n<p><a download href="{Path(name).name}.ipynb">This page as a notebook</a></p>\n'


def mark_cells(_app: Any, page: nodes.document) -> None:
    """Mark the cells of tables for site.css, and keep the hyphen of a header such as "top-1" from breaking a line."""
    for cell in page.findall(nodes.entry):
        if FIGURES.fullmatch(cell.astext()):
            cell["classes"].append("figures")
        elif len(cell.astext()) > 20:
            cell["classes"].append("words")
    for head in page.findall(nodes.thead):
        for text in list(head.findall(nodes.Text)):
            if not isinstance(text.parent, nodes.literal):  # which may be copied
                text.parent.replace(text, nodes.Text(text.replace("-", "\N{NON-BREAKING HYPHEN}")))


def setup(app: Any) -> None:
    """Write the notebooks beside the pages that link to them, and mark the cells of tables."""
    app.connect("source-read", add_notebook)
    app.connect("doctree-read", mark_cells)
    app.connect("builder-inited", lambda app: write_notebooks(Path(app.outdir) / "docs"))
