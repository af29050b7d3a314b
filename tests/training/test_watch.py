"""Runs of several processes in which one dies, fails or hangs end at once, name it, and leave no process behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dalle_zoo.training import launcher, watch
from dalle_zoo.training.launcher import LAUNCHER
from dalle_zoo.training.line import MAX_LINE, Clock, Line
from dalle_zoo.training.rank_table import RankStatus, RankTable
from dalle_zoo.training.watch import RankWatch, Server

ROOT = Path(__file__).parents[2]
STEP = 4
"""Step in which the accident happens."""
TIMEOUT = 6.0

# `dalle-zoo fit`, in which one rank has an accident.
VICTIM = """
import os, signal, sys, time
from pathlib import Path
import torch
from dalle_zoo.cli.fit import ZooCLI
from dalle_zoo.cli.main import main
from dalle_zoo.training import StageModule

pids, accident, rank, update, *arguments = sys.argv[1:]
own = int(os.environ.get("LOCAL_RANK", 0))
(Path(pids) / str(own)).write_text(str(os.getpid()))

def befall(self, optimizer, step=StageModule.on_before_optimizer_step):
    step(self, optimizer)
    if (own, self.global_step) == (int(rank), int(update)):
        if accident == "raise":
            raise ValueError("a bad batch")
        if accident == "sleep":
            time.sleep(1000)
        if accident.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, accident))

def leave_work(self, after_fit=ZooCLI.after_fit):
    after_fit(self)
    if accident == "pending":  # threads of the process group are busy with it when all else is done
        for _ in range(200):
            torch.distributed.all_reduce(torch.ones(100000), async_op=True).get_future().then(lambda f: f.value())

StageModule.on_before_optimizer_step = befall
ZooCLI.after_fit = leave_work
if __name__ == "__main__":
    sys.exit(main(arguments))
"""


class Outcome:
    """A run with an accident.

    Args:
        folder: Empty folder.
        accident: "raise", "sleep", "pending", or the name of a signal.
        rank: Rank that has it.
        processes: Number of processes.
    """

    def __init__(self, folder: Path, accident: str, rank: int, processes: int = 2) -> None:
        (folder / "pids").mkdir()
        (folder / "victim.py").write_text(VICTIM)
        options = {"accelerator": "cpu", "strategy": "ddp", "devices": processes, "max_steps": 8}
        options |= {"limit_val_batches": 1, "enable_progress_bar": "false", "enable_model_summary": "false"}
        command = [sys.executable, "victim.py", "pids", accident, str(rank), str(STEP), "fit", "dvae/tiny"]
        command += ["--run", "run", "--watch.timeout", str(TIMEOUT)]
        command += [word for name, value in options.items() for word in (f"--trainer.{name}", str(value))]
        began = time.monotonic()
        with (folder / "said").open("w") as said:
            self.status = subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=said,
                stderr=said,
                timeout=300,
                check=False,
            ).returncode
        self.seconds = time.monotonic() - began
        self.pids = [int((folder / "pids" / str(number)).read_text()) for number in range(processes)]
        wait_for_the_end(self.pids)
        self.said = (folder / "said").read_text()
        self.reports = [line for line in self.said.splitlines() if "the run ends" in line]


def running(pid: int) -> bool:
    """Whether a process is there, and not only its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_the_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < deadline, f"{left} still run"
        time.sleep(0.1)


def who(rank: int, outcome: Outcome) -> str:
    return f"rank {rank} ({socket.gethostname()}, process {outcome.pids[rank]})"


@pytest.mark.slow
def test_killed_rank_is_reported(tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, "SIGKILL", 1)
    assert outcome.status == 1
    assert len(outcome.reports) == 1, outcome.said
    assert f"{who(1, outcome)} died: it was killed by SIGKILL; last heard of in step" in outcome.reports[0]
    # It may go on until it needs the other one.
    assert re.search(rf"This is rank 0, in step ({STEP}|{STEP + 1}), ", outcome.said)


@pytest.mark.slow
def test_killed_rank_0_is_reported(tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, "SIGKILL", 0, processes=3)
    assert outcome.status == -9
    assert len(outcome.reports) == 2, outcome.said
    assert all(f"{who(0, outcome)} died: its connection closed" in line for line in outcome.reports)
    assert "This is rank 1" in outcome.said
    assert "This is rank 2" in outcome.said


@pytest.mark.slow
def test_stopped_rank_is_reported_and_killed(tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, "SIGSTOP", 1, processes=3)
    assert outcome.status == 1
    assert len(outcome.reports) == 2, outcome.said
    assert all(f"{who(1, outcome)} does not answer, last heard of in step" in line for line in outcome.reports)


