"""Seeded generators of random numbers, as pure functions of (seed, what, where)."""

from __future__ import annotations

import hashlib
import random


def seeded_rng(*parts: int | str) -> random.Random:
    """Generator that depends on the parts alone: not on the process or what was sampled before."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return random.Random(hashlib.sha256(text.encode()).digest())
