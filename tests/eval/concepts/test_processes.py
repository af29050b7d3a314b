"""Real processes that share a protocol of kind ``concepts`` write what one alone does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_torchrun_writes_the_result_of_one_process(toy: Path, model: Path, mobilenet: Path, tmp_path: Path) -> None:
    command = [
        "-m", "dalle_zoo", "eval", str(toy), "--model", str(model), "--evaluator", str(mobilenet), "--out",
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def run(folder: str, *launcher: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The result file, and the images of the report."""
        out = tmp_path / folder / "r.json"
        line = [sys.executable, *launcher, *command, str(out)]
        subprocess.run(line, env=environment, check=True, capture_output=True)
        result = json.loads(out.read_text())
        for name in ("date", "code_version"):  # which a commit in between changes
            result.pop(name)
        return result, {path.name: path.read_bytes() for path in out.with_suffix("").glob("*.png")}

    alone = run("alone")
    shared = run("shared", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert shared == alone
    assert len(alone[1]) == 6
    assert len(list((tmp_path / "shared/.cache").iterdir())) == 8  # chunks, and no claim is left
