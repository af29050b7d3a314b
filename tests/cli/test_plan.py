"""``dalle-zoo plan``: fast, without Lightning, and with explained errors."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dalle_zoo.cli.main import main
from dalle_zoo.cli.plan import memory_in

ROOT = Path(__file__).parents[2]
SECONDS = 1.0
"""Maximum CPU time of a plan after the import of PyTorch, on a busy machine."""
PAPER = ["plan", "prior/paper-12b", "--trainer.devices", "8", "--trainer.num_nodes", "128"]
LARGE = ["--model.config.image_height", "128", "--model.config.image_width", "128"]
"""A grid whose masks would take 277 MB each as a matrix of booleans."""


def say(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_plan_of_a_cpu_names_no_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, out, _ = say(["plan", "prior/composition", "--json", str(tmp_path / "plan.json")], capsys)
    memory = json.loads((tmp_path / "plan.json").read_text())["memory_bytes"]
    assert memory["host"]["processes"] == 2 * memory["total"]
    assert "1 x 2 CPU processes" in out
    assert "Muon momentum" in out
    assert "pass --gpu cpu" in out
    assert not re.search("GPU|CUDA|NCCL", out)


def test_plan_for_1024_gpus_imports_neither_lightning_nor_compiler() -> None:
    script = (
        "import sys; from dalle_zoo.cli.main import main; status = main(sys.argv[1:])\n"
        "sys.exit(status or bool({'lightning', 'torch._dynamo', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *PAPER, "--gpu", "v100-16gb"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "128 x 8 GPUs" in done.stdout


@pytest.mark.parametrize("grid", [[], LARGE], ids=["paper", "128x128"])
def test_plan_for_1024_gpus_is_fast(grid: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    taken = []
    for _ in range(3):
        start = time.process_time()
        status, out, _ = say([*PAPER, *grid, "--gpu", "v100-16gb"], capsys)
        taken.append(time.process_time() - start)
        assert status == 0
        assert "DOES NOT FIT" in out
    assert min(taken) < SECONDS


def test_plan_of_paper_setting(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sharded = ["--trainer.strategy", "hsdp_powersgd(rank=896)", "--trainer.precision=16-resblock"]
    sharded += ["--model.recompute", "true", "--gpu", "v100-16gb", "--json", str(tmp_path / "plan.json")]
    status, out, _ = say([*PAPER, *sharded, "--formats", "paper"], capsys)
    assert status == 0
    assert "FITS with" in out
    assert "85.9 %" in out
    assert "12,092,178,432" in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] is True
    assert plan["tokens_per_step"] == 1024 * 1280
    assert plan["powersgd"]["compression"] == pytest.approx(0.859, abs=5e-4)
    assert plan["memory_bytes"]["total"] < 16 * 2**30
    assert plan["run_seconds"] == pytest.approx(430_000 * plan["step_seconds"]["total"])
    status, out, _ = say([*PAPER, *sharded[:-2]], capsys)
    assert "DOES NOT FIT" in out
    assert "1. " in out


def test_suggestions_are_command_lines_that_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    base = [*PAPER, "--gpu-memory", "16"]
    assert say([*base, "--trainer.callbacks", "[]", "--json", str(file)], capsys)[0] == 0
    found = json.loads(file.read_text())["suggestions"]
    assert found
    for suggestion in found:
        words = [word for keys in suggestion["keys"] for word in shlex.split(keys)]
        status, out, _ = say([*base, "--trainer.callbacks", "[]", *words], capsys)
        assert (status, "FITS with" in out) == (0, True), words


def test_recipe_part_sets_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    part = tmp_path / "2x24gb.yaml"
    part.write_text("trainer: {devices: 2, num_nodes: 1, strategy: fsdp2, precision: bf16-mixed}\n")
    status, out, _ = say(["plan", "prior/tiny", "--parts", str(part)], capsys)
    assert status == 0
    assert "1 x 2 GPUs, fsdp2, numbers as bf16-mixed" in out
    assert "of 24" in out
    assert memory_in(["8x16gb", "cpu"]) == 16
    assert memory_in(["1gpu"]) is None


def test_plan_of_dvae(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = say(["plan", "dvae/paper", "--gpu", "v100-16gb"], capsys)
    assert status == 0
    assert "FITS" in out
    assert "97,616,006" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prior/papr-12b"], "unknown recipe 'prior/papr-12b'. Did you mean 'prior/paper-12b'"),
        (["prior/tiny", "--parts", "1gp"], "unknown recipe part '1gp'. Did you mean '1gpu'"),
        (["prior/tiny", "--gpu", "v100-16"], "unknown GPU 'v100-16'. Did you mean 'v100-16gb'"),
        (["prior/tiny", "--gpu-memory", "-1"], "--gpu-memory must be above 0, got -1"),
        (["prior/tiny", "--gpu-memory", "nan"], "--gpu-memory must be above 0, got nan"),
        (["prior/tiny", "--mfu", "0.5"], "--mfu is for times, which need the GPU: add --gpu NAME"),
        (["prior/tiny", "--gpu", "t4-16gb", "--mfu", "2"], "mfu must be in (0, 1], got 2.0"),
        (["prior/tiny", "--trainer.devcies", "2"], "--trainer.devcies changes nothing that a plan computes. Did you"),
        (["prior/tiny", "--trainer.devices"], "--trainer.devices has no value"),
        (["prior/tiny", "--trainer.devices", "--trainer.precision", "32-true"], "--trainer.devices has no value"),
        (["prior/tiny", "stray"], "'stray' belongs to no option"),
        (["prior/tiny", "--trainer.strategy", "hsdp(shard_size=3)"], "shard_size 3 does not divide 1 x 1 GPUs"),
        (["prior/tiny", "--formats", "papre"], "Did you mean 'paper'"),
        (["ranker/tiny"], "a plan supports PriorModule and DVAEModule"),
    ],
)
def test_mistakes_raise_with_explanation(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = say(["plan", *arguments], capsys)
    assert (status, out) == (2, "")
    assert message in err


def test_documentation_shows_printed_plan(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/design/planning.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```console\n\$ dalle-zoo (plan .+?)\n(.+?)\n```$", page, re.MULTILINE | re.DOTALL)
    assert len(shown) >= 2
    for command, output in shown:
        assert say(shlex.split(command), capsys)[1].rstrip() == output, f"write the output of {command} anew"


def test_existing_file_is_not_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("mine")
    command = ["plan", "prior/tiny", "--json", str(file)]
    status, _, err = say(command, capsys)
    assert (status, file.read_text()) == (2, "mine")
    assert "--overwrite" in err
    assert say([*command, "--overwrite"], capsys)[0] == 0
    assert json.loads(file.read_text())["recipe"] == "prior/tiny"
