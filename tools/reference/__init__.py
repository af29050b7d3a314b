"""Generates the reference pages of the documentation: nothing in them is written by hand.

`write_reference` is called by ``docs/conf.py`` whenever the documentation is built.
"""

from tools.reference.docstrings import to_restructured_text
from tools.reference.pages import write_reference

__all__ = ["to_restructured_text", "write_reference"]
