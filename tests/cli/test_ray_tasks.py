"""Tasks of a Ray cluster: what they are given, what fails and what is tried again. A stand-in runs them in turn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dalle_zoo.cli.main import main
from dalle_zoo.cli.ray_tasks import LostError, run_task


class TaskError(Exception):
    """Stands for `ray.exceptions.RayTaskError`."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a stand-in for the package ray is asked for."""
    asked: list[Any] = []

    def remote(**options: Any) -> Any:
        asked.append(options)
        return lambda function: SimpleNamespace(remote=lambda *given: (function, given))

    def get(started: list[Any]) -> list[str]:
        try:
            return [function(*given) for function, given in started]
        except Exception as error:
            raise TaskError(error) from error

    fake = SimpleNamespace(
        init=lambda **options: asked.append(options), remote=remote, get=get, shutdown=lambda: asked.append("end"),
        exceptions=SimpleNamespace(RayTaskError=TaskError),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", fake)
    return asked


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Commands of the tasks, with the share that each is given."""
    started: list[Any] = []

    def run(command: list[str], *, cwd: str, env: dict[str, str], **options: Any) -> Any:
        started.append((command[3:], cwd, env["RANK"], env["WORLD_SIZE"]))
        status = {"killed": -9, "broken": 2}.get(command[-1], 0)
        return SimpleNamespace(
            returncode=status, stdout=f"rank {env['RANK']}\n", stderr="noise\ndalle-zoo filter: no\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    return started


def test_each_task_is_a_process_of_the_command(
    cluster: list[Any], processes: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ray", "-n", "3", "--gpus", "0.5", "filter", "raw", "--out", "x"]) == 0
    assert [entry[2:] for entry in processes] == [("0", "3"), ("1", "3"), ("2", "3")]
    assert {(*entry[0], entry[1]) for entry in processes} == {("filter", "raw", "--out", "x", str(Path.cwd()))}
    assert capsys.readouterr().out == "rank 0\n", "what one process says is enough"
    options = cluster[1]
    assert (options["num_cpus"], options["num_gpus"], options["max_retries"]) == (1, 0.5, 3)
    assert options["retry_exceptions"] == [LostError]
    assert cluster[-1] == "end"


def test_a_mistake_ends_the_command_and_a_signal_is_tried_again(
    cluster: list[Any], processes: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ray", "-n", "2", "filter", "broken"]) == 2
    assert capsys.readouterr().err == "dalle-zoo ray: dalle-zoo filter: no\n"
    assert cluster[-1] == "end"
    with pytest.raises(LostError, match="signal 9 ended task 1"):
        run_task(1, 2, ["filter", "killed"], ".")


def test_what_ray_cannot_run_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["ray", "-n", "0", "filter", "raw"]) == 2
    assert "--tasks must be an integer of at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ray", "-n", "2", "fit", "prior/tiny"])
    assert "unknown COMMAND 'fit'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["ray", "-n", "2", "filter", "raw"]) == 2
    assert "pip install 'dalle-zoo[ray]'" in capsys.readouterr().err
