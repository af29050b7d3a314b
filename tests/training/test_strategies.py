"""All strategies train like one process, and runs resume with any other strategy."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from dalle_zoo.training.checkpoints import consolidate, unsharded_checkpoint
from dalle_zoo.training.integrity import list_checkpoints
from dalle_zoo.training.sharded import is_sharded
from dalle_zoo.training.strategies import FullyShard, HSDPPowerSGD, defers_weights, make_strategy
from dalle_zoo.training.trainer import ZooTrainer

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "processes.py"
HALF = 10

# Each list has the cases of the default run, then those of the slow one: every strategy is in the first.
SPREAD, MORE_SPREAD = (
    # With a rank that saves nothing, matrices are uncompressed: this tests the exchange without compression loss.
    [("ddp", 2), ("fsdp", 2), ("fsdp2", 2), ("hsdp(shard_size=2)", 4), ("hsdp_powersgd(rank=64, shard_size=2)", 4)],
    [("ddp", 4), ("fsdp2", 4), ("ddp_powersgd(rank=32)", 2)],
)
RECOMPUTED, MORE_RECOMPUTED = [("fsdp2", 2)], [("fsdp", 2), ("hsdp(shard_size=2)", 4)]
VALIDATED, MORE_VALIDATED = [("auto", 1), ("fsdp2", 2)], [("fsdp", 2)]
LOW_RANK, MORE_LOW_RANK = (
    [("hsdp_powersgd(rank=8, shard_size=2)", 4)],
    [("ddp_powersgd(rank=4)", 2), ("hsdp_powersgd(rank=22, shard_size=2)", 4)],
)
RESUMED, MORE_RESUMED = (
    [("fsdp", 2, "ddp", 2)],
    [("hsdp(shard_size=2)", 4, "fsdp2", 2), ("auto", 1, "fsdp2", 4), ("fsdp2", 4, "auto", 1), ("ddp", 2, "fsdp", 2)],
)
RESUMED_LOW_RANK, MORE_RESUMED_LOW_RANK = (
    [("hsdp_powersgd(rank=8, shard_size=2)", 4, "hsdp_powersgd(rank=8, shard_size=2)", 4)],
    [
        ("ddp_powersgd(rank=4)", 2, "hsdp_powersgd(rank=4, shard_size=1)", 2),
        # At this rank, only the larger matrices are compressed.
        ("hsdp_powersgd(rank=22, shard_size=2)", 4, "hsdp_powersgd(rank=22, shard_size=2)", 4),
    ],
)
PRECISE, MORE_PRECISE = (
    [("fsdp2", 2, "bf16-mixed"), ("fsdp2", 2, "16-resblock")],
    [("fsdp", 2, "bf16-true"), ("ddp", 2, "16-resblock")],
)


def marked(usual: list[Any], more: list[Any]) -> list[Any]:
    """Parameters of a test: the usual cases, and more of them in the slow run."""
    return [*usual, *(pytest.param(*case, marks=pytest.mark.slow) for case in more)]


def launch(cases: list[dict[str, Any]], folder: Path, *options: str) -> str:
    listed = folder / "cases.json"
    listed.write_text(json.dumps(cases))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(listed), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Returns the results of a case; the usual ones run together, and so do the others once one of them is read."""
    folder = tmp_path_factory.mktemp("strategies")

    def out(*parts: Any) -> Path:
        return folder / "-".join(map(str, parts))

    def case(*parts: Any, **options: Any) -> dict[str, Any]:
        return {"strategy": parts[-2], "world": parts[-1], **options, "out": str(out(*parts))}

    def validated(parts: list[Any]) -> list[dict[str, Any]]:
        return [{**case(*each, validate=True), "out": str(out(*each, "measured"))} for each in parts]

    def cases(
        spread: list[Any], recomputed: list[Any], resumed: list[Any], precise: list[Any]
    ) -> list[dict[str, Any]]:
        states = [str(out(*parts[:2]) / "checkpoints" / f"{HALF:08d}.ckpt") for parts in resumed]  # of finished runs
        named = [(*parts, {"recompute": True, "gradients_at": [0, 5]}, "again") for parts in recomputed]
        named += [(*parts, {"precision": precision, "gradients_at": [0]}, precision) for *parts, precision in precise]
        return [
            *(case(*parts, gradients_at=[0, 5]) for parts in spread),
            *({**case(*parts), **options, "out": str(out(*parts, name))} for *parts, options, name in named),
            *(case(*parts, resume=state) for parts, state in zip(resumed, states, strict=True)),
        ]

    usual = [
        *cases(
            [("auto", 1), *SPREAD, *LOW_RANK],
            RECOMPUTED,
            RESUMED + RESUMED_LOW_RANK,
            [("auto", 1, "16-resblock"), *PRECISE],
        ),
        *validated(VALIDATED),
        case("fsdp2", 3, steps=2),
    ]
    more = [
        *cases(
            MORE_SPREAD + MORE_LOW_RANK,
            MORE_RECOMPUTED,
            MORE_RESUMED + MORE_RESUMED_LOW_RANK,
            MORE_PRECISE,
        ),
        *validated(MORE_VALIDATED),
    ]
    launch(usual, folder)

    def read(*parts: Any) -> dict[str, Any]:
        if not out(*parts).exists():
            launch(more, folder)
        found: dict[str, Any] = torch.load(out(*parts) / "result.pt")
        found["folder"] = out(*parts)
        return found

    return read


