"""The site: `python -m sphinx -W -c docs . site`. Sources are the pages of the repository, linked as they are there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "site"))
os.environ.pop("MPLBACKEND", None)  # else notebooks would not show their figures

import localgrad  # noqa: E402
import markdown_pages  # noqa: E402
import method_pages  # noqa: E402
import reference_pages  # noqa: E402

project = "localgrad"
author = "the localgrad authors"
copyright = f"{author}, Apache-2.0"
version = release = localgrad.__version__

root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**", "results/**"]
exclude_patterns = ["docs/site/**", "site/**", ".*"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_markdown_builder",
]
html_theme = "furo"
html_title = "localgrad"
html_static_path = ["static"]
html_css_files = ["localgrad.css"]
html_extra_path = ["root"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

suppress_warnings = ["toc.not_included"]  # tables that pages of results link to

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
napoleon_use_rtype = False


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages that are made from the code, and publish the Markdown of all."""
    method_pages.write(HERE / "methods", HERE.parent / "results")
    reference_pages.write(HERE / "reference")
    app.connect("autodoc-process-signature", reference_pages.as_signature)
    app.connect("autodoc-process-docstring", reference_pages.as_restructured)
    app.connect("build-finished", markdown_pages.publish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
