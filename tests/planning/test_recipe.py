"""Keys of recipes: every default must equal that of the parts that `dalle-zoo fit` builds."""

from __future__ import annotations

import inspect
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from lightning.pytorch import Trainer

from dalle_zoo.planning.formats import MOMENTS, PRECISIONS
from dalle_zoo.planning.memory import CHUNK
from dalle_zoo.planning.recipe import AVERAGING, READ, WORKLOADS, read_setup, read_work
from dalle_zoo.planning.setup import Setup
from dalle_zoo.recipes import find_recipe, list_recipes
from dalle_zoo.training import STAGES, optimizer, precision
from dalle_zoo.training.averaging import WeightEMA
from dalle_zoo.training.data_modules import CodeDataModule, ImageDataModule
from dalle_zoo.training.prior_module import PriorModule

PRIOR: dict[str, Any] = {
    "model": {"class_path": "PriorModule", "init_args": {"config": {"width": 128, "num_heads": 2, "num_layers": 2}}},
    "trainer": {"devices": 2},
}


def with_key(name: str, value: Any) -> dict[str, Any]:
    keys: dict[str, Any] = yaml.safe_load(yaml.safe_dump(PRIOR))
    *path, last = name.split(".")
    inner = keys
    for part in path:
        inner = inner.setdefault(part, {})
    inner[last] = value
    return keys


def default(function: Any, name: str) -> Any:
    return inspect.signature(function).parameters[name].default


def test_names_and_defaults_are_those_of_training() -> None:
    setup = read_setup(PRIOR)
    assert setup.batch == default(ImageDataModule, "batch_size") == default(CodeDataModule, "batch_size")
    assert setup.nodes == default(Trainer, "num_nodes")
    assert setup.accumulate == default(Trainer, "accumulate_grad_batches")
    assert setup.recompute == default(PriorModule, "recompute")
    assert {workload.stage for workload in WORKLOADS.values()} == {*STAGES} - {"ranker"}
    for name, workload in WORKLOADS.items():
        assert STAGES[workload.stage].__name__ == name
        own = read_setup(with_key("model.class_path", name))
        adamw = default(STAGES[workload.stage], "adamw")
        assert (own.moments, own.clips_variance) == (adamw.moments, adamw.variance_clip is not None)
    assert default(Trainer, "strategy") == setup.strategy
    assert default(Trainer, "precision") is None  # which means float32
    assert setup.precision == "32-true"
    assert set(MOMENTS) == set(get_args(get_type_hints(optimizer.AdamWConfig)["moments"]))
    assert set(PRECISIONS) == set(precision.PRECISIONS)
    assert {name: f"torch.{PRECISIONS[name]}" for name in precision.MIXED} == {
        name: str(dtype) for name, dtype in precision.MIXED.items()
    }
    assert MOMENTS["8bit"] == MOMENTS["fp8"] == 1 + 4 / optimizer.BLOCK
    assert optimizer.CHUNK == CHUNK
    assert WeightEMA.__name__ in AVERAGING


