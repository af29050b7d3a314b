"""Table of the ranks of a run on rank 0, and the rules that decide when the run must end."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass

GRACE = 1.0
"""Seconds between an exception and the failure report: if a rank dies in this time, it is the cause."""
SILENT = 5.0
"""Minimum number of seconds without a message after which a rank counts as not answering."""


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """Status of a rank."""

    rank: int
    host: str
    pid: int
    step: int = 0
    """Optimizer steps completed."""
    doing: str = "getting ready"
    progress: int = 0
    """Hooks called so far. All ranks call the same ones, so the rank with the lowest number is behind."""
    finished: bool = False
    """Whether training is over, so that the process may end at any time."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def where(self) -> str:
        """Description of the step and the activity."""
        return f"in step {self.step}, {self.doing}"


@dataclass(frozen=True, kw_only=True)
class FailureReport:
    """Reason why the run ends."""

    text: str
    failed_ranks: list[int]
    """Ranks that failed."""


@dataclass
class Entry:
    """State of a rank; times are seconds."""

    status: RankStatus
    heard: float
    """Time of its last message."""
    lost: bool = False
    """Whether its connection was closed."""
    raised: str | None = None
    """The exception that ends it."""
    raised_at: float = 0.0


class RankTable:
    """States of the ranks of a run. Times are seconds of the clock of rank 0.

    Args:
        timeout: Seconds without progress of any rank after which the run counts as hanging.
        now: Current time.
    """

    def __init__(self, timeout: float, now: float) -> None:
        self.timeout = timeout
        self.entries: dict[int, Entry] = {}
        self.advanced = now

    def hear(self, status: RankStatus, now: float) -> None:
        """Records the status of a rank."""
        entry = self.entries.setdefault(status.rank, Entry(status, now))
        if status.progress != entry.status.progress:
            self.advanced = now
        entry.status, entry.heard = status, now

    def hear_exception(self, rank: int, exception: str, now: float) -> None:
        """Records the exception that is about to end a rank."""
        entry = self.entries[rank]
        entry.raised, entry.raised_at = exception, now

    def pause(self, seconds: float) -> None:
        """Ignores a time in which this process was stopped, since it received no messages in that time."""
        self.advanced += seconds
        for entry in self.entries.values():
            entry.heard += seconds
            entry.raised_at += seconds

    def lose(self, rank: int) -> None:
        """Records that the connection of a rank was closed."""
        self.entries[rank].lost = True

    def failure(self, now: float, exit_codes: Mapping[int, int]) -> FailureReport | None:
        """Returns why the run must end, or None.

        Args:
            now: Current time.
            exit_codes: Known exit statuses of ranks; negative ones are signals.
        """
        return self._died(exit_codes) or self._failed(now) or self._hangs(now)

    def _died(self, exit_codes: Mapping[int, int]) -> FailureReport | None:
        for rank, entry in sorted(self.entries.items()):
            ended = entry.lost or rank in exit_codes
            if ended and entry.raised is None and not entry.status.finished:
                return died(
                    entry.status, ended_how(exit_codes[rank]) if rank in exit_codes else "its connection closed"
                )
        return None

    def _failed(self, now: float) -> FailureReport | None:
        raised = [entry for entry in self.entries.values() if entry.raised is not None]
        if not raised:
            return None
        first = min(raised, key=lambda entry: entry.raised_at)
        if now < first.raised_at + GRACE:
            return None
        return failed(first.status, str(first.raised))

    def _hangs(self, now: float) -> FailureReport | None:
        active = [entry for entry in self.entries.values() if not entry.status.finished]
        if len(active) < 2 or now < self.advanced + self.timeout:
            return None
        silent = [entry for entry in active if now > entry.heard + max(SILENT, self.timeout / 2)]
        least = min(entry.status.progress for entry in active)
        behind = silent or [entry for entry in active if entry.status.progress == least]
        waited = f"no rank has advanced for {now - self.advanced:.0f} s"
        failed_ranks = [entry.status.rank for entry in behind]
        if len(behind) == len(active):
            text = f"all ranks hang {active[0].status.where}, and none is behind the others: {waited}"
            return FailureReport(text=text, failed_ranks=failed_ranks)
        how = "does not answer, last heard of" if silent else "hangs"
        names = ", ".join(f"{entry.status} {how} {entry.status.where}" for entry in behind)
        waiting = next(entry.status for entry in active if entry not in behind)
        text = f"{names}: {waited}; rank {waiting.rank} waits {waiting.where}"
        return FailureReport(text=text, failed_ranks=failed_ranks)


def died(status: RankStatus, how: str) -> FailureReport:
    """Returns the failure report for a rank whose process has ended."""
    return FailureReport(text=f"{status} died: {how}; last heard of {status.where}", failed_ranks=[status.rank])


def failed(status: RankStatus, exception: str) -> FailureReport:
    """Returns the failure report for a rank that ends with an exception."""
    return FailureReport(text=f"{status} failed {status.where}: {exception}", failed_ranks=[status.rank])


def ended_how(status: int) -> str:
    """Describes an exit status; negative ones are signals."""
    if status >= 0:
        return f"it ended with status {status}"
    name = next((s.name for s in signal.Signals if s == -status), f"signal {-status}")
    return f"it was killed by {name}"
