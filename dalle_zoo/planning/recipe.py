"""Reads the keys of a recipe, without building its parts or opening its data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from dalle_zoo.adapters import LoRAConfig
from dalle_zoo.files import read_json
from dalle_zoo.model_folder import CONFIG, config_from_dict
from dalle_zoo.models import PRIORS
from dalle_zoo.planning.dvae import DVAEWorkload
from dalle_zoo.planning.prior import PLANNED, PlannedConfig, PriorWorkload
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.workload import Workload
from dalle_zoo.recipes import Keys, value_at
from dalle_zoo.values import as_integer
from dalle_zoo.zoo import find_component

AVERAGING = ("WeightEMA", "EMAWeightAveraging", "WeightAveraging")
"""Callbacks that store averaged weights."""

WORKLOADS: Mapping[str, type[PriorWorkload | DVAEWorkload]] = {
    workload.module: workload for workload in (PriorWorkload, DVAEWorkload)
}
"""Stages that can be planned, by the name of their LightningModule."""

MUON_ITERATIONS = 5
"""Default of `dalle_zoo.training.muon.MuonConfig`, whose package imports Lightning."""

LARGEST = 2**31 - 1
"""Largest count in a recipe that is planned with."""
LAYERS = ("num_layers", "num_groups", "blocks_per_group")
"""Fields of an architecture whose product is the number of its layers."""
MOST_LAYERS = 10_000
"""Largest number of layers that is planned with: the layers of a larger network would take long to build."""
MOST_COLUMN_PAIRS = 2**24
"""Largest number of pairs of columns, at any number of rows apart, for which a plan evaluates a mask."""

INTEGERS = {
    "nodes": "trainer.num_nodes",
    "batch": "data.init_args.batch_size",
    "accumulate": "trainer.accumulate_grad_batches",
}
NAMES = {
    "strategy": "trainer.strategy",
    "precision": "trainer.precision",
    "moments": "model.init_args.adamw.moments",
}
READ = (
    "model.class_path",
    "model.init_args.config",
    "model.init_args.init_from",
    "model.init_args.tune",
    "model.init_args.lora",
    "model.init_args.recompute",
    "model.init_args.adamw.variance_clip",
    "model.init_args.muon",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.max_steps",
    "trainer.callbacks",
    *INTEGERS.values(),
    *NAMES.values(),
)
"""Keys that a plan depends on."""


def read_work(keys: Keys) -> Workload:
    """Returns the stage that a recipe trains.

    Raises:
        ValueError: The stage cannot be planned, or a key or value of its architecture is invalid.
    """
    name = _module(keys)
    if name not in WORKLOADS:
        raise ValueError(
            f"model.class_path is {name or 'missing'!r}: a plan supports {' and '.join(WORKLOADS)}; a ranker fits one "
            "GPU"
        )
    workload = WORKLOADS[name]
    values, init_from = value_at(keys, "model.init_args.config"), value_at(keys, "model.init_args.init_from")
    config_class: type = workload.config_class
    if workload is PriorWorkload and values is None and init_from is not None:
        config_class, values = _config_of(init_from)
    config = _config(config_class, values or {})
    if workload is not PriorWorkload:
        return workload(config)
    check_grid(config)
    return PriorWorkload(config, *_tuning(keys))


def _config_of(init_from: Any) -> tuple[type, dict[str, Any]]:
    """Class and values of the configuration of the prior that training starts from."""
    values = read_json(find_component(str(init_from), PriorWorkload.stage) / CONFIG)
    known = {PRIORS.name_of(net): config_class for config_class, net in PLANNED.items()}
    kind = values.pop("type", None)
    if kind not in known:
        raise ValueError(f"init_from {init_from} is a prior of type {kind!r}: a plan supports {', '.join(known)}")
    return known[kind], values


def _tuning(keys: Keys) -> tuple[str | None, LoRAConfig | None]:
    """What is trained, and the adapters."""
    tune, lora = value_at(keys, "model.init_args.tune"), value_at(keys, "model.init_args.lora")
    if tune not in (None, "lora", "words"):
        raise ValueError(f"model.init_args.tune must be lora, words or null, got {tune!r}")
    if lora is not None and not isinstance(lora, Mapping):
        raise ValueError(f"model.init_args.lora must hold keys of LoRAConfig, got {lora!r}")
    return tune, None if lora is None else config_from_dict(LoRAConfig, dict(lora), "model.init_args.lora")


def read_setup(keys: Keys, paper_formats: bool = False) -> Setup:
    """Returns how a recipe trains its stage.

    Args:
        keys: Keys of the recipe.
        paper_formats: Whether numbers are stored as in the paper. Defaults to False.

    Raises:
        UnknownNameError: The strategy, the precision or the format of the moments is unknown.
        ValueError: A value cannot be planned with.
    """
    values: dict[str, Any] = {"devices": _devices(keys), "paper_formats": paper_formats}
    for field, key in INTEGERS.items():
        value = value_at(keys, key)
        if value is not None:
            values[field] = _integer(key, value)
    for field, key in NAMES.items():
        value = value_at(keys, key)
        if value is not None and not isinstance(value, str | int):
            raise ValueError(f"{key} must be a name for a plan, got {value!r}")
        if value is not None:
            values[field] = str(value)
    recompute = value_at(keys, "model.init_args.recompute")
    if recompute is not None and not isinstance(recompute, bool):
        raise ValueError(f"model.init_args.recompute must be true or false, got {recompute!r}")
    steps = value_at(keys, "trainer.max_steps")
    if steps is not None and _integer("trainer.max_steps", steps) > 0:
        values["steps"] = steps
    clips = value_at(keys, "model.init_args.adamw.variance_clip") is not None
    if "variance_clip" not in (value_at(keys, "model.init_args.adamw") or {}):
        workload = WORKLOADS.get(_module(keys))
        clips = workload is not None and workload.clips_variance
    average = _average(value_at(keys, "trainer.callbacks") or [])
    return Setup(
        **values,
        recompute=bool(recompute),
        clips_variance=clips,
        muon_iterations=_muon_iterations(value_at(keys, "model.init_args.muon")),
        on_cpu=value_at(keys, "trainer.accelerator") == "cpu",
        average=average,
    )


def _muon_iterations(values: Any) -> int:
    if values is None:
        return 0
    if not isinstance(values, Mapping):
        raise ValueError(f"model.init_args.muon must hold keys of MuonConfig, got {values!r}")
    return _integer("model.init_args.muon.iterations", values.get("iterations", MUON_ITERATIONS))


def check_grid(config: PlannedConfig) -> None:
    """Raises `ValueError` for a grid whose attention would take longer than a second to count."""
    if config.image_height * config.image_width**2 > MOST_COLUMN_PAIRS:
        raise ValueError(
            f"a grid of {config.image_height} x {config.image_width} codes is too large for a plan: height * width^2 "
            f"must be at most {MOST_COLUMN_PAIRS:,}, as for 256 x 256"
        )


def _module(keys: Keys) -> str:
    """Name of the LightningModule's class; empty if there is none."""
    return str(value_at(keys, "model.class_path") or "").rpartition(".")[2]