@pytest.mark.parametrize(
    ("key", "value", "field", "expected"),
    [
        ("model.init_args.recompute", True, "recompute", True),
        ("model.init_args.adamw.moments", "8bit", "moments", "8bit"),
        ("model.init_args.adamw.variance_clip", 5.0, "clips_variance", True),
        ("model.init_args.adamw.variance_clip", None, "clips_variance", False),
        ("data.init_args.batch_size", 3, "batch", 3),
        ("trainer.devices", [0, 3, 4], "devices", 3),
        ("trainer.num_nodes", 4, "nodes", 4),
        ("trainer.strategy", "hsdp(shard_size=2)", "strategy", "hsdp(shard_size=2)"),
        ("trainer.precision", "16-resblock", "precision", "16-resblock"),
        ("trainer.accumulate_grad_batches", 4, "accumulate", 4),
        ("trainer.max_steps", 77, "steps", 77),
        ("trainer.max_steps", -1, "steps", None),
        ("trainer.callbacks", [{"class_path": "dalle_zoo.training.averaging.WeightEMA"}], "average", "gpu"),
        ("trainer.callbacks", [{"class_path": "WeightEMA", "init_args": {"device": "cpu"}}], "average", "host"),
        ("trainer.callbacks", [{"class_path": "lightning.pytorch.callbacks.Timer"}], "average", "none"),
    ],
)
def test_every_key_is_read(key: str, value: Any, field: str, expected: Any) -> None:
    assert key in READ
    assert getattr(read_setup(with_key(key, value)), field) == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer.devices", "auto", "trainer.devices is 'auto': a plan needs the number of GPUs per node"),
        ("trainer.devices", None, "trainer.devices is missing"),
        ("trainer.devices", 0, "trainer.devices is 0"),
        ("trainer.num_nodes", 0, "nodes must be an integer of at least 1, got 0"),
        ("trainer.num_nodes", "two", "trainer.num_nodes must be an integer, got 'two'"),
        ("data.init_args.batch_size", 0, "batch must be an integer of at least 1"),
        ("data.init_args.batch_size", 10**30, "data.init_args.batch_size must be at most 2,147,483,647, got 1000"),
        ("data.init_args.batch_size", 8.0, "data.init_args.batch_size must be an integer, got 8.0"),
        ("trainer.max_steps", True, "trainer.max_steps must be an integer, got True"),
        ("trainer.precision", "bf16-mix", "unknown precision 'bf16-mix'. Did you mean 'bf16-mixed'"),
        ("model.init_args.adamw.moments", "8bits", "unknown format of AdamW's moments '8bits'. Did you mean '8bit'"),
        ("trainer.strategy", {"class_path": "DDPStrategy"}, "trainer.strategy must be a name"),
        ("model.init_args.recompute", "yes", "model.init_args.recompute must be true or false, got 'yes'"),
    ],
)
def test_invalid_values_raise(key: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        read_setup(with_key(key, value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.init_args.config.widht", 3, "model.init_args.config: unknown field 'widht'. Did you mean 'width'"),
        ("model.init_args.config.width", 127, "width 127 is not a multiple of num_heads 2"),
        ("model.init_args.config", "big", "model.init_args.config must hold keys of PriorConfig, got 'big'"),
        ("model.init_args.config.image_height", 100_000, "a grid of 100000 x 32 codes is too large for a plan"),
        ("model.init_args.config.num_layers", 10**9, "a plan supports at most 10,000 layers, got 1,000,000,000"),
        ("model.class_path", "RankerModule", "a plan supports PriorModule and DVAEModule; a ranker fits one GPU"),
        ("model.class_path", None, "model.class_path is 'missing'"),
    ],
)
def test_invalid_networks_raise(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_work(with_key(key, value))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("prior", {"precision": "16-mixed", "strategy": "ddp_powersgd(rank=4)"}, "use 16-resblock or bf16-mixed"),
        ("prior", {"precision": "16-resblock", "strategy": "fsdp"}, "use fsdp2"),
        ("prior", {"strategy": "ddp_powersgd(rank=4000)"}, "too large to compress any matrix"),
        ("dvae", {"strategy": "fsdp2"}, "the dvae has no blocks to shard, as fsdp2 requires: use strategy ddp"),
        ("dvae", {"recompute": True}, "no blocks to recompute"),
        ("dvae", {"precision": "16-resblock"}, "no blocks to recompute or to scale"),
    ],
)
def test_combinations_that_do_not_train_raise(stage: str, changes: dict[str, Any], message: str) -> None:
    keys = PRIOR if stage == "prior" else {"model": {"class_path": "DVAEModule"}}
    with pytest.raises(ValueError, match=message):
        read_work(keys).check(Setup(devices=2, **changes))


def test_every_recipe_except_rankers_can_be_planned() -> None:
    planned = 0
    for name in list_recipes():
        keys = yaml.safe_load(find_recipe(name).read_text(encoding="utf-8"))
        if keys["model"]["class_path"].rpartition(".")[2] == "RankerModule":
            continue
        if name == "prior/finetune-cub":  # of a model that is converted first; test_memory.py plans it
            continue
        keys["trainer"].setdefault("devices", 1)
        read_work(keys).check(read_setup(keys))
        planned += 1
    assert planned >= 5
