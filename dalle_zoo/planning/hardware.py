"""GPUs and their links, from the table ``hardware.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from dalle_zoo.registry import UnknownNameError, suggest

TABLE = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A GPU in its usual node."""

    name: str
    memory: float
    """GiB."""
    tflops: Mapping[str, float]
    """Peak by the type of the product, 10^12 operations a second."""
    bandwidth: float
    """Of the memory, GB/s."""
    intra: float
    """Between GPUs of a node: GB/s of one GPU in one direction."""
    inter: float
    """Between nodes: GB/s of one node in one direction."""
    source: str


@cache
def known_gpus() -> Mapping[str, GPU]:
    """All GPUs by name."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {name: GPU(name=name, **row) for name, row in table.items()}


def find_gpu(name: str) -> GPU:
    """A GPU by name.

    Raises:
        UnknownNameError: There is none; the message has the nearest name. It is a `ValueError` too.
    """
    gpus = known_gpus()
    if name not in gpus:
        raise UnknownNameError(suggest("GPU", name, gpus))
    return gpus[name]
