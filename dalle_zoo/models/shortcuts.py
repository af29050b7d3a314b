"""The switch of all private operators of PyTorch, and the trials that each of them must pass.

| operators | plain twin | what they gain |
|---|---|---|
| `cpu.onednn`: packed matrices | `F.linear` | sampling on a CPU |
| `cpu.onednn`: fused convolutions | `F.conv2d`, `F.relu` and sums | encoding and decoding images on a CPU |
| `attention.fused`: attention that returns the sums of its softmax | `F.scaled_dot_product_attention` | training |

No other module calls ``torch.ops``; `tests/test_architecture.py` checks this, and lists the few other private names of
PyTorch. PyTorch may rename or change the operators, so each is compared with its public twin on this machine before
its first use. `benchmarks/shortcuts.py` measures what each is worth. To find out whether one of them causes a problem,
run with ``DALLE_ZOO_SHORTCUTS=0``: only their twins are then called, with equal results up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any, Protocol

SWITCH = "DALLE_ZOO_SHORTCUTS"
"""Environment variable: 0 turns all private operators off. Defaults to 1."""

_OFF: ContextVar[bool] = ContextVar("shortcuts are off", default=False)


class Trial(Protocol):
    """Whether operators may be used here."""

    def __call__(self, *conditions: Any) -> bool:
        """Whether they are turned on, exist and agree with their twins; compared once per process."""

    def cache_clear(self) -> None:
        """Compares again at the next call."""


def allowed() -> bool:
    """Whether private operators may be used.

    Raises:
        ValueError: The environment variable is neither 0 nor 1.
    """
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{SWITCH} must be 0 (only public operators of PyTorch) or 1, got {value!r}")
    return value == "1" and not _OFF.get()


@contextmanager
def turned_off() -> Iterator[None]:
    """Uses only public operators inside the context.

    A mask remembers how its attention is computed, so build networks inside the context.
    """
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)


def switchable(trial: Callable[..., bool]) -> Trial:
    """Makes the comparison of operators with their twins a `Trial`."""
    compared: Any = cache(trial)

    @wraps(trial)
    def usable(*conditions: Any) -> bool:
        return allowed() and compared(*conditions)

    usable.cache_clear = compared.cache_clear  # type: ignore[attr-defined]
    return usable  # type: ignore[return-value]
