"""Parsers of the subcommands: plain argparse, with suggestions for typos."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

from dalle_zoo.paths import user_path
from dalle_zoo.registry import suggest


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that suggests the nearest valid option or choice for a typo, and checks paths."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", Path, path_argument)

    def error(self, message: str) -> NoReturn:
        """Prints one line with the message and a suggestion, and exits with status 2."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        choice = re.search(r"argument (\S+): invalid choice: '([^']*)'", message)
        if unknown:
            options = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
            message = suggest("option", unknown.group(1), options)
        elif choice:
            action = next(
                a for a in self._actions if choice.group(1) in (a.dest, a.metavar, "/".join(a.option_strings))
            )
            message = suggest(choice.group(1), choice.group(2), [str(c) for c in action.choices or ()])
        for pattern, plain in _PLAIN:
            message = re.sub(pattern, plain, message)
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


_PLAIN = (
    (r"argument (\S+): invalid int value: (.*)", r"\1 must be an integer, got \2"),
    (r"argument (\S+): invalid float value: (.*)", r"\1 must be a number, got \2"),
    (r"argument (\S+): expected one argument", r"\1 needs a value"),
    (r"argument (\S+): expected (.*) arguments?", r"\1 needs \2 values"),
    (r"argument (\S+): ", r"\1: "),
    (r"the following arguments are required: (.*)", r"missing: \1"),
)
"""Messages of argparse, and those that replace them."""


def path_argument(text: str) -> Path:
    """Returns the path of an option; `Parser` uses it for all options of the type `Path`."""
    try:
        return user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Returns the parser of a subcommand; its description keeps its line breaks."""
    return Parser(
        prog=f"dalle-zoo {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
