"""Terminates a distributed run with a clear error when a rank dies, fails or hangs.

Rank 0 keeps a rank table: every rank, including rank 0, is connected to a small server in rank 0 and reports its
status once per second. This uses neither collectives nor the GPU, so it works when those hang.

```
dies    the kernel closes the connections of a process that ends; those of a lost machine time out within 30 s
fails   a rank reports its exception before it ends
hangs   no rank advances; the report names the ranks that do not answer, or else those that are furthest behind
```
A time in which the process itself was stopped (SIGSTOP, a suspended machine) does not count.
All ranks print the failure report and end. They detect the loss of rank 0 by the same signs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dalle_zoo.training.line import BEAT, Clock, Line
from dalle_zoo.training.rank_table import SILENT, FailureReport, RankStatus, RankTable, died, failed

log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds that a rank waits for the report on its exception, and a launcher for its processes."""

INTRODUCTION = 10.0
"""Seconds in which a new connection must send its first message with the token of the run."""
STRANGERS = 64
"""Connections without a valid message that the server accepts, besides one per rank."""

Children = Mapping[int, subprocess.Popen[Any]]
"""Processes launched by this one, by rank."""


class RankWatch(Callback):
    """Ends the training of several processes with a message when one of them dies, fails or hangs.

    Args:
        timeout: Seconds without progress of any rank after which the run counts as hanging. A batch, including
            checkpoints and images that are written after it, must take less. Defaults to 600.
    """

    def __init__(self, timeout: float = 600.0) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
        self.timeout = timeout
        self._reporter: Reporter | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Connects all ranks."""
        if trainer.world_size == 1:
            return
        children = {trainer.global_rank + 1 + index: p for index, p in enumerate(launched(trainer.strategy.launcher))}
        status = RankStatus(rank=trainer.global_rank, host=socket.gethostname(), pid=os.getpid())
        address = getattr(trainer.strategy, "cluster_environment").main_address  # noqa: B009 (of parallel strategies)
        way: tuple[int, str, dict[str, Any]] = (0, "", {})
        if trainer.is_global_zero:
            server = Server(address, RankTable(self.timeout, time.monotonic()), children, trainer.world_size)
            server.start()
            way = (server.port, server.token, asdict(status))
        port, token, first = trainer.strategy.broadcast(way)
        try:
            line = Line(socket.create_connection((address, port), timeout=60))
        except OSError as error:
            log.warning("rank %d is not watched: it cannot reach %s:%d (%s)", status.rank, address, port, error)
            return
        self._reporter = Reporter(line, token, status, RankStatus(**first), self.timeout, children)
        self._reporter.start()

    def _report(self, trainer: Trainer, doing: str, finished: bool = False) -> None:
        """Records the activity of the rank, which the next beat reports."""
        if self._reporter is not None:
            old = self._reporter.status
            step, progress = trainer.global_step, old.progress + 1
            self._reporter.status = replace(old, step=step, doing=doing, progress=progress, finished=finished)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports that training begins."""
        self._report(trainer, "waiting for a batch")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Reports that a batch has been loaded."""
        self._report(trainer, "in the forward pass")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """Reports that the loss has been computed."""
        self._report(trainer, "in the backward pass")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports that the gradients have been computed."""
        self._report(trainer, "between the backward pass and the optimizer step")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Reports that the gradients are unscaled but not clipped yet."""
        self._report(trainer, "in the optimizer step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reports that the batch is finished."""
        self._report(trainer, "waiting for a batch")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Reports that a validation batch has been loaded."""
        self._report(trainer, f"in batch {batch_idx} of validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports that validation is over."""
        self._report(trainer, "waiting for a batch")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Reports that a checkpoint is about to be written."""
        self._report(trainer, "writing a checkpoint")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the process once it is known whether its exception is the cause or follows from another rank."""
        if self._reporter is None:
            return
        if isinstance(exception, KeyboardInterrupt | SIGTERMException):  # Lightning ends all processes
            self._report(trainer, f"interrupted by {type(exception).__name__}")
            self._reporter.leave()
        else:
            self._reporter.fail(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reports that this rank may end."""
        if self._reporter is not None:
            self._report(trainer, "finished", finished=True)
            self._reporter.leave()
            self._reporter = None


class Reporter(threading.Thread):
    """Reports the status of this rank to rank 0, and ends the process when a failure report arrives.

    Args:
        line: Connection to the server.
        token: Secret by which the server recognizes its ranks.
        status: Status of this rank.
        first: Status of rank 0.
        timeout: Seconds without a message of rank 0 after which it counts as hanging.
        children: Processes to end before this one.
    """

    def __init__(
        self, line: Line, token: str, status: RankStatus, first: RankStatus, timeout: float, children: Children
    ) -> None:
        super().__init__(name="rank-watch-reporter", daemon=True)
        self.line, self.token, self.timeout, self.children = line, token, timeout, children
        self.status, self.first = status, first
        self._left = False
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Reports and listens until the run ends."""
        sent, heard, clock = 0.0, time.monotonic(), Clock()
        while not self._left:
            heard += clock.pause()
            if time.monotonic() >= sent + BEAT:
                self._send_status()
                sent = time.monotonic()
            messages = self.line.receive()
            if self._left or (messages is None and self.first.finished):
                return
            if messages is None:
                self._end(died(self.first, "its connection closed"))
            for message in messages:
                heard = time.monotonic()
                if "first" in message:
                    self.first = RankStatus(**message["first"])
                if "failure report" in message:
                    self._end(FailureReport(**message["failure report"]))
            silence = time.monotonic() - heard
            if silence > max(SILENT, self.timeout) and not self.first.finished:
                text = f"{self.first} hangs: it has not answered for {silence:.0f} s; last heard of {self.first.where}"
                self._end(FailureReport(text=text, failed_ranks=[0]), stopped=self.first.pid)

    def leave(self) -> None:
        """Reports the status for the last time; after that, the rank may exit."""
        self._left = True
        self._send_status()

    def fail(self, exception: BaseException) -> NoReturn:
        """Ends the process because of an exception, after the failure report."""
        self._failure = exception
        summary = "".join(traceback.format_exception_only(exception)).strip()
        self._send_status(raised=summary)
        self.join(PATIENCE)  # it ends the process
        self._end(failed(self.status, summary))

    def _send_status(self, **more: str) -> None:
        self.line.send({"token": self.token, "status": asdict(self.status), **more})

    def _end(self, failure: FailureReport, stopped: int | None = None) -> NoReturn:
        """Prints the failure report and ends the process, even if its other threads are blocked.

        Args:
            failure: Failure report.
            stopped: Process that cannot receive the report; it is killed if it has launched this one.
        """
        own = self.status.rank
        say(f"dalle-zoo: the run ends: {failure.text}\nThis is rank {own}, {self.status.where}.")
        if self._failure is not None:
            lines = traceback.format_exception(self._failure)
            say("".join(lines) if own in failure.failed_ranks else f"It then failed, too: {lines[-1]}")
        elif own in failure.failed_ranks:
            faulthandler.dump_traceback(2)
        deadline = time.monotonic() + PATIENCE
        for child in self.children.values():  # they end by the same failure report, unless they are blocked
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
        if os.getppid() == stopped:
            os.kill(stopped, signal.SIGKILL)
        sys.stdout.flush()
        os._exit(1)


class Server(threading.Thread):
    """Updates the rank table in a thread of rank 0, and sends the failure report to all ranks.

    Args:
        address: Address of this machine for the other ranks.
        table: The rank table.
        children: Processes whose exit status is available.
        world_size: Number of ranks.
    """

    def __init__(self, address: str, table: RankTable, children: Children, world_size: int) -> None:
        super().__init__(name="rank-watch-server", daemon=True)
        self.table, self.children, self.world_size = table, children, world_size
        self.token = secrets.token_hex(16)
        here = address in ("127.0.0.1", "localhost")
        self._socket = socket.create_server(("127.0.0.1" if here else "", 0), backlog=4096)
        self.port: int = self._socket.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._lines: dict[int, Line] = {}
        self._strangers: dict[Line, float] = {}
        """Connections that have not sent the token yet, and when they were opened, oldest first."""
        os.register_at_fork(after_in_child=self._socket.close)

    def run(self) -> None:
        """Listens until there is a failure report."""
        clock = Clock()
        while True:
            for key, _ in self._selector.select(BEAT / 4):
                if key.data is None:
                    self._accept()
                else:
                    self._listen(key.data)
            self.table.pause(clock.pause())
            self._send_strangers_away()
            exit_codes = {rank: child.returncode for rank, child in self.children.items() if child.poll() is not None}
            failure = self.table.failure(time.monotonic(), exit_codes)
            if failure is not None:
                for _, line in sorted(self._lines.items(), reverse=True):  # this process receives it last, and ends
                    line.send({"failure report": asdict(failure)})
                return

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the peer has left already, or there are no file descriptors left
            line = Line(self._socket.accept()[0])
            self._selector.register(line.socket, selectors.EVENT_READ, line)
            self._strangers[line] = time.monotonic()

    def _send_strangers_away(self) -> None:
        """Closes connections that do not introduce themselves, and the oldest if there are too many."""
        excess = len(self._strangers) - self.world_size - STRANGERS
        for number, (line, since) in enumerate(list(self._strangers.items())):
            if number < excess or time.monotonic() > since + INTRODUCTION:
                self._close(line)

    def _listen(self, line: Line) -> None:
        messages = line.receive()
        for message in messages or ():
            status = self._status(message)
            if status is None:  # not a rank of this run
                messages = None
                break
            self._strangers.pop(line, None)
            line.rank = status.rank
            self._lines[status.rank] = line
            self.table.hear(status, time.monotonic())
            if "raised" in message:
                self.table.hear_exception(status.rank, str(message["raised"]), time.monotonic())
            if status.rank == 0:
                for other in self._lines.values():
                    other.send({"first": message["status"]})
        if messages is None:
            self._close(line)

    def _status(self, message: dict[str, Any]) -> RankStatus | None:
        """Returns the status in a message; None without the token, or if it is no status of a rank of this run."""
        token, status = message.get("token"), message.get("status")
        if not isinstance(token, str):
            return None
        received = token.encode(errors="replace")  # JSON from a stranger can hold half of a surrogate pair
        if not secrets.compare_digest(received, self.token.encode()):
            return None
        try:
            found = RankStatus(**status)  # type: ignore[arg-type]
        except TypeError:
            return None
        return found if isinstance(found.rank, int) and 0 <= found.rank < self.world_size else None

    def _close(self, line: Line) -> None:
        self._strangers.pop(line, None)
        self._selector.unregister(line.socket)
        line.socket.close()
        if line.rank is not None and self._lines.get(line.rank) is line:
            if child := self.children.get(line.rank):  # its exit status says more
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(BEAT)
            del self._lines[line.rank]
            self.table.lose(line.rank)


def launched(launcher: object) -> list[subprocess.Popen[Any]]:
    """Returns the processes that Lightning has launched, and hides them from Lightning's own observer.

    The observer checks its list every 5 s and, when a process has failed, kills all others without a message.
    """
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    processes = launcher.procs
    launcher.procs = list(processes)  # Lightning ends these after an interrupt
    processes.clear()
    return launcher.procs


def say(text: str) -> None:
    """Prints to stderr, below a progress bar if there is one."""
    sys.stderr.write(f"\n{text.rstrip()}\n")
    sys.stderr.flush()
