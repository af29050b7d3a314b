"""Seeded generators of random numbers, as pure functions of (seed, what, where)."""

from __future__ import annotations

import hashlib
import random


def seeded_rng(*parts: int | str) -> random.Random:
    """Returns a generator that depends only on the parts, not on the process or on earlier samples."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return random.Random(hashlib.sha256(text.encode()).digest())
