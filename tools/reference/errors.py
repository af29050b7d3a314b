"""Reference of the error messages, from the `raise` statements of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tools.reference.markdown import code, table

ROOT = Path(__file__).parents[2]
PACKAGES = ("dalle_zoo", "eval/dalle_zoo_eval")
VARIABLE = "…"
"""Stands for a part of a message that depends on the case."""


class Message(NamedTuple):
    """A message of the package."""

    place: str
    """Module that raises it."""
    error: str
    """Name of the exception."""
    text: str
    """The message, with `VARIABLE` for its variable parts."""


def messages() -> Iterator[Message]:
    """Yields all messages that are stated where they are raised."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            place = path.relative_to((ROOT / package).parent).with_suffix("").as_posix().replace("/", ".")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                    text = message_of(node.exc.args[0])
                    if len(text.replace(VARIABLE, "").split()) > 1:  # others only pass a message on
                        yield Message(place, ast.unparse(node.exc.func).rpartition(".")[2], text)


def message_of(node: ast.expr) -> str:
    """Returns the message of an exception's argument."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else VARIABLE for part in node.values)
    if isinstance(node, ast.BinOp):
        return message_of(node.left) + message_of(node.right)
    return VARIABLE


def messages_page() -> str:
    """Returns the page of all messages, by module."""
    found: dict[str, list[Message]] = {}
    for message in messages():
        found.setdefault(message.place, []).append(message)
    parts = [
        "# All error messages\n",
        f"Every message that the package raises, by module; `{VARIABLE}` stands for what depends on the case. A "
        "message states what was expected, what was given and what to do. [Errors](../errors.md) explains the "
        "frequent ones.\n",
    ]
    for place, group in found.items():
        rows = sorted({(code(" ".join(message.text.split())), code(message.error)) for message in group})
        parts += [f"## {place}\n", table(("message", "exception"), rows)]
    return "\n".join(parts)
