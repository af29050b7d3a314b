"""Work in numbered parts that several processes do together, on one machine or on many that share a folder.

Each part is a file. A process begins with its own parts, continues with those of others that nobody has claimed, and
ends when all exist. Therefore, the result is the same for any number of processes, a lost process costs the part that
it worked on, and processes may be added at any time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dalle_zoo.claims import Claims

_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
"""Variables of torchrun and of srun. A job script has no step, so it is one process, whatever the job's tasks."""
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which parts a process begins with."""

    rank: int = 0
    """Number of the process."""
    world: int = 1
    """Processes in all."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank must be in 0..{self.world - 1}, got {self.rank}")

    @classmethod
    def of_environment(cls) -> Self:
        """Returns the share of this process under torchrun or srun, or else all of the work."""
        for rank, world in _RANKS:
            if rank in os.environ and world in os.environ:
                return cls(rank=int(os.environ[rank]), world=int(os.environ[world]))
        return cls()

    def order(self, count: int) -> list[int]:
        """Orders parts: those of this process, those of the next one, and so on.

        Example:
            >>> Share(rank=1, world=3).order(7)
            [1, 4, 2, 5, 0, 3, 6]
        """
        return sorted(range(count), key=lambda part: (part - self.rank) % self.world)


def device_of_environment(device: str) -> str:
    """Returns the GPU of this process under torchrun or srun for ``cuda``; other devices are returned unchanged."""
    local = next((int(os.environ[name]) for name in _LOCAL_RANKS if name in os.environ), None)
    if device != "cuda" or local is None:
        return device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # With --gpus-per-task, srun shows each task only its own GPU.
    return f"cuda:{local % len(visible.split(',')) if visible else local}"


def complete_parts(
    parts: Sequence[Path],
    make: Callable[[int], None],
    share: Share,
    *,
    done: Callable[[int], None] = lambda part: None,
) -> None:
    """Makes the parts that are missing, together with other processes, and returns when all are there.

    Args:
        parts: Files of the parts. A part whose file exists is complete.
        make: Makes the part of a number; writes its file atomically.
        share: Which parts this process begins with.
        done: Called once for every part, when its file exists. Defaults to nothing.
    """
    missing = share.order(len(parts))
    with Claims() as claims:
        for wait in (False, True):
            left = []
            for part in missing:
                if _is_made(parts[part], part, make, claims, wait=wait):
                    done(part)
                else:
                    left.append(part)
            missing = left


def _is_made(path: Path, part: int, make: Callable[[int], None], claims: Claims, *, wait: bool) -> bool:
    """Makes a part unless it exists or, without ``wait``, another process has claimed it; returns if it exists."""
    if path.exists():
        return True
    claim = path.with_name(f".{path.name}.claim")
    if not claims.take(claim, wait=wait):
        return False
    try:
        if not path.exists():  # nobody made it while this process waited for the claim
            make(part)
    finally:
        claims.release(claim)
    return True


def remove_claims(folder: Path) -> None:
    """Removes the files of claims that killed processes left in a folder of parts, all of which are complete."""
    with Claims() as claims:
        for claim in folder.glob(".*.claim"):
            if claims.take(claim, wait=False):
                claims.release(claim)