@pytest.mark.slow
def test_stopped_rank_0_is_reported_and_killed(tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, "SIGSTOP", 0)
    assert outcome.status == -9
    assert len(outcome.reports) == 1, outcome.said
    assert f"{who(0, outcome)} hangs: it has not answered for" in outcome.reports[0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_hanging_rank_is_reported_with_its_stack(rank: int, tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, "sleep", rank)
    assert outcome.status == 1
    assert len(outcome.reports) == 2, outcome.said
    expected = f"{who(rank, outcome)} hangs in step {STEP}, in the optimizer step: no rank has advanced for"
    assert all(expected in line and f"; rank {1 - rank} waits in" in line for line in outcome.reports)
    assert outcome.said.count("in befall") == 1, "its stack"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_failing_rank_is_reported_with_its_traceback(rank: int, tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, "raise", rank)
    assert outcome.status == 1
    assert len(outcome.reports) == 2, outcome.said
    what = f"{who(rank, outcome)} failed in step {STEP}, in the optimizer step: ValueError: a bad batch"
    assert all(what in line for line in outcome.reports)
    assert outcome.said.count("Traceback") == 1
    assert outcome.said.count("in befall") == 1


@pytest.mark.slow  # three processes for ten seconds
def test_successful_run_reports_nothing(tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, "pending", 0)
    assert outcome.status == 0, outcome.said
    assert not outcome.reports
    assert "This is rank" not in outcome.said
    assert "terminate" not in outcome.said, "a process group must not outlive the interpreter"
    assert (tmp_path / "run/model/dvae/model.safetensors").is_file()


def test_unknown_connections_are_rejected() -> None:
    server = Server("localhost", RankTable(60.0, time.monotonic()), {}, world_size=2)
    server.start()
    mine = {"token": server.token, "status": vars(RankStatus(rank=1, host="h", pid=1))}
    beyond = {"token": server.token, "status": vars(RankStatus(rank=2, host="h", pid=1))}
    hostile = [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"[" * 60_000 + b"\n", b"x" * (MAX_LINE + 2**16)]
    wrong = [mine | {"token": "0"}, mine | {"token": "\ud800"}, mine | {"token": [1]}, mine | {"status": 1}, beyond]
    for said in [*hostile, *(json.dumps(message).encode() + b"\n" for message in wrong)]:
        with socket.create_connection(("127.0.0.1", server.port)) as stranger:
            stranger.settimeout(10)
            with contextlib.suppress(OSError):  # it may be sent away before it has said everything
                stranger.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    assert not server.table.entries
    line = Line(socket.create_connection(("127.0.0.1", server.port)))
    line.send(mine)
    deadline = time.monotonic() + 10
    while 1 not in server.table.entries:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.table.entries[1].status == RankStatus(rank=1, host="h", pid=1)
    line.socket.close()
    server.join(10)
    assert not server.is_alive(), "a rank that is gone is a failure report"


def test_silent_connections_do_not_exhaust_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "STRANGERS", 2)
    server = Server("localhost", RankTable(60.0, time.monotonic()), {}, world_size=2)
    strangers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(6)]
    for _ in strangers:
        server._accept()
    server._send_strangers_away()
    assert len(server._strangers) == 4, "one per rank, and two more"
    strangers[0].settimeout(10)
    assert strangers[0].recv(1) == b"", "the oldest have left"
    monkeypatch.setattr(watch, "INTRODUCTION", -1.0)
    server._send_strangers_away()
    assert not server._strangers
    for stranger in strangers:
        stranger.close()
    server._socket.close()


def test_time_while_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    table, clock = RankTable(60.0, now[0]), Clock()
    for rank in range(2):
        table.hear(RankStatus(rank=rank, host="h", pid=rank), now[0])
    now[0] += 1
    assert clock.pause() == 0
    now[0] += 3600  # SIGSTOP, and an hour later SIGCONT
    table.pause(clock.pause())
    assert table.failure(now[0], {}) is None
    now[0] += 61
    assert table.failure(now[0], {}) is not None, "nobody has advanced for a minute of the run"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_ends_all_ranks_with_a_checkpoint(rank: int, tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, "SIGTERM", rank)
    assert outcome.status == 128 + signal.SIGTERM, outcome.said
    assert "ended by SIGTERM: the same command resumes" in outcome.said
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved[-1] == f"{STEP + 2:08d}.ckpt", "the ranks agree before the next step"
    assert not (tmp_path / "run/model").exists()


# A rank that is still connecting: no collective and no thread of the rank watch is there yet. The module is loaded as
# a file, since the package imports PyTorch, which takes seconds.
CONNECTING = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("launcher", sys.argv[1])
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)
with launcher.tied_to_launcher():
    print("waits", flush=True)
    time.sleep(100)
"""


def test_rank_ends_with_its_launcher() -> None:
    shell = f'{LAUNCHER}=$$ LOCAL_RANK=1 "$0" -c "$1" "$2" & echo $!; read _'
    process = subprocess.Popen(
        ["sh", "-c", shell, sys.executable, CONNECTING, str(launcher.__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    rank = int(process.stdout.readline())
    assert process.stdout.readline() == "waits\n"
    assert running(rank)
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    wait_for_the_end([rank])


def test_timeout_must_be_positive() -> None:
    with pytest.raises(ValueError, match="timeout must be above 0 seconds, got 0"):
        RankWatch(0)
