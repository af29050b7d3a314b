"""Markdown of the generated pages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any


def escape(text: str) -> str:
    """Returns text as one line whose characters mean themselves, except in code spans."""
    parts = re.split(r"(``?[^`]+``?)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([<*_\[\]$])", r"\\\1", part) for part in parts)


def code(value: Any) -> str:
    """Returns a value as a code span; nothing for empty text."""
    text = str(value).replace("`", "'")
    return f"`{text}`" if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table; its cells are Markdown."""
    lines = [[cell.replace("|", r"\|") for cell in cells] for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def first_paragraph(target: Any) -> str:
    """Returns the first paragraph of a docstring as one line, without its final period."""
    paragraph = (inspect.getdoc(target) or "").partition("\n\n")[0]
    return escape(paragraph).removesuffix(".")


def prose(target: Any) -> str:
    """Returns a docstring without its sections, such as the one of arguments."""
    text = inspect.getdoc(target) or ""
    return re.split(r"^(?:Args|Returns|Raises|Example|Yields|Attributes):", text, maxsplit=1, flags=re.MULTILINE)[0]


def options(function: Any, skipped: int = 0) -> str:
    """Returns the options of a function with their defaults, as a spec states them: ``kernel=11``."""
    parameters = list(inspect.signature(function).parameters.values())[skipped:]
    given = [f"{p.name}={p.default}" for p in parameters if isinstance(p.default, int | float | str | tuple)]
    required = [f"{p.name}=..." for p in parameters if p.default is p.empty and p.annotation in (int, "int")]
    return ", ".join(map(code, required + given))
