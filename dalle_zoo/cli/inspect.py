"""``dalle-zoo inspect | env``: what an image or a model contains, and what dalle-zoo runs on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dalle_zoo.cli.parser import parser

MOST_WORDS = 12
"""Known words that are shown; JSON has all of them."""


def inspect(arguments: list[str]) -> None:
    """Describes an image or a model."""
    from dalle_zoo.inspection import describe_image, describe_model

    p = parser(
        "inspect",
        "Print what an image was generated with, or what a model contains.\n\n"
        "  dalle-zoo inspect image.png          prompt, seed, model, options\n"
        "  dalle-zoo inspect composition --json     components, sizes, checksums, license, known words",
    )
    p.add_argument("target", help="PNG file, or a model: bundled name, folder, or org/name, which is downloaded")
    p.add_argument("--json", action="store_true", help="print JSON")
    options = p.parse_args(arguments)
    is_image = Path(options.target).is_file()
    found = describe_image(options.target) if is_image else describe_model(options.target)
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(_short_image(found) if is_image else _short_model(found))))


def env(arguments: list[str]) -> None:
    """Describes versions and devices."""
    from dalle_zoo.inspection import describe_environment

    p = parser("env", "Print versions, devices and memory, for bug reports.")
    p.add_argument("--json", action="store_true", help="print JSON")
    options = p.parse_args(arguments)
    found = describe_environment()
    print(json.dumps(found, indent=2) if options.json else "\n".join(_lines(found)))


def _short_image(found: dict[str, Any]) -> dict[str, Any]:
    given = found["given"]
    if given is None:
        return found
    codes = [code for row in given for code in row]
    return found | {"given": f"{sum(code >= 0 for code in codes)} of {len(codes)} codes were kept"}


def _short_model(found: dict[str, Any]) -> dict[str, Any]:
    words = found["words"]
    components = {
        name: {"type": (part["config"] or {}).get("type"), "parameters": part["parameters"], "bytes": part["bytes"]}
        for name, part in found["components"].items()
    }
    known = words and f"{len(words)}: {', '.join(list(words)[:MOST_WORDS])}{', …' * (len(words) > MOST_WORDS)}"
    return found | {"components": components, "words": known}


def _printable(text: str) -> str:
    """Escapes control characters, with which a file could change what a terminal shows."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _lines(values: dict[str, Any], indent: str = "") -> list[str]:
    """One line per value that is known, nested values below their name."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list):
            lines += [f"{indent}{name}: {'none' if not value else ''}".rstrip()]
            lines += [f"{indent}  {', '.join(map(str, each.values()))}" for each in value]
        elif value is not None:
            shown = f"{value:,}" if type(value) is int and name not in ("seed", "threads") else value
            lines.append(f"{indent}{name}: {_printable(str(shown))}")
    return lines
