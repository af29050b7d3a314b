"""Compares dalle-zoo with other packages and writes the tables of the page on speed: ``make bench-peers``.

    python -m benchmarks.peers --shapes S M        in the environment that the Makefile creates

All systems of a row run alternately in one process, on one thread, timed in CPU seconds. The floor is measured in the
same run: each weight matrix of dalle-zoo multiplied once per token, and nothing else. A system that fails is reported
with its error, and the others continue.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402 (a checkout runs uninstalled)
from harness import cpu_name, interleaved  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.peers import codecs  # noqa: E402
from benchmarks.peers.repairs import REPAIRS  # noqa: E402
from benchmarks.peers.systems import PEERS, SHAPES, DalleZoo, Floor, Shape, System  # noqa: E402
from dalle_zoo.files import read_json, write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "peers"
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
ROUNDING = 1e-4
"""Largest difference allowed between cached logits and those of a complete forward pass in float32."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the table."""

    shape: str
    name: str
    kind: str
    """"steps": steps at half of the image, after its first half; "training": forward and backward pass."""
    batch: int
    dtype: torch.dtype
    rounds: int
    steps: int = 0
    """Steps of a timed call."""

    @property
    def weights(self) -> torch.dtype:
        """Dtype of the weights: autocast trains those of float32."""
        return FLOAT32 if self.kind == "training" else self.dtype

    @property
    def unit(self) -> str:
        """Unit of a rate."""
        return "training steps/s" if self.kind == "training" else "image tokens/s"

    @property
    def amount(self) -> int:
        """Units of one timed call."""
        if self.kind == "training":
            return 1
        return self.batch * self.steps


ONE, BATCH = "1 image, at half of it", "16 images of one prompt, at half of them"
TRAINING = "training step, batch of 4"
TASKS = (
    Task(shape="S", name=ONE, kind="steps", batch=1, dtype=FLOAT32, rounds=3, steps=8),
    Task(shape="S", name=BATCH, kind="steps", batch=16, dtype=FLOAT32, rounds=3, steps=1),
    Task(shape="S", name=TRAINING, kind="training", batch=4, dtype=FLOAT32, rounds=2),
    Task(shape="S", name=f"{TRAINING}, autocast", kind="training", batch=4, dtype=BFLOAT16, rounds=2),
    Task(shape="S", name=ONE, kind="steps", batch=1, dtype=BFLOAT16, rounds=3, steps=8),
    Task(shape="S", name=BATCH, kind="steps", batch=16, dtype=BFLOAT16, rounds=3, steps=1),
    Task(shape="M", name=ONE, kind="steps", batch=1, dtype=FLOAT32, rounds=3, steps=1),
    Task(shape="M", name=ONE, kind="steps", batch=1, dtype=BFLOAT16, rounds=3, steps=1),
)


@dataclass
class Row:
    """Measured seconds of a task."""

    task: Task
    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def stored(self) -> dict[str, Any]:
        """The row as plain data."""
        task = self.task
        return {
            "shape": task.shape, "name": task.name, "unit": task.unit, "amount": task.amount,
            "dtype": str(task.dtype).removeprefix("torch."), "seconds": self.seconds, "errors": self.errors,
        }  # fmt: skip


@dataclass
class Bench:
    """Measures the tasks of a shape; systems are built once per dtype, and one that cannot be built is reported."""

    shape: Shape
    peers: Sequence[str]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, tasks: Sequence[Task]) -> None:
        """Stores a row per task. All systems of S fit into memory together; at M there is one peer at a time."""
        rows = [Row(task) for task in tasks]
        groups = [list(self.peers)] if self.shape.name == "S" else [[peer] for peer in self.peers]
        for dtype in dict.fromkeys(task.weights for task in tasks):
            ours = DalleZoo(self.shape, dtype)
            self.check(ours)
            for group in groups:
                systems: dict[str, System | Exception] = {"dalle-zoo": ours, "floor": Floor(ours)}
                systems |= {name: attempt(partial(self.built, PEERS[name], dtype)) for name in group}
                for row in rows:
                    if row.task.weights == dtype:
                        measure(row, systems)
                        store(self.shape.name, str(self.shape), [row.stored()], self.facts)
                del systems
                gc.collect()

    def built(self, kind: type[System], dtype: torch.dtype) -> System:
        """Builds and checks a system."""
        system = kind(self.shape, dtype)
        self.check(system)
        return system

    def check(self, system: System) -> None:
        """Records parameters and version, and compares cached with complete logits in float32."""
        if system.dtype != FLOAT32:
            return
        with torch.inference_mode():
            difference = system.cached_difference()
        if not difference <= ROUNDING:
            raise AssertionError(f"cached logits differ from complete ones by {difference}, expected {ROUNDING}")
        fact = {"package": system.release(), "parameters": system.parameters, "difference": difference}
        self.facts[system.name] = fact
        print(f"{system.name}: {fact}", flush=True)


