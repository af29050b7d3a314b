"""Evaluation in real processes: interrupted, and shared by several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROTOCOL = """
name: toy
title: made-up images
dataset: {coco: val2014}
captions: {rule: unique}
image: {crop: center, size: 16}
sampling: {candidates: 2, curve: [1], chunk: 1}
metrics: [r_precision, frechet]
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def command(make: Any, model: Path, mobilenet: Path, tmp_path: Path) -> list[str]:
    coco = make.coco("val2014", {i: [f"thing {i}, side {c}" for c in range(10)] for i in range(1, 5)})
    (tmp_path / "toy.yaml").write_text(PROTOCOL)
    return [
        "dalle_zoo", "eval", str(tmp_path / "toy.yaml"), "--model", str(model),
        "--data", str(coco), "--network", f"mobilenet={mobilenet}",
    ]  # fmt: skip


def start(command: list[str], out: Path, *launcher: str, **environment: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    line = [sys.executable, *launcher, "-m", *command, "--out", str(out)]
    return subprocess.Popen(line, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def result(out: Path) -> dict[str, Any]:
    """Result file without fields that depend on time or checkout."""
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    assert found.pop("speed")["extractors_only_images_per_second"] > 0
    return {name: value for name, value in found.items() if name not in ("date", "code_version", "run")}


def scores(out: Path) -> Any:
    return result(out)["scores"]


def test_interrupted_and_shared_runs_equal_an_uninterrupted_run(command: list[str], tmp_path: Path) -> None:
    alone, killed, shared = (tmp_path / name for name in ("alone", "killed", "shared"))
    assert start(command, alone).wait() == 0
    assert len(scores(alone)) == 4  # the distance of two networks for two numbers of candidates

    process = start(command, killed)
    while len(list(killed.rglob("*-*/*.safetensors"))) < 15:  # 4 of the reference per network, then generated
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "result.json").exists()
    assert start(command, killed).wait() == 0
    assert scores(killed) == scores(alone)

    world = [start(command, shared, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert [process.wait() for process in world] == [0, 0]
    assert scores(shared) == scores(alone)


def test_torchrun_equals_one_process(command: list[str], tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert start(command, alone).wait() == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert start(command, shared, *launcher).wait() == 0
    assert result(shared) == result(alone)
    for name in ("captions.jsonl", "samples.png"):
        assert (shared / name).read_bytes() == (alone / name).read_bytes()


def test_torchrun_and_batch_size_do_not_change_a_comparison(model: Path, make: Any, tmp_path: Path) -> None:
    """60 captions are two chunks of images, so each process generates some."""
    make.text(tmp_path / "prompts.txt", *(f"thing {number}" for number in range(60)))
    for number in range(5):
        make.image(tmp_path / f"real/{number}.png", (20, 20), seed=number)
    command = [
        "dalle_zoo", "compare", str(model), str(tmp_path / "real"), "--prompts", str(tmp_path / "prompts.txt"),
        "--metrics", "frechet:pixels,vendi:pixels",
    ]  # fmt: skip
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    outs = {name: tmp_path / name for name in ("alone", "batches", "shared")}
    assert start(command, outs["alone"]).wait() == 0
    assert start([*command, "--batch-size", "7"], outs["batches"]).wait() == 0
    assert start(command, outs["shared"], *launcher).wait() == 0
    assert result(outs["shared"]) == result(outs["batches"]) == result(outs["alone"])
    assert not list(outs["shared"].rglob("*.claim"))


def test_torchrun_shares_several_groups(toy: Path, model: Path, mobilenet: Path, tmp_path: Path) -> None:
    command = ["dalle_zoo", "eval", str(toy), "--model", str(model), "--network", f"mobilenet={mobilenet}"]

    def run(folder: str, *launcher: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        out = tmp_path / folder
        assert start(command, out, *launcher).wait() == 0
        return result(out), {path.name: path.read_bytes() for path in out.glob("*.png")}

    alone = run("alone")
    shared = run("shared", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert shared == alone
    assert len(alone[1]) == 6
    assert not list((tmp_path / "shared").rglob("*.claim"))
