"""What rank 0 knows of the other ranks of a run, and when that means that the run must end."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass

GRACE = 1.0
"""Seconds between an exception and the verdict: a rank that died meanwhile is the cause of it."""
SILENT = 5.0
"""Seconds without a word after which a rank does not answer, at least."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a rank is."""

    rank: int
    host: str
    pid: int
    update: int = 0
    """Updates behind it."""
    doing: str = "getting ready"
    progress: int = 0
    """Hooks that it has passed. All ranks pass the same ones, so the one with the lowest number is behind."""
    finished: bool = False
    """Whether training is over, and it may end at any time."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def where(self) -> str:
        """Where it is, in words."""
        return f"in update {self.update}, {self.doing}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why the run ends."""

    text: str
    culprits: list[int]
    """Ranks to blame."""


@dataclass
class Entry:
    """What is known of a rank; times are seconds."""

    standing: Standing
    heard: float
    """When it last said something."""
    lost: bool = False
    """Whether its connection is closed."""
    raised: str | None = None
    """The exception that it ends with."""
    raised_at: float = 0.0


class Roll:
    """The ranks of a run. Times are seconds of one clock, that of rank 0.

    Args:
        timeout: Seconds without an advance of any rank that count as hanging.
        now: Time.
    """

    def __init__(self, timeout: float, now: float) -> None:
        self.timeout = timeout
        self.entries: dict[int, Entry] = {}
        self.advanced = now

    def hear(self, standing: Standing, now: float) -> None:
        """Takes a rank's standing."""
        entry = self.entries.setdefault(standing.rank, Entry(standing, now))
        if standing.progress != entry.standing.progress:
            self.advanced = now
        entry.standing, entry.heard = standing, now

    def hear_exception(self, rank: int, exception: str, now: float) -> None:
        """Notes what a rank is about to end with."""
        entry = self.entries[rank]
        entry.raised, entry.raised_at = exception, now

    def lose(self, rank: int) -> None:
        """Notes that a rank's connection is closed."""
        self.entries[rank].lost = True

    def verdict(self, now: float, statuses: Mapping[int, int]) -> Verdict | None:
        """Whether, and why, the run ends.

        Args:
            now: Time.
            statuses: Exit statuses of ranks, as far as they are known; negative ones are signals.
        """
        return self._died(statuses) or self._failed(now) or self._hangs(now)

    def _died(self, statuses: Mapping[int, int]) -> Verdict | None:
        for rank, entry in sorted(self.entries.items()):
            ended = entry.lost or rank in statuses
            if ended and entry.raised is None and not entry.standing.finished:
                return died(entry.standing, ended_how(statuses[rank]) if rank in statuses else "its connection closed")
        return None

    def _failed(self, now: float) -> Verdict | None:
        raised = [entry for entry in self.entries.values() if entry.raised is not None]
        if not raised:
            return None
        first = min(raised, key=lambda entry: entry.raised_at)
        if now < first.raised_at + GRACE:
            return None
        return failed(first.standing, str(first.raised))

    def _hangs(self, now: float) -> Verdict | None:
        active = [entry for entry in self.entries.values() if not entry.standing.finished]
        if len(active) < 2 or now < self.advanced + self.timeout:
            return None
        silent = [entry for entry in active if now > entry.heard + max(SILENT, self.timeout / 2)]
        least = min(entry.standing.progress for entry in active)
        behind = silent or [entry for entry in active if entry.standing.progress == least]
        waited = f"no rank has advanced for {now - self.advanced:.0f} s"
        culprits = [entry.standing.rank for entry in behind]
        if len(behind) == len(active):
            text = f"all ranks hang {active[0].standing.where}, and none is behind the others: {waited}"
            return Verdict(text=text, culprits=culprits)
        how = "does not answer, last heard of" if silent else "hangs"
        names = ", ".join(f"{entry.standing} {how} {entry.standing.where}" for entry in behind)
        waiting = next(entry.standing for entry in active if entry not in behind)
        text = f"{names}: {waited}; rank {waiting.rank} waits {waiting.where}"
        return Verdict(text=text, culprits=culprits)


def died(standing: Standing, how: str) -> Verdict:
    """Verdict on a rank whose process is gone."""
    return Verdict(text=f"{standing} died: {how}; last heard of {standing.where}", culprits=[standing.rank])


def failed(standing: Standing, exception: str) -> Verdict:
    """Verdict on a rank that ends with an exception."""
    return Verdict(text=f"{standing} failed {standing.where}: {exception}", culprits=[standing.rank])


def ended_how(status: int) -> str:
    """What an exit status says; negative ones are signals."""
    if status >= 0:
        return f"it ended with status {status}"
    name = next((s.name for s in signal.Signals if s == -status), f"signal {-status}")
    return f"it was killed by {name}"
