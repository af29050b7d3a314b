"""Configuration of the documentation, which `make docs` builds without the network."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "eval")]

from sphinx.application import Sphinx  # noqa: E402 (a checkout is documented without installing it)

from dalle_zoo.version import __version__  # noqa: E402
from tools.reference import to_restructured_text, write_reference  # noqa: E402

project = "dalle-zoo"
author = "The dalle-zoo authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_llms_txt",
]
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r".*")]  # names in signatures that are no public names; all other links must exist

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 4  # the anchors of a forge, so that links work there too

smartquotes = False  # options begin with two hyphens
html_theme = "furo"
html_title = "dalle-zoo"
html_static_path = ["_static"]
html_css_files = ["zoo.css"]
html_show_copyright = html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"  # prompts and output are not copied
llms_txt_uri_template = "_sources/{docname}{suffix}{sourcelink_suffix}"  # relative, so that the site can be anywhere
llms_txt_summary = (
    "A modular model zoo for DALL-E (v1) on PyTorch Lightning: discrete VAE, sparse autoregressive prior, ranker; "
    "training, evaluation, conversion of other systems' weights, sampling and serving."
)


def generate(app: Sphinx) -> None:
    """Writes the pages that are generated from the package."""
    write_reference(DOCS / "reference/generated")


def translate(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Translates a docstring before napoleon reads its sections."""
    lines[:] = to_restructured_text(lines)


def setup(app: Sphinx) -> None:
    """Connects the generated reference."""
    app.connect("builder-inited", generate)
    app.connect("autodoc-process-docstring", translate, priority=100)
