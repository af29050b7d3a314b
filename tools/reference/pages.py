"""Collects the generated pages and writes those that changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tools.reference.api import api_index, api_pages
from tools.reference.commands import command_index, command_pages
from tools.reference.errors import messages_page
from tools.reference.keys import keys_page
from tools.reference.masks import masks_page
from tools.reference.recipes import recipe_index, recipe_pages
from tools.reference.registries import evaluation_page, metrics_page, names_page

ROOT = Path(__file__).parents[2]


def write_reference(folder: Path) -> None:
    """Writes all generated pages; the files of pages that are no longer generated are removed.

    Args:
        folder: Folder that contains nothing else.
    """
    written = set()
    for name, text in pages(folder / "images"):
        path = folder / f"{name}.md"
        written.add(path)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # Sphinx reads a file again that changed
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path in set(folder.rglob("*.md")) - written:
        path.unlink()


def pages(images: Path) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of every page.

    Args:
        images: Folder for plots.
    """
    yield "commands", command_index()
    yield from command_pages()
    yield "recipes", recipe_index()
    yield from recipe_pages()
    yield "keys", keys_page()
    yield "masks", masks_page(images)
    yield "names", names_page()
    yield "metrics", metrics_page()
    yield "evaluation", evaluation_page()
    yield "messages", messages_page()
    yield "api", api_index()
    yield from api_pages()
    for name in ("CONTRIBUTING", "CHANGELOG"):
        yield name.lower(), from_root((ROOT / f"{name}.md").read_text(encoding="utf-8"))


def from_root(text: str) -> str:
    """Returns a document of the repository's root for this folder: links to pages are kept, others become text."""

    def moved(match: re.Match[str]) -> str:
        label, target = match.groups()
        if target.startswith(("http", "#")):
            return match[0]
        return f"[{label}](../../{target.removeprefix('docs/')})" if target.startswith("docs/") else label

    return re.sub(r"\[([^\]\n]+)\]\(([^)\s]+)\)", moved, text)
