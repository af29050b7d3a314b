"""Errors that users can act on, and a parser that suggests corrections."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from dalle_zoo.registry import suggest


class UserError(Exception):
    """A mistake of the user. The message says what was expected, what was given and what to do."""


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that suggests the nearest valid option or choice for a typo."""

    def error(self, message: str) -> NoReturn:
        """Prints the message with a suggestion and exits with status 2."""
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
        super().error(message)


def check_device(name: str) -> None:
    """Raises `UserError` unless PyTorch can compute on the device."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # builds without CUDA raise AssertionError
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): use cpu, or cuda with a GPU") from None
