"""Training runs from shards: interrupted runs give the same weights, and outputs are complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from PIL import Image
from safetensors.torch import load_file

from dalle_zoo.cli.fit import ZooCLI
from dalle_zoo.cli.main import main
from dalle_zoo.cli.runs import read_curves
from dalle_zoo.plots import CURVES, read_rows
from dalle_zoo.training.integrity import list_checkpoints

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 13, 3
KILLED_AT = {"dvae": 8, "prior": 9}
"""Step in which a run dies: the dVAE's in the middle of an epoch and of two states, the prior's while a state is
being written."""
RATE = {"peak": 2.0e-2, "warmup_steps": 2}

# Every victim is a fork of one process that has imported what they need, and kills itself where it is told to. The
# signal cannot be caught, so what is on disk is what any other SIGKILL would leave.
VICTIMS = """
import io, json, os, signal, sys
import torch
from dalle_zoo.cli.main import main
from dalle_zoo.training import StageModule
import dalle_zoo.cli.fit

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_before(update):
    feed = StageModule.on_before_optimizer_step
    def step(self, optimizer):
        feed(self, optimizer)
        if self.global_step == update:
            die()
    StageModule.on_before_optimizer_step = step

def die_writing(update):
    save = torch.save
    def half(state, file):
        complete = io.BytesIO()
        save(state, complete)
        if state.get("global_step") == update:
            file.write_bytes(complete.getvalue()[: len(complete.getvalue()) // 2])
            die()
        file.write_bytes(complete.getvalue())
    torch.save = half

threads, victims = json.loads(sys.argv[1])
for how, update, arguments in victims:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(threads)
        {"before": die_before, "writing": die_writing}[how](update)
        main(arguments)
        os._exit(1)  # it should be dead
    assert os.WIFSIGNALED(status := os.waitpid(child, 0)[1]), "not killed"
    assert os.WTERMSIG(status) == signal.SIGKILL
"""


class Run(NamedTuple):
    """The same recipe, left alone and killed."""

    stage: str
    alone: Path
    killed: Path
    left: dict[str, Path]
    """What the kill left of the states, by name."""


def trainer(**options: Any) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 2,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {
                "class_path": "WeightEMA",
                "init_args": {"decay": 0.8},
            }
        ],
        **options,
    }


def dvae_recipe(shards: Path) -> dict[str, Any]:
    size = {"image_size": 16, "width": 4, "num_groups": 3, "blocks_per_group": 1, "decoder_stem": 4}
    return {
        "model": {
            "class_path": "DVAEModule",
            "init_args": {
                "config": {**size, "codebook_size": 8},
                "kl_weight": {"start": 0.0, "end": 1.0, "steps": 10},
                "temperature": {"start": 1.0, "end": 0.1, "steps": 10},
                "learning_rate": {**RATE, "decay": "cosine", "decay_steps": 20},
                # The state at step 6, from which the killed run goes on, holds half of the features.
                "warm_start": {"steps": 8, "gather": 4},
            },
        },
        "data": {
            "class_path": "ImageDataModule",
            "init_args": {
                "train": str(shards), "val": str(shards), "image_size": 16, "transform": "dvae", "batch_size": 4,
            },
        },
        "trainer": trainer(),
        "checkpoint": {"every": EVERY},
    }  # fmt: skip


def prior_config() -> dict[str, Any]:
    grid = {"image_height": 4, "image_width": 4, "codebook_size": 8}
    network = {"width": 16, "num_layers": 2, "num_heads": 2, "masks": "row, column"}
    return {"text_length": 12, "text_vocab": 280, **grid, **network}


def prior_recipe(codes: Path, parts: Path) -> dict[str, Any]:
    plateau = {"decay": "plateau", "plateau_window": 2, "plateau_patience": 1, "plateau_threshold": 0.5}
    return {
        "model": {
            "class_path": "PriorModule",
            "init_args": {
                "config": prior_config(),
                "image_tokenizer": str(parts),
                "caption_dropout": 0.3,
                "learning_rate": {**RATE, **plateau},
                "num_samples": 2,
            },
        },
        "data": {
            "class_path": "CodeDataModule",
            "init_args": {
                "train": str(codes),
                "val": str(codes),
                "text": {"tokenizer": str(parts), "length": 12, "bpe_dropout": 0.2, "caption": "random"},
                "batch_size": 2,
            },
        },
        # Eleven batches an epoch are five steps of two and one of one.
        "trainer": trainer(accumulate_grad_batches=2, precision="bf16-mixed"),
        "checkpoint": {"every": EVERY},
    }


@pytest.fixture(scope="session")
def recipes(shards: Path, parts: Path, codes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    for stage, recipe in (("dvae", dvae_recipe(shards)), ("prior", prior_recipe(codes, parts))):
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
    return {stage: folder / f"{stage}.yaml" for stage in ("dvae", "prior")}


@pytest.fixture(scope="session")
def runs(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    victims = [
        (how, KILLED_AT[stage], ["fit", str(recipes[stage]), "--run", str(folder / f"{stage}-killed")])
        for stage, how in (("dvae", "before"), ("prior", "writing"))
    ]
    done = subprocess.run(
        [sys.executable, "-c", VICTIMS, json.dumps([torch.get_num_threads(), victims])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for stage, recipe in recipes.items():
        alone, killed = folder / f"{stage}-alone", folder / f"{stage}-killed"
        left = {path.name: path for path in (killed / "checkpoints").iterdir()}
        assert not (killed / "model").exists()
        for run in (alone, killed):
            assert main(["fit", str(recipe), "--run", str(run)]) == 0
        found[stage] = Run(stage, alone, killed, left)
    return found


@pytest.fixture(params=["dvae", "prior"])
def run(request: pytest.FixtureRequest, runs: dict[str, Run]) -> Run:
    return runs[request.param]


def state(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Plain data and tensors are equal bit by bit."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for name in left:
            assert_same(left[name], right[name], f"{where}.{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for number, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def test_interrupted_run_ends_with_equal_bits(run: Run) -> None:
    weights = [folder / "model" / run.stage / "model.safetensors" for folder in (run.alone, run.killed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    last = [state(folder / "checkpoints" / f"{STEPS:08d}.ckpt") for folder in (run.alone, run.killed)]
    assert last[0]["global_step"] == STEPS
    assert last[0]["optimizer_states"][0]["state"]
    for name in ("state_dict", "average", "optimizer_states", "lr_schedulers"):
        assert_same(last[0][name], last[1][name], name)
    loader = [s["loops"]["fit_loop"]["state_dict"]["combined_loader"] for s in last]
    assert loader[0], "the place in the data is part of the state"
    assert_same(loader[0], loader[1], "loader")


def test_kills_happen_at_intended_steps(runs: dict[str, Run]) -> None:
    # An epoch of the dVAE has five steps, so its run dies in the third of the second epoch.
    assert sorted(runs["dvae"].left) == ["00000003.ckpt", "00000006.ckpt"]
    # Half of a checkpoint is next to its place, under a name that nothing picks.
    assert sorted(runs["prior"].left) == [".00000009.ckpt.writing", "00000003.ckpt", "00000006.ckpt"]


def test_partial_checkpoint_is_never_used_and_removed(runs: dict[str, Run], tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert list_checkpoints(tmp_path / "checkpoints") == []
    (tmp_path / "checkpoints" / ".00000009.ckpt.writing").mkdir()
    for name in (".00000009.ckpt.writing/0123", "00000006.ckpt", "00000003.ckpt"):
        (tmp_path / "checkpoints" / name).write_bytes(b"")
    found = list_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in found] == ["00000003.ckpt", "00000006.ckpt"]
    # The newest two are retained; the partial one was completed and removed later.
    for run in runs.values():
        for folder in (run.alone, run.killed):
            assert {path.name for path in (folder / "checkpoints").iterdir()} == {"00000012.ckpt", "00000013.ckpt"}


def test_exported_weights_are_averaged(run: Run) -> None:
    exported = load_file(run.alone / "model" / run.stage / "model.safetensors")
    last = state(run.alone / "checkpoints" / f"{STEPS:08d}.ckpt")
    differ = 0
    for name, tensor in exported.items():
        assert torch.equal(tensor, last["average"][f"net.{name}"])
        differ += not torch.equal(tensor, last["state_dict"][f"net.{name}"])
    assert differ > len(exported) // 2


def test_plateau_schedule_halves_and_resumes(runs: dict[str, Run]) -> None:
    scheduler = state(runs["prior"].alone / "checkpoints" / f"{STEPS:08d}.ckpt")["lr_schedulers"][0]
    # Eleven steps behind the warm-up are five windows of two: the first is the best, each further one halves.
    assert (scheduler["last_epoch"], scheduler["halvings"], scheduler["loss_count"]) == (STEPS, 4, 1)
    rates = read_curves(runs["prior"].alone)["schedule/learning_rate"]
    assert rates[0] == pytest.approx(RATE["peak"] / 2)
    assert rates[1] == pytest.approx(RATE["peak"])
    assert rates[STEPS - 1] == pytest.approx(RATE["peak"] / 16)


def test_curves_of_interrupted_run_continue(run: Run) -> None:
    alone, killed = curves(run.alone), curves(run.killed)
    assert rows_of(run.killed) == rows_of(run.alone), "one file, in which no row is twice"
    wanted_of_speed = {"speed/steps_per_second", "speed/tokens_per_second", "speed/tflops", "speed/data_wait"}
    assert wanted_of_speed | {"memory/gib"} <= read_curves(run.alone).keys()
    wanted = {"train/loss", "val/loss", "schedule/learning_rate", "train/gradient_norm"}
    if run.stage == "dvae":
        wanted |= {"val/psnr", "val/codes_used", "schedule/temperature", "schedule/kl_weight"}
    else:
        wanted |= {"val/image_bits", "train/text_loss"}
    assert wanted <= alone.keys()
    assert list(alone["train/loss"]) == list(range(STEPS))
    assert killed == alone


def of_machine(name: str) -> bool:
    """Whether a curve measures the machine, and so differs between runs."""
    return name.startswith(("speed/", "memory/"))


def curves(run: Path) -> dict[str, dict[int, float]]:
    return {name: points for name, points in read_curves(run).items() if not of_machine(name)}


def rows_of(run: Path) -> list[dict[str, str]]:
    assert [path.name for path in (run / "metrics").iterdir()] == ["metrics.csv"]
    rows = read_rows(run / CURVES)[1]
    return [{name: value for name, value in row.items() if not of_machine(name)} for row in rows]


def test_images_are_written_at_every_validation(run: Run) -> None:
    name = {"dvae": "reconstructions", "prior": "samples"}[run.stage]
    for folder in (run.alone, run.killed):
        files = sorted((folder / "images").iterdir())
        assert [file.name for file in files] == [f"{name}-{step:08d}.png" for step in with_images(run.stage)]
        with Image.open(files[0]) as image:
            # Images of 16 with rims of 2: two rows of four; two captions, each above two images, eight times as large.
            assert image.size[0] == {"dvae": 74, "prior": 8 * 38 * 2}[run.stage]


def with_images(stage: str) -> list[int]:
    """Steps after which a validation falls: one every four batches, and two batches are a step of the prior."""
    if stage == "dvae":
        return [4, 8, 12]
    return [batch // 11 * 6 + batch % 11 // 2 for batch in range(4, 25, 4)]  # 11 batches an epoch are 6 steps


def test_plot_writes_figure_of_curves(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "curves.png"
    assert main(["plot", str(runs["dvae"].killed), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]


def test_incomplete_line_of_curves_is_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "metrics" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("epoch,step,train/loss\n0,10,0.5\n0,11,0.4\n0,12,0.")
    assert read_curves(tmp_path) == {"train/loss": {10: 0.5, 11: 0.4}}


def test_finished_run_resumes_without_messages(
    runs: dict[str, Run], recipes: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = runs["dvae"].alone
    weights = folder / "model" / "dvae" / "model.safetensors"
    before, curves = weights.read_bytes(), read_curves(folder)
    assert main(["fit", str(recipes["dvae"]), "--run", str(folder)]) == 0
    assert weights.read_bytes() == before
    assert read_curves(folder) == curves
    said = capfd.readouterr()
    assert "error" not in (said.out + said.err).lower()
    assert "Warning" not in said.err


def test_more_steps_continue_finished_run(recipes: dict[str, Path], runs: dict[str, Run], tmp_path: Path) -> None:
    # In three pieces, the first of which ends between two states and in the middle of an epoch.
    arguments = ["fit", str(recipes["prior"]), "--run", str(tmp_path / "run"), "--trainer.max_steps"]
    assert main([*arguments, "7"]) == 0
    states = tmp_path / "run" / "checkpoints"
    before = (states / "00000007.ckpt").read_bytes()
    assert main([*arguments, "8"]) == 0
    # The first batch behind it is half a step, whose gradients no state holds: it must not be saved again there.
    assert (states / "00000007.ckpt").read_bytes() == before
    assert main([*arguments, str(STEPS)]) == 0
    weights = [folder / "model" / "prior" / "model.safetensors" for folder in (tmp_path / "run", runs["prior"].alone)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("stage", [pytest.param("dvae", marks=pytest.mark.slow), "prior"])
def test_run_limited_by_epochs_is_resumed(stage: str, recipes: dict[str, Path], tmp_path: Path) -> None:
    def fit(run: str, epochs: int) -> bytes:
        options = ["--trainer.max_steps", "-1", "--checkpoint.every", "1000"]
        arguments = [*options, "--trainer.max_epochs", str(epochs), "--run", str(tmp_path / run)]
        assert main(["fit", str(recipes[stage]), *arguments]) == 0
        return (tmp_path / run / "model" / stage / "model.safetensors").read_bytes()

    alone = fit("alone", 2)
    first = fit("broken", 1)
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == [
        {"dvae": "00000005.ckpt", "prior": "00000006.ckpt"}[stage]
    ]
    curves = read_curves(tmp_path / "broken")
    assert fit("broken", 1) == first, "the same command has nothing to do"
    assert read_curves(tmp_path / "broken") == curves
    assert first != alone == fit("broken", 2)


class StopAfter(Callback):
    """Stops a run as its time limit does, behind the first batch; or as early stopping does, in validation."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop |= self.where == "batch"

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop |= self.where == "validation" and not trainer.sanity_checking


@pytest.mark.parametrize(("where", "updates"), [("batch", 1), ("validation", 3)])
def test_stopped_run_ends_with_complete_step_and_checkpoint(
    where: str, updates: int, recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A step of the prior is two batches, and a validation falls behind the fourth.
    build = ZooCLI.instantiate_trainer

    def stopped(self: ZooCLI, **options: Any) -> Trainer:
        made = build(self, **options)
        made.callbacks.insert(0, StopAfter(where))  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(ZooCLI, "instantiate_trainer", stopped)
    arguments = ["--checkpoint.every", "1000", "--run", str(tmp_path / "run")]
    assert main(["fit", str(recipes["prior"]), *arguments]) == 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"{updates:08d}.ckpt"]
    monkeypatch.undo()
    assert main(["fit", str(recipes["prior"]), *arguments]) == 0
    alone = tmp_path / "alone"
    assert main(["fit", str(recipes["prior"]), "--checkpoint.every", "1000", "--run", str(alone)]) == 0
    weights = [folder / "model" / "prior" / "model.safetensors" for folder in (tmp_path / "run", alone)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_validate_equals_validation_of_training(
    runs: dict[str, Run], recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = runs["dvae"].alone / "checkpoints"
    before = sorted(path.name for path in runs["dvae"].alone.rglob("*"))
    image_bytes = (runs["dvae"].alone / "images" / "reconstructions-00000012.png").read_bytes()
    arguments = [str(recipes["dvae"]), "--run", str(runs["dvae"].alone), "--ckpt_path", str(states / "00000012.ckpt")]
    assert main(["validate", *arguments]) == 0
    loss = read_curves(runs["dvae"].alone)["val/loss"][11]
    printed = next(line for line in capsys.readouterr().out.splitlines() if "val/loss" in line)
    assert float(printed.split("│")[2]) == pytest.approx(loss, rel=1e-5)
    assert sorted(path.name for path in runs["dvae"].alone.rglob("*")) == before
    assert (runs["dvae"].alone / "images" / "reconstructions-00000012.png").read_bytes() == image_bytes
    assert main(["predict", str(recipes["dvae"]), "--run", str(runs["dvae"].alone)]) == 0
    predicted = list((runs["dvae"].alone / "images").glob("predicted-reconstructions-*.png"))
    assert len(predicted) == -(-22 // 4)
    for path in predicted:
        path.unlink()
    assert main(["predict", str(recipes["prior"]), "--run", str(tmp_path)]) == 2
    assert "has no checkpoint: run `dalle-zoo fit` first" in capsys.readouterr().err


def test_checkpoint_of_another_network_raises(
    runs: dict[str, Run], recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = runs["dvae"].alone / "checkpoints" / "00000012.ckpt"
    assert main(["validate", str(recipes["prior"]), "--run", str(tmp_path), "--ckpt_path", str(other)]) == 2
    assert "another network" in capsys.readouterr().err
