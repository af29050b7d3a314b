"""Parts that several processes make together: each is made once, and a lost process costs its part."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from dalle_zoo.claims import Claims
from dalle_zoo.sharing import Share, complete_parts, device_of_environment, remove_claims


@pytest.mark.parametrize(
    ("environment", "rank", "world", "device"),
    [
        ({}, 0, 1, "cuda"),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, 3, 8, "cuda:1"),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}, 2, 4, "cuda:0"),
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "7"},
            3,
            4,
            "cuda:0",
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, 0, 1, "cuda"),  # in a job script, outside of srun
    ],
)
def test_the_launcher_states_the_share(
    environment: dict[str, str], rank: int, world: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM", "CUDA_VISIBLE", "WORLD_SIZE")) or "RANK" in name:
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Share.of_environment() == Share(rank=rank, world=world)
    assert device_of_environment("cuda") == device
    assert device_of_environment("cpu") == "cpu"


def test_a_rank_outside_of_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        Share(rank=2, world=2)


def test_every_part_is_made_once(tmp_path: Path) -> None:
    parts = [tmp_path / f"{number:02d}" for number in range(20)]
    made: list[int] = []
    seen: list[list[int]] = [[], [], []]
    barrier = threading.Barrier(3)

    def make(number: int) -> None:
        made.append(number)
        parts[number].write_text(str(number))

    def work(rank: int) -> None:
        barrier.wait()
        complete_parts(parts, make, Share(rank=rank, world=3), done=seen[rank].append)
        assert all(part.exists() for part in parts), "a process returns when all parts exist"

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == list(range(20))
    assert [sorted(numbers) for numbers in seen] == [list(range(20))] * 3
    assert sorted(tmp_path.iterdir()) == parts


def test_the_part_of_a_lost_process_is_made_by_another(tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    lost, order = Claims(), []
    assert lost.take(tmp_path / ".a.claim", wait=False)

    def make(number: int) -> None:
        order.append(number)
        parts[number].touch()
        if number == 1:
            lost.release(tmp_path / ".a.claim")  # as the system does when the other process is killed

    complete_parts(parts, make, Share())
    assert order == [1, 0], "what others have claimed comes last"


def test_an_error_releases_the_claim(tmp_path: Path) -> None:
    def fail(number: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        complete_parts([tmp_path / "a"], fail, Share())
    assert not list(tmp_path.iterdir())


def test_claims_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.claim").touch()
    with Claims() as claims:
        claims.take(tmp_path / ".b.claim", wait=False)
        remove_claims(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".b.claim"], "a live process keeps its claim"
