"""What a stage gets and records, and how stages run: each in a process of its own, with a limit of time."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dalle_zoo.files import write_json

GRACE = 5.0
"""Seconds that a stage has to end after it was asked to."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One figure of a stage."""

    name: str
    """What was measured, with its shape."""
    value: float
    unit: str
    """"images/s", "of the floor", …"""
    wanted: str = ""
    """The value that it should have, such as "at least 0.6"; empty if there is none."""
    passed: bool | None = None
    """Whether it has this value; None if none is wanted."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """The measurements behind the figure."""


class Check:
    """What a stage knows, and where it records its findings.

    Args:
        device: "cuda", or "cpu" for a rehearsal.
        tiny: Whether to use shapes that a CPU runs in seconds.
        limits: Measured ceilings: ``bytes`` per second of a copy, and ``flop`` per second of a product.
        seconds: Time that the stage has.
        send: Passes a message on.
    """

    def __init__(
        self, device: str, tiny: bool, limits: dict[str, float], seconds: float, send: Callable[[Any], None]
    ) -> None:
        self.device, self.tiny, self.limits = device, tiny, limits
        self._ends, self._send = time.monotonic() + seconds, send

    @property
    def seconds_left(self) -> float:
        """Time that the stage still has."""
        return self._ends - time.monotonic()

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        least: float | None = None,
        most: float | None = None,
        **details: Any,
    ) -> None:
        """Records a figure; a value outside of ``least`` … ``most`` is reported as a failure."""
        named = (("at least", least), ("at most", most))
        limits = [f"{what} {limit:g}" for what, limit in named if limit is not None]
        within = (-math.inf if least is None else least) <= value <= (math.inf if most is None else most)
        finding = Finding(
            name=name, value=float(value), unit=unit, wanted=", ".join(limits), passed=within if limits else None,
            details=details,
        )  # fmt: skip
        self._send(asdict(finding))
        print(f"  {name}: {value:.4g} {unit}" + ("" if finding.passed in (None, True) else f" ({finding.wanted})"))

    def each(self, calls: Iterable[Callable[[], None]]) -> None:
        """Runs the parts of a stage; one that fails is recorded, and the others go on."""
        for call in calls:
            try:
                call()
            except Exception as error:
                self._send({"error": f"{_name(call)}: {_one_line(error)}", "trace": traceback.format_exc()})
                print(f"  failed: {_name(call)}: {_one_line(error)}")
            self._free()

    def _free(self) -> None:
        import gc

        import torch

        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _name(call: Callable[[], None]) -> str:
    if not isinstance(call, partial):
        return getattr(call, "__name__", "part")
    return " ".join([call.func.__name__, *(str(x) for x in call.args if isinstance(x, str | int | float | bool))])


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


Stage = Callable[[Check], None]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A stage of the check."""

    run: Stage
    limit: float
    """Most seconds that it may take."""
    about: str
    """What it measures, for the summary."""


def run_stage(name: str, entry: Entry, options: Mapping[str, Any], seconds: float, report: Callable[[], None],
              into: dict[str, Any]) -> None:  # fmt: skip
    """Runs a stage and collects what it records.

    Args:
        name: Name of the stage.
        entry: The stage.
        options: ``device``, ``tiny`` and ``limits`` of `Check`.
        seconds: Time after which it is stopped.
        report: Called after every change of ``into``.
        into: Receives ``status``, ``seconds``, ``findings`` and ``errors``.
    """
    # Imported modules are shared by forking; the parent never uses the GPU, whose driver does not survive a fork.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_process, args=(entry.run, dict(options), seconds, sender), name=name)
    start = time.monotonic()
    into |= {"about": entry.about, "status": "running", "seconds": 0.0, "findings": [], "errors": []}
    process.start()
    sender.close()
    status = "done"
    while True:
        left = start + seconds - time.monotonic()
        try:
            message = receiver.recv() if receiver.poll(max(left, 0)) else None
        except EOFError:
            break
        if message is None:
            status = f"stopped after its {seconds:.0f} s"
            _stop(process)
            break
        into["errors" if "error" in message else "findings"].append(message)
        into["seconds"] = time.monotonic() - start
        report()
    process.join()
    if status == "done" and process.exitcode:
        status = f"ended with exit status {process.exitcode}"
    into |= {"status": status, "seconds": time.monotonic() - start}
    report()


def _in_process(stage: Stage, options: dict[str, Any], seconds: float, sender: Connection) -> None:
    import torch

    os.setsid()  # so that its own processes can be stopped with it
    if options["device"] == "cpu":
        torch.set_num_threads(1)
    check = Check(**options, seconds=seconds, send=sender.send)
    try:
        stage(check)
    except Exception as error:
        sender.send({"error": _one_line(error), "trace": traceback.format_exc()})
        print(f"  failed: {_one_line(error)}", flush=True)
        raise SystemExit(1) from None


def _stop(process: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        process.join(GRACE)
        if process.exitcode is not None:
            return


def store(folder: Path, result: Mapping[str, Any], summary: str) -> None:
    """Writes ``gpu-check.json`` and ``gpu-check.md``, each atomically."""
    from dalle_zoo.files import atomic_write

    write_json(folder / "gpu-check.json", result)
    with atomic_write(folder / "gpu-check.md") as aside:
        aside.write_text(summary, encoding="utf-8")