def attempt(call: Callable[[], Any]) -> Any:
    """Returns what a call returns, or the exception that it raises."""
    try:
        return call()
    except Exception as error:  # it becomes a cell of the table
        return error


def measure(row: Row, systems: Mapping[str, System | Exception]) -> None:
    """Adds the seconds of some systems to a row."""
    task, paths = row.task, {}
    candidates = dict(systems)
    ours = systems["dalle-zoo"]
    if task.kind == "steps" and task.batch > 1 and isinstance(ours, DalleZoo):
        own = copy.copy(ours)
        own.own_prompts = True
        candidates["dalle-zoo, own prompts"] = own
    for name, system in candidates.items():
        if task.kind == "training" and isinstance(system, System) and not system.trains:
            continue
        found = system if isinstance(system, Exception) else attempt(partial(warm, system, task))
        if isinstance(found, Exception):
            row.errors[name] = f"{type(found).__name__}: {found}".splitlines()[0]
            print(f"  {name}: {row.errors[name]}", flush=True)
        else:
            paths[name] = found
    for name, seconds in interleaved(paths, rounds=task.rounds, warm_up=0).items():
        row.seconds.setdefault(name, []).extend(seconds)
    rates = {name: task.amount / statistics.median(seconds) for name, seconds in row.seconds.items()}
    shown = ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items())
    print(f"{task.shape}, {task.name}, {task.dtype}: {shown} {task.unit}", flush=True)


def warm(system: System, task: Task) -> Callable[[], object]:
    """Returns what is timed, after a first call of it, or of a training step with one image."""
    if task.kind == "training":
        if isinstance(system, Floor):
            return system.training(task.batch, task.dtype)
        train(system, 1, task.dtype)
        return partial(train, system, task.batch, task.dtype)
    codes = inference(system.start, task.batch, system.shape.image // 2)
    work = partial(advance, system, codes, task.steps)
    work()
    return work


@torch.inference_mode()
def inference(call: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Calls without gradients."""
    return call(*arguments)


@torch.inference_mode()
def advance(system: System, codes: Tensor, steps: int) -> None:
    """Samples some tokens; the codes that begin each call do not change the cost."""
    for _ in range(steps):
        codes = system.step(codes)


def train(system: System, batch: int, dtype: torch.dtype) -> None:
    """Runs a forward and a backward pass, and frees the gradients, of which one system has as many as weights."""
    system.network.train()
    with torch.autocast("cpu", BFLOAT16, enabled=dtype == BFLOAT16):
        loss = system.loss(batch)
    loss.backward()
    system.network.zero_grad(set_to_none=True)
    system.network.eval()


def main() -> int:
    """Runs the comparison, stores it, and renders the page."""
    parser = argparse.ArgumentParser(prog="make bench-peers", description="Compares dalle-zoo with other packages.")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "dvae"], default=[*SHAPES, "dvae"], help="(all)")
    parser.add_argument("--only", default="", help="rows whose name or precision contains this text (all)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name in options.shapes:
        if name == "dvae":
            store(name, "dVAE of the paper's size, images of 256 x 256", codecs.measure(), {})
            continue
        tasks = [task for task in TASKS if task.shape == name and options.only in f"{task.name}, {task.dtype}"]
        Bench(SHAPES[name], list(PEERS)).run(tasks)
    return subprocess.run([sys.executable, "benchmarks/report.py"], cwd=ROOT, check=False).returncode


def store(name: str, title: str, rows: list[dict[str, Any]], facts: dict[str, dict[str, Any]]) -> None:
    """Writes ``results/peers/NAME.json``. Rows that were not measured now remain if they are of the same machine."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    machine = {"device": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__}
    before = read_json(path) if path.exists() else {}
    if any(before.get(key) != value for key, value in machine.items()):
        before = {"rows": [], "systems": {}}
    known = {(row["name"], row["dtype"]): row for row in [*before["rows"], *rows]}
    result = {
        "shape": name, "title": title, "command": f'make bench-peers BENCH="--shapes {name}"', **machine,
        "load": os.getloadavg()[0], "date": datetime.now(UTC).date().isoformat(),
        "systems": before["systems"] | facts, "repairs": REPAIRS, "rows": list(known.values()),
    }  # fmt: skip
    write_json(path, result)


if __name__ == "__main__":
    sys.exit(main())
