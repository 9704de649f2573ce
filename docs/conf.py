"""Settings of the documentation site: `make site` builds it, and every warning is an error.

The source folder is the repository, so that pages link to one another, to studies and to code as they do on a forge.
"""

from __future__ import annotations

import vimoe

project = "vimoe"
version = release = vimoe.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
include_patterns = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/tutorials/*.md", "docs/reference/*.md",
    "benchmarks/README.md", "studies/*/README.md",
]  # fmt: skip
root_doc = "docs/index"
default_role = "code"  # docstrings put names in single backquotes
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"vimoe {release}"
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
