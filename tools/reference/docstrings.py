"""Translates docstrings for Sphinx: their tables, fences and code spans are Markdown, which autodoc does not read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

SPAN = re.compile(r"(?<![`:\w])`([^`]+)`(?!`|__?\b)(?=(\w?))")
NAME = re.compile(r"[A-Za-z_][\w.]*(\(\))?")


def to_restructured_text(lines: Sequence[str]) -> list[str]:
    """Returns the lines of a docstring as reStructuredText.

    A code span that is a name becomes a reference, if there is something of that name, and a literal otherwise.

    Example:
        >>> to_restructured_text(["Calls `row`, not `a b`."])
        ['Calls :py:obj:`row`, not ``a b``.']
    """
    out: list[str] = []
    waiting = list(lines)
    while waiting:
        line = waiting.pop(0)
        indent = line[: len(line) - len(line.lstrip())]
        if line.lstrip().startswith("```"):
            block = _until_fence(waiting)
            out += [f"{indent}::", "", *(f"    {text}" for text in block), ""]
        elif line.lstrip().startswith("| "):
            rows = [line]
            while waiting and waiting[0].lstrip().startswith("|"):
                rows.append(waiting.pop(0))
            out += ["", *(indent + text for text in _list_table(rows)), ""]
        elif line.lstrip().startswith((">>> ", "... ")):
            out.append(line)
        else:
            out.append(SPAN.sub(_reference, re.sub(r"""(?<=["'(])\*""", r"\\*", line)))  # a pattern, no emphasis
    return out


def _until_fence(waiting: list[str]) -> list[str]:
    block = []
    while waiting and not (line := waiting.pop(0)).lstrip().startswith("```"):
        block.append(line)
    return block


def _list_table(rows: Sequence[str]) -> Iterator[str]:
    """Yields a list table of the rows of a Markdown table, whose second row is a rule."""
    yield from (".. list-table::", "   :header-rows: 1", "")
    for number, row in enumerate(rows):
        if number != 1:
            cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row.strip())[1:-1]]
            for first, cell in zip("*" + " " * len(cells), cells, strict=False):
                yield f"   {first} - {SPAN.sub(_reference, cell)}".rstrip()


def _reference(match: re.Match[str]) -> str:
    name = match[1]
    end = "\\ " if match[2] else ""  # a letter may not follow a span
    return (f":py:obj:`{name}`" if NAME.fullmatch(name) else f"``{name}``") + end
