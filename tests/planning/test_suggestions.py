"""Suggested changes that make a stage fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dalle_zoo.models.dvae import DVAEConfig
from dalle_zoo.models.prior import PriorConfig
from dalle_zoo.planning.dvae import DVAEWorkload
from dalle_zoo.planning.formats import GIB
from dalle_zoo.planning.memory import memory_of
from dalle_zoo.planning.prior import PriorWorkload
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.suggestions import BFLOAT16, CHANGES, suggestions

WORK = PriorWorkload(PriorConfig(width=1024, num_layers=12, num_heads=16))
START = Setup(devices=2, nodes=2, batch=8, precision="bf16-mixed", average="gpu")


def total(setup: Setup) -> float:
    return memory_of(WORK, setup).total


def test_a_single_sufficient_change_comes_first() -> None:
    limit = total(replace(START, recompute=True))
    first, *rest = suggestions(WORK, START, limit)
    assert first.keys == ("--model.init_args.recompute true",)
    assert first.total == limit
    assert all(
        "recompute" not in key for suggestion in rest for key in suggestion.keys
    )  # no suggestion contains another


@pytest.mark.parametrize(
    ("needs", "keys"),
    [
        (replace(START, strategy="hsdp"), "--trainer.strategy hsdp"),
        (replace(START, average="host"), "WeightEMA of trainer.callbacks: device: cpu"),
        (replace(START, batch=4, accumulate=2), "--data.init_args.batch_size 4 --trainer.accumulate_grad_batches 2"),
        (replace(START, moments="8bit"), "--model.init_args.adamw.moments 8bit"),
        (replace(START, precision="bf16-true"), "--trainer.precision bf16-true"),
        (replace(START, strategy="fsdp2"), "--trainer.strategy fsdp2"),
    ],
)
def test_every_change_is_suggested_if_it_suffices(needs: Setup, keys: str) -> None:
    found = suggestions(WORK, START, total(needs), most=50)
    assert (keys,) in [suggestion.keys for suggestion in found]


def test_every_suggestion_fits_and_none_contains_another() -> None:
    limit = 2.5 * GIB
    assert total(START) > limit
    found = suggestions(WORK, START, limit, most=50)
    assert found
    words = [set(suggestion.words) for suggestion in found]
    assert all(suggestion.total <= limit for suggestion in found)
    assert not any(a < b for a in words for b in words)


def test_batches_of_any_size_are_split_at_once() -> None:
    prime = 2**31 - 1
    for batch, largest in ((2**30 * 3, 2**29 * 3), (prime, 1)):
        start = replace(START, batch=batch)
        variants = [changed.batch for change in CHANGES for _, changed in change.variants(WORK, start)]
        smaller = [size for size in variants if size != batch]
        assert smaller[0] == largest, "the smallest change comes first"
        assert smaller[-1] == 1
        assert all(batch % size == 0 for size in smaller)


def test_changes_are_complete_overrides() -> None:
    found = suggestions(WORK, replace(START, devices=1, nodes=1), 2.5 * GIB, most=50)
    keys = [key for suggestion in found for key in suggestion.keys]
    assert any(key.startswith("--trainer.devices ") and "--trainer.num_nodes" in key for key in keys)
    assert all("{}" not in key for key in keys)


def test_powersgd_stays_when_weights_are_sharded() -> None:
    start = replace(START, devices=8, strategy="ddp_powersgd(rank=100)")
    found = suggestions(WORK, start, total(replace(start, strategy="hsdp_powersgd(rank=96)")), most=50)
    assert ("--trainer.strategy 'hsdp_powersgd(rank=96)'",) in [suggestion.keys for suggestion in found]


def test_shards_grow_over_nodes_before_all_gpus_are_taken() -> None:
    start = Setup(devices=8, nodes=16, strategy="hsdp_powersgd(rank=256)", precision="bf16-mixed", recompute=True)
    wanted = "hsdp_powersgd(rank=256,shard_size=32)"
    found = suggestions(WORK, start, total(replace(start, strategy=wanted)), most=50)
    assert (f"--trainer.strategy '{wanted}'",) in [suggestion.keys for suggestion in found]


def test_changes_that_the_hardware_does_not_allow_are_left_out() -> None:
    limit = total(replace(START, precision="bf16-true"))
    keys = [suggestion.keys for suggestion in suggestions(WORK, START, limit, most=50, leave_out=(BFLOAT16,))]
    assert keys
    assert not any("bf16-true" in key for suggestion in keys for key in suggestion)


def test_sharding_is_never_suggested_for_a_dvae() -> None:
    work, start = DVAEWorkload(DVAEConfig()), Setup(devices=8, batch=64, precision="bf16-mixed")
    found = suggestions(work, start, 16 * GIB, most=50)
    assert found
    assert not any(
        "fsdp" in key or "hsdp" in key or "recompute" in key for suggestion in found for key in suggestion.keys
    )


def test_no_suggestions_if_one_sample_is_too_large() -> None:
    assert suggestions(WORK, START, 0.5 * GIB) == []


def test_changes_without_effect_are_not_suggested() -> None:
    done = Setup(devices=1, batch=1, precision="bf16-true", moments="8bit", recompute=True)
    offered = [change.words for change in CHANGES if list(change.variants(WORK, done))]
    assert offered == ["shard over more GPUs"]