def error(one: dict[str, Any], other: dict[str, Any], update: int) -> float:
    """Largest relative error of a parameter's gradient."""
    expected, found = one["gradients"][update], other["gradients"][update]
    assert expected.keys() == found.keys()
    return max(float((found[n].float() - g.float()).norm() / g.float().norm()) for n, g in expected.items())


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("strategy", "world"), marked(SPREAD, MORE_SPREAD))
def test_gradients_and_loss_equal_those_of_one_process(result: Any, strategy: str, world: int) -> None:
    one, spread = result("auto", 1), result(strategy, world)
    assert error(one, spread, 0) < 1e-6
    assert error(one, spread, 5) < 2e-6  # the weights have had five steps to move apart
    assert len(one["losses"]) == 20
    assert one["losses"][-1] < one["losses"][0] - 0.05  # something was learnt
    assert apart(one["losses"], spread["losses"]) < 1e-6


def test_uneven_shards_are_supported(result: Any) -> None:
    assert len(result("fsdp2", 3)["losses"]) == 2  # 128 inputs of the MLP's second matrix, of three processes


@pytest.mark.parametrize(("strategy", "world"), marked(VALIDATED, MORE_VALIDATED))
def test_validation_uses_average_and_training_does_not(result: Any, strategy: str, world: int) -> None:
    one, alone, measured = result("auto", 1, "measured"), result("auto", 1), result(strategy, world, "measured")
    assert apart(alone["losses"], measured["losses"]) < 1e-6
    assert measured["measured"]["val/image_loss"] == pytest.approx(one["measured"]["val/image_loss"], abs=1e-6)
    assert measured["measured"]["val/image_loss"] != pytest.approx(measured["losses"][-1], abs=1e-3)


@pytest.mark.parametrize(("strategy", "world"), marked(VALIDATED, MORE_VALIDATED))
def test_sharded_networks_generate_sample_images(result: Any, strategy: str, world: int) -> None:
    one, spread = (result(*case, "measured")["folder"] / "images" for case in (("auto", 1), (strategy, world)))
    names = [f"samples-{step:08d}.png" for step in (5, 10, 15, 20)]
    assert sorted(path.name for path in spread.iterdir()) == names
    assert [(spread / name).read_bytes() for name in names] == [(one / name).read_bytes() for name in names]
    assert len({(one / name).read_bytes() for name in names}) == 4, "they change while training goes on"


@pytest.mark.parametrize(("strategy", "world"), marked([("auto", 1), *SPREAD], MORE_SPREAD))
def test_gradient_norm_covers_all_shards(result: Any, strategy: str, world: int) -> None:
    found = result(strategy, world)
    for step in (0, 5):
        expected = math.sqrt(sum(float(gradient.square().sum()) for gradient in found["gradients"][step].values()))
        assert found["norms"][step] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("strategy", "world"), marked(RECOMPUTED, MORE_RECOMPUTED))
