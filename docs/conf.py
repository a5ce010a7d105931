"""How `make docs` builds the documentation: Sphinx, with pages in Markdown (MyST).

The source folder is the repository, so that a link between two Markdown files is the same one on a code host and here.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from neml2_aoti_plugin import __version__  # noqa: E402

project = "neml2-aoti-plugin"
author = "neml2-aoti-plugin founders"
project_copyright = f"2026, {author}"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "examples/**.md", "legacy/README.md", "stubs/README.md"]
# Not looked into at all, which matters for the size of a virtual environment.
exclude_patterns = [".*", "build", "dist", "demo", "neml2_aoti_plugin", "tests"]

# Headings are link targets under the names that code hosts give them.
myst_heading_anchors = 4
# A block of code without a language is text, such as a diagram or what a command prints.
highlight_language = "text"

# Docstrings have code in single backticks.
default_role = "code"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Links into other projects need the network: `make docs DOCS_FLAGS="-t online"`, and `make docs-links`.
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "neml2": ("https://applied-material-modeling.github.io/neml2", None),
    }
    if tags.has("online")  # type: ignore[name-defined]  # noqa: F821
    else {}
)
linkcheck_timeout = 20

html_theme = "furo"
html_title = f"{project} {__version__}"
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
