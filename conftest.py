"""Lets doctest find the examples of decorated functions, as `torch.no_grad` and `METRICS.register` return them."""

from __future__ import annotations

import doctest
import inspect
from types import ModuleType
from typing import Any

_is_of = doctest.DocTestFinder._from_module  # type: ignore[attr-defined]


def _is_of_when_unwrapped(finder: doctest.DocTestFinder, module: ModuleType | None, found: Any) -> bool:
    """Whether a module defines a function, whose decorator may be of another module."""
    return bool(_is_of(finder, module, inspect.unwrap(found) if inspect.isfunction(found) else found))


doctest.DocTestFinder._from_module = _is_of_when_unwrapped  # type: ignore[attr-defined]