def test_recomputation_does_not_change_results(result: Any, strategy: str, world: int) -> None:
    retained, recomputed = result(strategy, world), result(strategy, world, "again")
    assert error(retained, recomputed, 0) == 0
    assert retained["losses"] == recomputed["losses"]


@pytest.mark.parametrize(("strategy", "world"), marked(LOW_RANK, MORE_LOW_RANK))
def test_low_rank_gradients_differ_but_train(result: Any, strategy: str, world: int) -> None:
    one, low = result("auto", 1), result(strategy, world)
    assert error(one, low, 0) > 0.01
    assert low["losses"][0] == pytest.approx(one["losses"][0], abs=1e-6)
    assert low["losses"][-1] == pytest.approx(one["losses"][-1], abs=0.05)


@pytest.mark.parametrize(("first", "begun", "strategy", "world"), marked(RESUMED, MORE_RESUMED))
def test_run_resumes_with_another_strategy(result: Any, first: str, begun: int, strategy: str, world: int) -> None:
    alone, resumed = result("auto", 1), result(first, begun, strategy, world)
    assert apart(alone["losses"][HALF:], resumed["losses"]) < 1e-6


@pytest.mark.parametrize(("first", "begun", "strategy", "world"), marked(RESUMED_LOW_RANK, MORE_RESUMED_LOW_RANK))
def test_error_feedback_is_sent_later(result: Any, first: str, begun: int, strategy: str, world: int) -> None:
    alone, resumed = result(first, begun), result(first, begun, strategy, world)
    assert apart(alone["losses"][HALF:], resumed["losses"]) < 1e-6


@pytest.mark.parametrize(("strategy", "world", "precision"), marked(PRECISE, MORE_PRECISE))
def test_precisions_stay_near_float32(result: Any, strategy: str, world: int, precision: str) -> None:
    one, spread = result("auto", 1), result(strategy, world, precision)
    assert 0 < error(one, spread, 0) < 0.03
    if precision == "16-resblock":
        # Processes round the gradients of their parts, so small differences remain.
        assert error(result("auto", 1, precision), spread, 0) < 1e-3
        state = unsharded_or_file(spread["folder"])["ResblockPrecision"]
        assert state["scales"]["values"].tolist() == pytest.approx([2**13 * 2 ** (20 / 1000)] * 4)


