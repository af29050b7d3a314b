"""What counts as an integer and as a number, for every caller."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from dalle_zoo.values import as_integer, as_number, check_integers


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_integers(value: Any) -> None:
    found = as_integer("count", value, least=1, most=3)
    assert (type(found), found) == (int, 3)


@pytest.mark.parametrize(
    "value",
    [3.0, True, "3", None, [3], np.True_, np.float64(3), np.array([3]), torch.tensor(3.0), torch.tensor(True)],
)
def test_other_values_are_no_integers(value: Any) -> None:
    with pytest.raises(TypeError, match="count must be an integer of at least 1, to count with, got"):
        as_integer("count", value, least=1, meaning=", to count with")


@pytest.mark.parametrize(("value", "expected"), [(0, "in 1..4"), (5, "in 1..4"), (-(10**30), "in 1..4")])
def test_integers_out_of_range(value: int, expected: str) -> None:
    with pytest.raises(ValueError, match=f"count must be an integer {expected}, got {value}"):
        as_integer("count", value, least=1, most=4)
    with pytest.raises(ValueError, match="must be an integer of at most -"):
        as_integer("count", value, most=-(10**31))


@pytest.mark.parametrize(
    ("value", "expected"), [(2, 2), (0.5, 0.5), (np.float32(0.5), 0.5), (np.int64(2), 2), (Fraction(1, 2), 0.5)]
)
def test_numbers(value: Any, expected: float) -> None:
    found = as_number("share", value)
    assert (type(found), found) == (type(expected), expected)


@pytest.mark.parametrize("value", [True, "0.5", None, np.True_, torch.tensor(0.5), 1j])
def test_other_values_are_no_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="share must be a finite number of at least 0, got"):
        as_number("share", value, least=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -0.1, 1.5])
def test_numbers_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"share must be a finite number in 0\.\.1, got"):
        as_number("share", value, least=0, most=1)


def test_fields_of_a_configuration() -> None:
    @dataclass(frozen=True)
    class Sizes:
        width: Any
        depth: Any = 1

        def __post_init__(self) -> None:
            check_integers(self, "width", "depth")

    assert type(Sizes(np.int32(4)).width) is int
    with pytest.raises(TypeError, match=r"width must be an integer of at least 1, got 4.0"):
        Sizes(4.0)
    with pytest.raises(ValueError, match="depth must be an integer of at least 1, got 0"):
        Sizes(4, 0)