def _integer(key: str, value: Any) -> int:
    number = as_integer(key, value)
    if abs(number) > LARGEST:
        raise ValueError(f"{key} must be at most {LARGEST:,}, got {number}: nothing of that size can be planned")
    return number


def _devices(keys: Keys) -> int:
    """GPUs per node, from their number or a list of them; on the CPU one process counts as one."""
    value = value_at(keys, "trainer.devices")
    if value in (None, "auto") and value_at(keys, "trainer.accelerator") == "cpu":
        return 1
    if isinstance(value, list):
        return len(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"trainer.devices is {'missing' if value is None else repr(value)}: a plan needs the number of GPUs per "
            "node, such as --trainer.devices 8, or a part that sets it"
        )
    return value


def _average(callbacks: Any) -> Literal["none", "gpu", "host"]:
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, Mapping) and str(callback.get("class_path")).rpartition(".")[2] in AVERAGING:
            return "host" if str((callback.get("init_args") or {}).get("device")) == "cpu" else "gpu"
    return "none"


def _config(config_class: type, values: Any) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"model.init_args.config must hold keys of {config_class.__name__}, got {values!r}")
    counts = [values[name] for name in LAYERS if isinstance(values.get(name), int)]
    if math.prod(counts) > MOST_LAYERS:
        raise ValueError(f"a plan supports at most {MOST_LAYERS:,} layers, got {math.prod(counts):,}")
    return config_from_dict(config_class, values, "model.init_args.config")
