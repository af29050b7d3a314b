"""Measures what the telemetry of a run costs: its share of the CPU time while `prior/composition-8x8` trains.

    python benchmarks/telemetry.py --steps 100 --every 10

The share is of CPU seconds of the process, which a busy machine does not change. Rows are logged five times as often
as by default, so the default costs less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dalle_zoo.cli.main import main as command
from dalle_zoo.files import write_json
from dalle_zoo.inspection import code_version
from dalle_zoo.training.strategy_hooks import StrategyHooks
from dalle_zoo.training.telemetry import Telemetry

RESULT = Path(__file__).parent / "results" / "telemetry.json"
LIMIT = 0.01
"""Largest share that is allowed."""


class Meter:
    """Adds up the CPU seconds of functions."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.ended = 0.0

    def around(self, owner: type, name: str) -> None:
        """Replaces a method by one that is timed."""
        function: Callable[..., Any] = getattr(owner, name)
        key = f"{owner.__name__}.{name}"
        self.spent[key] = 0.0

        def timed(*args: Any, **options: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **options)
            finally:
                self.ended = time.process_time()
                self.spent[key] += self.ended - began

        setattr(owner, name, timed)


def main() -> None:
    """Trains, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps [100]")
    parser.add_argument("--every", type=int, default=10, help="steps between rows [10]")
    options = parser.parse_args()
    meter = Meter()
    meter.around(Telemetry, "on_train_batch_end")
    meter.around(StrategyHooks, "gradient_norm")
    start = Telemetry.on_train_start
    began = 0.0

    def started(self: Telemetry, *args: Any) -> None:
        nonlocal began
        before = time.process_time()
        start(self, *args)
        began = time.process_time()
        meter.spent["Telemetry.on_train_start, once per run"] = began - before

    Telemetry.on_train_start = started  # type: ignore[method-assign]
    data = ["--model.image_tokenizer", "composition", "--data.text.tokenizer", "composition"]
    data += ["--trainer.devices", "1", "--trainer.strategy", "auto", "--samples.enabled", "false"]
    data += ["--trainer.max_steps", str(options.steps), "--trainer.log_every_n_steps", str(options.every)]
    with tempfile.TemporaryDirectory() as folder:
        assert command(["fit", "prior/composition-8x8", *data, "--run", f"{folder}/run"]) == 0
    per_step = {name: seconds for name, seconds in meter.spent.items() if "once" not in name}
    total = meter.ended - began
    share = sum(per_step.values()) / total
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "code_version": code_version(),
        "command": f"python benchmarks/telemetry.py --steps {options.steps} --every {options.every}",
        "threads": torch.get_num_threads(),
        "cpu_seconds": {"training": total, **meter.spent},
        "share": share,
        "limit": LIMIT,
    }
    write_json(RESULT, result)
    print(f"telemetry takes {100 * share:.3f} % of the CPU time of training (limit {100 * LIMIT:.0f} %)")
    assert share < LIMIT


if __name__ == "__main__":
    main()
