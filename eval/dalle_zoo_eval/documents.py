"""Documents in two forms: Markdown with separate image files, and one HTML file with embedded images."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dalle_zoo.files import atomic_write, escape_surrogates

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; }
th, td { border-bottom: 1px solid #ddd; padding: 0.3rem 0.75rem 0.3rem 0; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; }
td { overflow-wrap: anywhere; min-width: 3rem; }
tr.strong td { background: #fff3e6; }
tr.strong td:first-child { font-weight: 600; }
td small { white-space: nowrap; color: #555; }
img { max-width: 100%; height: auto; }
""".strip()


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title of the document."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Sentences."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list; may be empty."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of equal length below a head. Strong rows are highlighted; text after a line break in a cell is small."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()
    on_screen: frozenset[str] = frozenset()
    """Heads of the columns for which a printed page has no room."""


@dataclass(frozen=True)
class Image:
    """A PNG file."""

    name: str
    """Name of the file next to the Markdown."""
    png: bytes
    text: str
    """Alternative text."""
    vector: Callable[[], bytes] | None = field(default=None, compare=False)
    """Returns the same figure as a PDF file; None for sheets of images."""


Block = Heading | Paragraph | Bullets | Table | Image


def write_document(blocks: Sequence[Block], out: Path) -> list[Path]:
    """Writes ``report.md``, ``report.html`` and the images of both into a folder; files of these names are replaced.

    Returns:
        The files that were written, the two reports first.
    """
    return write_files({"report.md": to_markdown(blocks), "report.html": to_html(blocks)}, blocks, out)


def write_files(texts: Mapping[str, str], blocks: Sequence[Block], out: Path) -> list[Path]:
    """Writes documents by file name, then the images of their blocks as PNG files; returns all files."""
    files = {name: escape_surrogates(text).encode() for name, text in texts.items()}
    files |= {block.name: block.png for block in blocks if isinstance(block, Image)}
    for name, data in files.items():
        with atomic_write(out / name) as aside:
            aside.write_bytes(data)
    return [out / name for name in files]


def field_table(fields: Mapping[str, object]) -> Table:
    """Returns nested fields as a table with their dotted paths; empty values are left out."""
    return Table(["field", "value"], [row for name, value in fields.items() for row in _rows(name, value)])


def _rows(name: str, value: object) -> list[list[str]]:
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _rows(f"{name}.{key}", inner)]
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        numbered = {inner.get("name", number): inner for number, inner in enumerate(value, 1)}
        return [row for key, inner in numbered.items() for row in _rows(f"{name}.{key}", inner)]
    return [[name, field_text(value)]] if value not in (None, [], "") else []


def field_text(value: object) -> str:
    """Returns a plain value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(field_text, value)) if isinstance(value, list) else str(value)


def to_markdown(blocks: Sequence[Block]) -> str:
    """Returns the document as Markdown; images are links to files next to it."""
    return "\n\n".join(part for block in blocks if (part := _markdown(block))) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    """Returns the document as one self-contained HTML file."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>\n{_STYLE}\n</style>'
    body = "\n".join(part for block in blocks if (part := _html(block)))
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return "#" * block.level + " " + _plain(block.text)
        case Paragraph():
            return _plain(block.text)
        case Bullets():
            return "\n".join(f"- {_plain(item)}" for item in block.items)
        case Table():
            rows = [[_plain(cell) for cell in row] for row in block.rows]
            rows = [[f"**{row[0]}**", *row[1:]] if n in block.strong else row for n, row in enumerate(rows)]
            lines = ["| " + " | ".join(row) + " |" for row in [[_plain(cell) for cell in block.head], *rows]]
            lines.insert(1, "|" + "---|" * len(block.head))
            return "\n".join(lines)
        case Image():
            return f"![{_plain(block.text)}]({block.name})"


def _plain(text: str) -> str:
    """Returns text on one line, with the special characters of Markdown and HTML escaped."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line)


def _html(block: Block) -> str:
    escape = html.escape
    match block:
        case Heading():
            return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
        case Paragraph():
            return f"<p>{escape(block.text)}</p>"
        case Bullets():
            items = "".join(f"<li>{escape(item)}</li>\n" for item in block.items)
            return f"<ul>\n{items}</ul>" if items else ""
        case Table():
            head = "".join(f"<th>{escape(cell)}</th>" for cell in block.head)
            rows = [f"<tr>{head}</tr>"]
            for number, row in enumerate(block.rows):
                mark = ' class="strong"' if number in block.strong else ""
                rows.append(f"<tr{mark}>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>")
            return '<div class="wide">\n<table>\n' + "\n".join(rows) + "\n</table>\n</div>"
        case Image():
            data = base64.b64encode(block.png).decode()
            return f'<p><img alt="{escape(block.text)}" src="data:image/png;base64,{data}"></p>'


def _cell(text: str) -> str:
    first, *rest = (html.escape(line) for line in text.split("\n"))
    return first + "".join(f"<br><small>{line}</small>" for line in rest)
