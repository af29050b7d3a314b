"""Reference of the commands, from their parsers."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator, Mapping
from unittest.mock import patch

from dalle_zoo.cli.main import COMMANDS
from tools.reference.markdown import code, escape, table

GROUPS: Mapping[str, tuple[str, ...]] = {
    "Generate": ("demo", "generate", "serve", "reconstruct", "inspect", "models", "convert", "publish"),
    "Prepare data": ("manifest", "filter", "tokenizer", "encode", "ray"),
    "Train": (
        "recipes",
        "list",
        "masks",
        "plan",
        "fit",
        "validate",
        "test",
        "predict",
        "plot",
        "consolidate",
        "average",
        "export",
    ),
    "Evaluate": ("eval", "compare", "report", "study", "overlap", "captions", "benchmark", "card"),
    "Report a bug": ("env",),
}
"""Commands by what they are for; commands that are in no group follow under "Others"."""
SUBCOMMANDS = {
    "eval": ("coco-30k",),
    "study": ("make", "serve", "report"),
    "benchmark": ("export", "import"),
}
"""Words after a command that have options of their own; the options of `eval` are those of a protocol."""


class _ShownError(Exception):
    """Carries a parser whose help was to be printed."""


def parser_of(command: str, *words: str) -> argparse.ArgumentParser:
    """Returns the parser of a command, for instance of ``study make``."""

    def show(parser: argparse.ArgumentParser) -> None:
        raise _ShownError(parser)

    module, function = COMMANDS[command][0].split(":")
    run = getattr(importlib.import_module(module), function)
    with patch.object(argparse.ArgumentParser, "print_help", show):
        try:
            run([*words, "--help"])
        except _ShownError as shown:
            parser: argparse.ArgumentParser = shown.args[0]
            return parser
    raise AssertionError(f"{command} has no --help")


def command_pages() -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each page: one for each command."""
    for command, (_, summary) in COMMANDS.items():
        parser = parser_of(command)
        parts = [f"# dalle-zoo {command}\n"]
        parts += [] if parser.description else [f"{escape(summary[0].upper() + summary[1:])}.\n"]
        parts += _parser(parser)
        for word in SUBCOMMANDS.get(command, ()):
            parts += [f"## dalle-zoo {command} {word}\n", *_parser(parser_of(command, word))]
        yield f"commands/{command}", "\n".join(parts)


def command_index() -> str:
    """Returns the page that lists all commands."""
    grouped = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, "Others": tuple(name for name in COMMANDS if name not in grouped)}
    parts = ["# Commands\n", "Every command has `--help`, and `--debug`, which prints the traceback of an error.\n"]
    for title, names in groups.items():
        if names:
            rows = [(f"[`dalle-zoo {name}`](commands/{name}.md)", escape(COMMANDS[name][1])) for name in names]
            parts += [f"## {title}\n", table(("command", "what it does"), rows)]
    hidden = "\n".join(f"commands/{name}" for names in groups.values() for name in names)
    return "\n".join([*parts, f"```{{toctree}}\n:hidden:\n{hidden}\n```\n"])


def _parser(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from _description(parser.description)
    yield f"```text\n{_usage(parser)}\n```\n"
    rows = [_row(action) for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    yield table(("option", "meaning", "default"), rows)
    yield from _description(parser.epilog)


def _usage(parser: argparse.ArgumentParser) -> str:
    """Returns the usage without the options, which the table lists."""
    if parser.usage:
        return parser.usage
    places = [_value(action) for action in parser._actions if not action.option_strings]
    return " ".join([parser.prog, "[options]", *places])


def _row(action: argparse.Action) -> tuple[str, str, str]:
    shown = f"{', '.join(action.option_strings)} {_value(action)}".strip()
    text = (action.help or "").replace("%%", "%")
    default = re.search(r" ?\[([^\[\]]*)\]$", text)
    meaning = text[: default.start()] if default else text
    return code(shown), escape(meaning), escape(default[1]) if default else ""


def _value(action: argparse.Action) -> str:
    """Returns the placeholder for the value of an option; nothing for a flag."""
    if action.nargs == 0:
        return ""
    choices = "|".join(map(str, action.choices)) if action.choices and not action.metavar else ""
    metavar = action.metavar or choices or action.dest.upper()
    value = " ".join(metavar) if isinstance(metavar, tuple) else metavar
    return f"{value} ..." if action.nargs in ("+", "*") else value


def _description(text: str | None) -> Iterator[str]:
    """Yields the paragraphs of a description; indented ones are examples or lists."""
    for paragraph in re.split(r"\n\s*\n", text or ""):
        lines = paragraph.strip("\n").splitlines()
        indented = [line for line in lines if line.startswith("  ")]
        told = [line for line in lines if not line.startswith("  ")]
        if told:
            yield escape("\n".join(told)) + "\n"
        if indented:
            examples = any(re.match(r"  (dalle-zoo|torchrun|pip) ", line) for line in indented)
            # What follows an example after three spaces explains it.
            shown = [
                re.sub(r"(\S) {3,}(\S.*)$", r"\1    # \2", line[2:]) if examples else line[2:] for line in indented
            ]
            yield "\n".join([f"```{'sh' if examples else 'text'}", *shown, "```\n"])
