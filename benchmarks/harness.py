"""Times two or more paths alternately in one process and checks that their outputs are equal.

A result is a list of rows. Each row compares paths on the same inputs: their times, the ratio of the medians, the
target, and the difference of their outputs. On a shared machine wall time scatters, so one thread is measured in CPU
seconds of the process, which are reproducible; several threads, and a GPU, are measured in wall seconds.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dalle_zoo.files import write_json
from dalle_zoo.version import __version__

RESULTS = Path(__file__).parent / "results" / "speed"
ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Equality:
    """Difference of the outputs of two paths; a comparison is fair only if it is small."""

    what: str
    """"largest difference of the logits", "share of equal codes", …"""
    value: float
    limit: float | None = None
    """Largest value allowed for a difference; None if the value is only reported."""

    def __post_init__(self) -> None:
        if self.limit is not None and not self.value <= self.limit:
            raise AssertionError(
                f"{self.what} is {self.value}, expected at most {self.limit}: the comparison is not fair"
            )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    name: str
    """What was measured, with its shape."""
    path: str
    """The path of dalle-zoo, a key of ``seconds``."""
    against: str
    """The path it is compared with, a key of ``seconds``."""
    target: float | None
    """Smallest ratio to reach; None if there is no target."""
    ratio: float
    """Median time of ``against`` over that of ``path``."""
    equal: tuple[Equality, ...]
    seconds: Mapping[str, list[float]]
    """Time of every round, by path."""
    threads: int
    dtype: str = "float32"
    unit: str = "seconds"
    """Unit of the numbers in ``seconds``: "bytes" if memory is compared."""
    note: str = ""
    """Reason for a ratio below the target, or another remark."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Other figures: bytes, tokens per second, share of a ceiling."""


def interleaved(
    paths: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, device: str = "cpu", warm_up: int = 1
) -> dict[str, list[float]]:
    """Times every path, alternating between them.

    Args:
        paths: Functions to time, by name.
        rounds: Timed calls of each path.
        device: "cpu" or "cuda"; a GPU is synchronized before the clock is read.
        warm_up: Untimed calls of each path before the timed ones.

    Returns:
        Seconds of every call by path: CPU time with one thread, otherwise wall time.
    """
    cuda = device.startswith("cuda")
    clock = time.process_time if torch.get_num_threads() == 1 and not cuda else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(-warm_up, rounds):
        for name, work in paths.items():
            if cuda:
                torch.cuda.synchronize()
            start = clock()
            work()
            if cuda:
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append(clock() - start)
    return seconds


def compare(
    name: str,
    paths: Mapping[str, Callable[[], object]],
    *,
    path: str,
    against: str,
    target: float | None,
    equal: tuple[Equality, ...],
    rounds: int = ROUNDS,
    device: str = "cpu",
    **more: Any,
) -> Row:
    """Times paths alternately and returns a row; ``more`` sets other fields of the row."""
    seconds = interleaved(paths, rounds, device)
    ratio = statistics.median(seconds[against]) / statistics.median(seconds[path])
    row = Row(
        name=name, path=path, against=against, target=target, ratio=ratio, equal=equal, seconds=seconds,
        threads=torch.get_num_threads(), **more,
    )  # fmt: skip
    print(
        f"{name} ({row.dtype}, {row.threads} threads): {ratio:.2f}x" + (f" of {target}x" if target else ""), flush=True
    )
    for check in equal:
        print(f"  {check.what}: {check.value:.3g}", flush=True)
    return row


@dataclass(frozen=True, kw_only=True)
class Series:
    """Curves of one plot."""

    x: str
    """Label of the horizontal axis, with its unit."""
    y: str
    """Label of the vertical axis, with its unit."""
    lines: Mapping[str, list[tuple[float, float]]]
    """Points of every curve, by name."""
    logarithmic: bool = False
    """Whether both axes are logarithmic."""


def store(
    benchmark: str,
    command: str,
    rows: list[Row],
    device: str = "cpu",
    out: Path | None = None,
    series: Mapping[str, Series] | None = None,
) -> Path:
    """Writes ``results/speed/BENCHMARK_DEVICE_THREADS.json``.

    Args:
        benchmark: Name of the script.
        command: Command that runs the benchmark.
        rows: Measured rows.
        device: "cpu" or "cuda".
        out: Path of the file. Defaults to the path above.
        series: Curves to plot, by their title.
    """
    cuda = device.startswith("cuda")
    result = {
        "benchmark": benchmark,
        "command": command,
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "clock": "CPU seconds" if torch.get_num_threads() == 1 and not cuda else "wall seconds",
        "torch": torch.__version__,
        "dalle_zoo": __version__,
        "date": datetime.now(UTC).date().isoformat(),
        "rows": [asdict(row) for row in rows],
        "series": {title: asdict(curves) for title, curves in (series or {}).items()},
    }
    kind = "cuda" if cuda else f"cpu{torch.get_num_threads()}"
    path = out or RESULTS / f"{benchmark}_{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return path


def ceilings(device: str, copied: int = 2**30, size: int = 8192) -> dict[str, float]:
    """What a GPU reaches: bytes per second of a copy (read and written), FLOP a second of a large bfloat16 product.

    Args:
        device: "cpu" or "cuda".
        copied: Bytes of the copy.
        size: Rows and columns of the matrices.
    """
    big = torch.empty(copied, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device=device).unbind(0)
    paths = {"copy": lambda: other.copy_(big), "product": lambda: a @ b}
    seconds = {name: statistics.median(times) for name, times in interleaved(paths, device=device).items()}
    return {"bytes": 2 * big.numel() / seconds["copy"], "flop": 2 * size**3 / seconds["product"]}


def cpu_name() -> str:
    """What the processor calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
