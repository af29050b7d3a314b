"""GPUs and their interconnects, from ``hardware.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from dalle_zoo.registry import UnknownNameError, suggest

CPU = "cpu"
"""Name of this machine's CPU, whose rates are measured, among the GPUs of a plan."""
TABLE = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A GPU in a typical node."""

    name: str
    memory: float
    """Memory, GiB."""
    tflops: Mapping[str, float]
    """Peak rate by dtype of the product, 10^12 operations per second."""
    bandwidth: float
    """Memory bandwidth, GB/s."""
    intra: float
    """Bandwidth of one GPU to others in its node, in one direction, GB/s."""
    inter: float
    """Bandwidth of one node to other nodes, in one direction, GB/s."""
    source: str


@cache
def known_gpus() -> Mapping[str, GPU]:
    """Returns all GPUs by name."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {name: GPU(name=name, **row) for name, row in table.items()}


def find_gpu(name: str) -> GPU:
    """Returns a GPU by name.

    Raises:
        UnknownNameError: The name is unknown; the message suggests the closest. It is also a `ValueError`.
    """
    gpus = known_gpus()
    if name not in gpus:
        raise UnknownNameError(suggest("GPU", name, [*gpus, CPU]))
    return gpus[name]
