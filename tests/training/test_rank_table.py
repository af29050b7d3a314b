"""The rank table: who is named when a run of several processes ends, and when none is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dalle_zoo.training.rank_table import GRACE, FailureReport, RankStatus, RankTable, ended_how

TIMEOUT = 60.0


def status(rank: int, progress: int = 10, **changes: object) -> RankStatus:
    return replace(
        RankStatus(rank=rank, host=f"node{rank}", pid=100 + rank, step=17, doing="in the forward pass"),
        progress=progress,
        **changes,
    )


def table(*progress: int) -> RankTable:
    """All ranks have been heard of at time 0."""
    found = RankTable(TIMEOUT, 0.0)
    for rank, passed in enumerate(progress):
        found.hear(status(rank, passed), 0.0)
    return found


def beat(found: RankTable, now: float, *silent: int) -> None:
    for rank, entry in found.entries.items():
        if rank not in silent:
            found.hear(entry.status, now)


def named(failure: FailureReport | None) -> list[int]:
    assert failure is not None
    return failure.failed_ranks


def test_healthy_ranks_are_not_reported() -> None:
    found = table(10, 10, 10)
    assert found.failure(TIMEOUT - 1, {}) is None
    found.hear(status(1, 11), TIMEOUT - 1)  # one that advances is enough: the others wait for something
    beat(found, 2 * TIMEOUT - 2)
    assert found.failure(2 * TIMEOUT - 2, {}) is None
    assert found.failure(2 * TIMEOUT, {}) is not None


def test_closed_connection_is_death_with_exit_status() -> None:
    found = table(10, 10)
    found.lose(1)
    failure = found.failure(0.1, {})
    assert failure is not None
    assert failure.text == (
        "rank 1 (node1, process 101) died: its connection closed; last heard of in step 17, in the forward pass"
    )
    failure = table(10, 10).failure(0.1, {1: -9})  # the connection may be open, in a worker of the data loader
    assert failure is not None
    assert "rank 1 (node1, process 101) died: it was killed by SIGKILL" in failure.text
    assert (ended_how(3), ended_how(-250)) == ("it ended with status 3", "it was killed by signal 250")


def test_finished_rank_may_exit() -> None:
    found = table(10, 10)
    found.hear(status(1, 11, finished=True), 1.0)
    found.lose(1)
    assert found.failure(2.0, {1: 0}) is None
    assert found.failure(10 * TIMEOUT, {1: 0}) is None, "the other one exports, and nobody waits"


def test_first_exception_is_reported() -> None:
    found = table(10, 10, 10)
    found.hear_exception(2, "ValueError: bad", 1.0)
    found.hear_exception(0, "RuntimeError: Connection closed by peer", 1.5)
    assert found.failure(1.0 + GRACE / 2, {}) is None
    failure = found.failure(1.0 + GRACE, {})
    assert failure == FailureReport(
        text="rank 2 (node2, process 102) failed in step 17, in the forward pass: ValueError: bad", failed_ranks=[2]
    )
    found.lose(2)  # it has ended with its exception
    assert named(found.failure(3.0, {2: 1})) == [2]


def test_death_explains_earlier_exception_of_another_rank() -> None:
    found = table(10, 10)
    found.hear_exception(0, "RuntimeError: Connection closed by peer", 1.0)
    found.lose(1)
    assert named(found.failure(1.1, {})) == [1]


def test_hanging_rank_is_the_one_behind() -> None:
    found = table(12, 10, 12)
    beat(found, TIMEOUT)
    failure = found.failure(TIMEOUT, {})
    assert failure is not None
    assert failure.failed_ranks == [1]
    assert failure.text == (
        "rank 1 (node1, process 101) hangs in step 17, in the forward pass: no rank has advanced for 60 s; rank 0 "
        "waits in step 17, in the forward pass"
    )


def test_unresponsive_rank_hangs_at_any_step() -> None:
    found = table(12, 10, 12)
    beat(found, TIMEOUT, 2)
    failure = found.failure(TIMEOUT, {})
    assert named(failure) == [2]
    assert failure is not None
    assert "rank 2 (node2, process 102) does not answer, last heard of in step 17" in failure.text


@pytest.mark.parametrize("silent", [(), (0, 1)])
def test_all_ranks_are_reported_if_none_is_behind(silent: tuple[int, ...]) -> None:
    found = table(10, 10)
    beat(found, TIMEOUT, *silent)
    failure = found.failure(TIMEOUT, {})
    assert named(failure) == [0, 1]
    assert failure is not None
    assert failure.text.startswith("all ranks hang in step 17")
