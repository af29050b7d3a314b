"""Configuration of the documentation, which `make docs` builds without the network."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "eval")]

from dalle_zoo.version import __version__  # noqa: E402 (a checkout is documented without installing it)

project = "dalle-zoo"
author = "The dalle-zoo authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_llms_txt",
]
nitpicky = True

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 4  # the anchors of a forge, so that links work there too

html_theme = "furo"
html_title = "dalle-zoo"
html_static_path = ["_static"]
html_css_files = ["zoo.css"]
html_show_copyright = html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"  # prompts and output are not copied
llms_txt_summary = (
    "A modular model zoo for DALL-E (v1) on PyTorch Lightning: discrete VAE, sparse autoregressive prior, ranker; "
    "training, evaluation, conversion of other systems' weights, sampling and serving."
)
