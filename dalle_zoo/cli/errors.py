"""Errors that users can act on, and a parser that suggests corrections."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user. The message says what was expected, what was given and what to do."""


def check_device(name: str) -> None:
    """Raises `UserError` unless PyTorch can compute on the device."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # builds without CUDA raise AssertionError
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): use cpu, or cuda with a GPU") from None
