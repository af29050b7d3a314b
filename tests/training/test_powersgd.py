"""PowerSGD in groups of 1, 2 and 4 processes, and its parts in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_zoo.planning.parameters import Parameter
from dalle_zoo.planning.strategies import factors_of
from dalle_zoo.training.powersgd import PowerSGD, Traffic, compresses, orthonormal, shorter_side_first

ROOT = Path(__file__).parents[2]
EXACT = 1e-6  # relative: float32 matrix products, and the 1e-6 of the identity
COMPRESSED = {"wide", "tall", "square"}

Found = dict[str, Any]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """Results of the four processes, by scenario."""
    folder = tmp_path_factory.mktemp("powersgd")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("powersgd_processes.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("size", ["2", "4"])
def test_low_rank_gradients_and_uncompressed_tensors_have_exact_means(processes: list[Found], size: str) -> None:
    for found in processes:
        entry = found["exact_for_low_rank"][size]
        assert set(entry["compressed"]) == COMPRESSED
        assert max(entry["matrices"].values()) < EXACT
        assert max(entry["others"]) < EXACT
        assert entry["outside"], "a view was written beyond its bounds"


def test_full_rank_gradients_are_exact(processes: list[Found]) -> None:
    for found in processes:
        entry = found["uncompressed_at_high_rank"]
        assert entry["distance"] < EXACT
        assert entry["errors"] == []
        assert entry["traffic"] == [0, 4 * (24 * 40 + 64 * 16 + 32 * 32 + 4 * 50), 0]


@pytest.mark.parametrize("size", ["1", "2", "4"])
def test_applied_gradient_plus_error_equals_exact_gradient(processes: list[Found], size: str) -> None:
    for found in processes:
        assert found["invariant"][size]["invariant"] < EXACT
        assert found["invariant"][size]["gap"] > 0.3, "nothing was compressed, so this shows nothing"


def test_error_feedback_reduces_error(processes: list[Found]) -> None:
    for found in processes:
        entry = found["error_feedback"]
        assert entry["with"] < 0.9 * entry["without"]
        assert entry["kept without"] == []


def test_bfloat16_factors_have_half_the_bytes_and_small_error(processes: list[Found]) -> None:
    for found in processes:
        entry = found["bfloat16"]
        assert 0 < entry["first step"] < 2e-2  # a few units of 2^-8
        assert entry["factors"][1] * 2 == entry["factors"][0] > 0
        assert entry["complete"][0] == entry["complete"][1]
        assert entry["invariant"] < EXACT, "the rounding of the wire is not in the error"
        assert EXACT < entry["invariant of bfloat16 buffers"] < 1e-2
        largest = torch.finfo(torch.bfloat16).max
        assert entry["clamped"] == [largest, -largest]
        assert entry["clamped is finite"]


@pytest.mark.parametrize("spoilt", ["infinite_matrix", "nan_elsewhere", "flagged", "overflow"])
def test_non_finite_step_of_one_process_is_skipped_on_all(processes: list[Found], spoilt: str) -> None:
    for found in processes:
        entry = found["not_finite"][spoilt]
        assert entry["returned"] == [True, False, True]
        assert entry["kept"], "the error buffers changed"
        assert entry["applied"]


def test_non_finite_error_buffer_is_reset_to_zero(processes: list[Found]) -> None:
    for rank, found in enumerate(processes):
        entry = found["broken_buffer"]
        assert entry["returned"] == [False, True]
        assert entry["zero"] == {"wide": False, "tall": rank == 0, "square": False}


def test_bytes_equal_formula(processes: list[Found]) -> None:
    r = 4
    factors = 4 * r * ((24 + 40) + (64 + 16) + (32 + 32))
    uncompressed = 4 * (4 * 50 + 7)
    matrices = 4 * (24 * 40 + 64 * 16 + 32 * 32)
    for found in processes:
        entry = found["traffic"]
        assert entry["traffic"] == [factors, uncompressed, matrices]
        assert entry["rate"] == pytest.approx(1 - factors / matrices)
        p = 4 * r * (24 + 16 + 32)  # the shorter sides
        assert entry["counted"] == [p, factors - p, uncompressed, 4], "P, R, all that is complete, the flag"
        assert entry["sent"] == factors + uncompressed


def test_bytes_equal_plan(processes: list[Found]) -> None:
    shapes = {"wide": (24, 40), "tall": (64, 16), "square": (32, 32), "tiny": (4, 50), "vector": (7,)}
    parameters = tuple(Parameter(name=name, shape=shape, unit="block") for name, shape in shapes.items())
    planned = factors_of(parameters, shards=1, rank=4)
    sent = Traffic(*processes[0]["traffic"]["traffic"])
    assert sent == (4 * (planned.left + planned.right), 4 * planned.uncompressed, 4 * planned.matrices)
    assert sent.compression_rate == pytest.approx(planned.compression)
    assert processes[0]["traffic"]["counted"][0] == 4 * planned.left


def test_error_buffers_of_four_machines_are_loaded_on_two(processes: list[Found]) -> None:
    for found in processes:
        entry = found["save_on_four_load_on_two"]
        assert entry["same"] < EXACT
        assert entry["invariant"] < EXACT
        assert entry["all sent at a higher rank"] < EXACT
        assert entry["left at a higher rank"] == []
        assert entry["size of what was pending"] > 0.1, "the buffers were too small to show anything"


def test_equal_runs_give_equal_bits_on_all_machines(processes: list[Found]) -> None:
    for found in processes:
        assert found["determinism"] == {"again": True, "on all machines": True, "another seed": False}


def test_gradients_of_bfloat16_weights_are_accumulated_in_float32(processes: list[Found]) -> None:
    for found in processes:
        assert found["half_gradients"]["invariant"] < EXACT
        assert found["half_gradients"]["dtype"] == "torch.bfloat16"


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("nothing", "there are no gradients"),
        ("dimensions", "w must have two dimensions, got (24, 40, 1)"),
        ("shape", "the error buffer has shape (24, 40), the gradient is (24, 41)"),
        ("missing", "w: the error buffer has shape (24, 40), the gradient is missing"),
        ("off", "error_feedback is off"),
    ],
)
def test_mistakes_raise_with_explanation(processes: list[Found], mistake: str, message: str) -> None:
    assert message in processes[0]["refusals"][mistake]


# ------------------------------------------------------------ one process


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 1, "wire_dtype": torch.float16}, "wire_dtype must be torch.float32 or torch.bfloat16"),
        ({"rank": 1, "error_dtype": torch.float64}, "error_dtype must be torch.float32 or torch.bfloat16"),
    ],
)
def test_wrong_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PowerSGD(**options)


def test_bases_are_orthonormal_and_span_the_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    sampled = [torch.randn(rows, 6, generator=generator) for rows in (9, 30, 9)]
    deficient = sampled[1][:, :2] @ torch.randn(2, 6, generator=generator)
    tiny = 1e-20 * sampled[0]
    for matrix, basis in zip(*[(m := [*sampled, deficient, tiny]), orthonormal(m)], strict=True):
        torch.testing.assert_close(basis.t() @ basis, torch.eye(6))
        torch.testing.assert_close(basis @ (basis.t() @ matrix), matrix, rtol=1e-4, atol=1e-5 * matrix.abs().max())


def test_basis_of_zero_is_identity() -> None:
    (basis,) = orthonormal([torch.zeros(5, 3)])
    torch.testing.assert_close(basis.abs(), torch.eye(5, 3))


def test_shorter_side_comes_first_without_copy() -> None:
    tall, wide = torch.zeros(5, 3), torch.zeros(3, 5)
    assert shorter_side_first(tall).shape == shorter_side_first(wide).shape == (3, 5)
    assert shorter_side_first(tall).data_ptr() == tall.data_ptr()


@pytest.mark.parametrize(("width", "rank", "rate"), [(1920, 512, 0.833), (2688, 640, 0.851), (3968, 896, 0.859)])
def test_compression_rates_match_the_paper(width: int, rank: int, rate: float) -> None:
    # table 1, from the shards that one of 8 processes holds of a layer (table 2), in torch's layout (out, in)
    shards = [(width // 8, width)] * 4 + [(4 * width // 8, width), (width, 4 * width // 8)]
    each = rank // 8
    assert all(compresses(shape, each) for shape in shards)
    factors = sum(each * (rows + columns) for rows, columns in shards)
    traffic = Traffic(4 * factors, 0, 4 * sum(rows * columns for rows, columns in shards))
    assert traffic.compression_rate == pytest.approx(rate, abs=5e-4)
    assert traffic.compression_rate == pytest.approx(1 - 5 * rank / (8 * width))


def test_matrix_is_uncompressed_if_factors_save_nothing() -> None:
    assert compresses((20, 20), 9)
    assert not compresses((20, 20), 10)  # 10 * 40 numbers either way
    assert not compresses((0, 20), 1)  # a process without rows of an uneven shard