def unsharded_or_file(run: Path) -> dict[str, Any]:
    path = list_checkpoints(run / "checkpoints")[-1]
    if is_sharded(path):
        return unsharded_checkpoint(path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def test_checkpoints_of_all_strategies_consolidate_to_equal_weights(result: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for strategy, world in [("auto", 1), ("fsdp2", 2), ("fsdp", 2), ("hsdp_powersgd(rank=64, shard_size=2)", 4)]:
        run = result(strategy, world)
        path = list_checkpoints(run["folder"] / "checkpoints")[-1]
        folder = tmp_path / f"{strategy}{world}"
        folder.mkdir()
        assert consolidate(path, folder) == "prior"
        tensors = load_file(folder / "model.safetensors")
        assert tensors.keys() == run["weights"].keys()  # what training ends with is the average
        assert all(torch.equal(tensors[name], weight) for name, weight in run["weights"].items())
        raw = tmp_path / f"{strategy}{world}-raw"
        raw.mkdir()
        consolidate(path, raw, averaged=False)
        others = load_file(raw / "model.safetensors")
        assert not all(torch.equal(others[name], weight) for name, weight in tensors.items())


def test_sharded_checkpoint_has_only_safetensors_and_state(result: Any) -> None:
    folder = result("fsdp2", 2)["folder"] / "checkpoints"
    newest, older = list_checkpoints(folder)[-1], list_checkpoints(folder)[0]
    assert sorted(path.suffix for path in newest.iterdir()) == [".pt", *[".safetensors"] * 2]
    assert {path.name for path in folder.iterdir()} == {newest.name, older.name}


@pytest.mark.slow  # half a minute: each of the twenty lives has two processes to connect
def test_twenty_kills_change_nothing_and_leave_no_partial_checkpoint(tmp_path: Path) -> None:
    usual = {"strategy": "fsdp2", "world": 2, "every": 1, "clip": 0.5}
    alone, killed = {**usual, "out": str(tmp_path / "alone")}, {**usual, "out": str(tmp_path / "killed"), "pace": 0.05}
    launch([alone], tmp_path)
    printed = json.loads(launch([killed], tmp_path, "--kills", "20").splitlines()[-1])
    assert printed["kills"] == 20
    assert len(set(printed["newest"])) > 6, "the kills are spread over the run"
    ends = [torch.load(tmp_path / name / "result.pt")["weights"] for name in ("alone", "killed")]
    assert all(torch.equal(ends[1][name], weight) for name, weight in ends[0].items())


def test_names_are_checked_before_construction() -> None:
    with pytest.raises(ValueError, match=r"unknown strategy 'hsdp_power'.*Did you mean 'hsdp_powersgd'"):
        make_strategy("hsdp_power(rank=4)")
    with pytest.raises(ValueError, match="needs rank"):
        make_strategy("ddp_powersgd")
    with pytest.raises(ValueError, match=r"unknown hsdp option 'shards'. Did you mean 'shard_size'"):
        make_strategy("hsdp(shards=2)")
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        make_strategy("hsdp_powersgd(rank=0)")
    with pytest.raises(ValueError, match="shard_size must be at least 0"):
        make_strategy("hsdp(shard_size=-2)")
    with pytest.raises(ValueError, match="wire_bits must be 16 or 32"):
        make_strategy("ddp_powersgd(rank=2, wire_bits=8)")


def test_trainer_accepts_strategies_by_name() -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    assert isinstance(ZooTrainer(strategy="hsdp_powersgd(rank=8)", **options).strategy, HSDPPowerSGD)
    assert isinstance(ZooTrainer(strategy="ddp", **options).strategy, DDPStrategy)
    sharded = ZooTrainer(strategy="fsdp2", precision="16-resblock", **options)
    assert isinstance(sharded.strategy, FullyShard)
    assert sharded.precision == "16-resblock"
    assert ZooTrainer(precision="bf16", **options).precision == "bf16-mixed"
    for precision in ("16-mixed", 16, "16"):
        with pytest.raises(ValueError, match="16-mixed needs a GPU"):
            ZooTrainer(precision=precision, **options)
    with pytest.raises(ValueError, match="what to skip"):
        ZooTrainer(precision="16-mixed", strategy="ddp_powersgd(rank=2)", **options)
    with pytest.raises(ValueError, match=r"unknown strategy 'fsdp3'.*Did you mean 'fsdp'"):
        ZooTrainer(strategy="fsdp3", **options)
    with pytest.raises(ValueError, match=r"unknown precision '16-resblok'.*Did you mean '16-resblock'"):
        ZooTrainer(precision="16-resblok", **options)


def test_only_fully_shard_accepts_networks_without_weights() -> None:
    names = ("fsdp2", "hsdp", "hsdp_powersgd(rank=8)", "fsdp", "ddp", "auto", None)
    assert [defers_weights(name) for name in names] == [True, True, True, False, False, False, False]


@pytest.mark.slow
@pytest.mark.usefixtures("cpp_compiler")
def test_compiled_blocks_match_eager_blocks(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "one": {"strategy": "auto", "world": 1},
        "ddp": {"strategy": "ddp", "world": 2, "compile": True},
        "fsdp2": {"strategy": "fsdp2", "world": 2, "compile": True},
        "fsdp2, recomputed": {"strategy": "fsdp2", "world": 2, "compile": True, "recompute": True},
    }
    out = {
        name: {**case, "steps": 3, "gradients_at": [2], "out": str(tmp_path / name)} for name, case in cases.items()
    }
    launch(list(out.values()), tmp_path)
    one, *spread = (torch.load(tmp_path / name / "result.pt") for name in cases)
    for found in spread:
        assert error(one, found, 2) < 2e-6
        assert apart(one["losses"], found["losses"]) < 1e-6
