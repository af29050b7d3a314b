"""A run folder before training begins: whether it holds this run, and the record of its starts.

``config.yaml`` has the resolved recipe. ``run.json`` has the number of steps that shares refer to, the ids of remote
runs and, for each start, the command, versions, commit, hardware, and the fingerprints of the data.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle_zoo.cli.errors import UserError
from dalle_zoo.files import try_read_json, write_json
from dalle_zoo.hub_errors import hide_secrets
from dalle_zoo.inspection import code_version, describe_environment
from dalle_zoo.plain_data import PlainDataError, yaml_value

CONFIG, RECORD = "config.yaml", "run.json"

EXTENDABLE = {
    "trainer.max_steps", "trainer.max_epochs", "trainer.max_time", "trainer.default_root_dir", "trainer.accelerator",
    "trainer.strategy", "trainer.devices", "trainer.num_nodes", "trainer.logger", "trainer.enable_progress_bar",
    "model.init_args.recompute",
}  # fmt: skip
"""Keys that may change when a run is resumed: its length, its folder, and how it uses processes and memory."""
SHOWING = ("images", "samples", "telemetry", "watch")
"""Keys of what a run shows, which may change below; earlier versions wrote ``images``."""
SHARED = "data.init_args.batch_size"
"""Key that may change with the number of processes, so that the batch over all of them can stay the same."""


def read_run(run: Path) -> dict[str, Any] | None:
    """Returns the resolved recipe of a run folder; None if the folder is no run."""
    path = run / CONFIG
    try:
        config = yaml_value(path.read_text(encoding="utf-8"), aliases=True)
    except (OSError, UnicodeDecodeError, PlainDataError):
        return None
    ours = isinstance(config, dict) and {"model", "data", "trainer", "checkpoint"} <= config.keys()
    return config if ours else None


def has_begun(run: Path) -> bool:
    """Returns whether a folder has more than the files that a run writes before its first step."""
    return run.is_dir() and any(path.name not in (CONFIG, RECORD) for path in run.iterdir() if path.name[0] != ".")


def check_same_recipe(run: Path, recipe: Mapping[str, Any], overwrite: bool) -> None:
    """Raises `UserError` for a folder that is no run, or that holds the run of another recipe.

    Args:
        run: The folder, which need not exist.
        recipe: The resolved recipe.
        overwrite: Whether an existing run may be replaced.
    """
    if not run.exists():
        return
    if not run.is_dir():
        raise UserError(f"{run} is a file: use --run FOLDER for another folder")
    if all(path.name.startswith(".") for path in run.iterdir()):  # killed right after its start
        return
    old = read_run(run)
    if old is None:
        raise UserError(
            f"{run} exists and is not a run (it has no valid {CONFIG}): use --run FOLDER for another folder"
        )
    if overwrite or not has_begun(run):
        return  # a run that ended before its first step, such as one with too little data, has nothing to lose
    changes = {line.partition(":")[0]: line for line in differences(old, recipe)}
    spread = {"trainer.devices", "trainer.num_nodes"} & changes.keys()
    changed = [
        line
        for key, line in changes.items()
        if key not in EXTENDABLE and key.partition(".")[0] not in SHOWING and not (spread and key == SHARED)
    ]
    if changed:
        raise UserError(
            f"{run} holds a run of another recipe:\n  " + "\n  ".join(changed[:10]) + "\n"
            "Use --run FOLDER for a new run, or --overwrite to replace the old one."
        )


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Returns a line "key: old value → new value" for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}):
            lines += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        return lines
    return [] if old == new else [f"{prefix}: {old!r} → {new!r}"]


# ------------------------------------------------------------ the record


def read_record(run: Path, overwrite: bool = False) -> dict[str, Any]:
    """Returns the record of a run that goes on; empty for one that begins.

    Args:
        run: Folder of the run.
        overwrite: Whether the run is replaced. Defaults to False.
    """
    if overwrite or not has_begun(run):
        return {}
    config = read_run(run) or {}
    steps = (config.get("trainer") or {}).get("max_steps")  # of a run of an earlier version, which had no record
    return {"length": steps, "loggers": {}, "starts": [], **(try_read_json(run / RECORD) or {})}


def describe_start(fingerprints: Mapping[str, str], processes: int) -> dict[str, Any]:
    """Describes a start of a run: command, code, environment and data.

    Args:
        fingerprints: SHA-256 of data and tokenizers, by the key that names them.
        processes: Number of processes that train.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": hide_secrets(shlex.join(["dalle-zoo", *sys.argv[1:]])),
        "code": code_version(),
        "processes": processes,
        "environment": describe_environment(),
        "fingerprints": dict(fingerprints),
    }


def write_record(folder: Path, record: Mapping[str, Any], start: Mapping[str, Any]) -> None:
    """Writes the record of a run, with one more start.

    Args:
        folder: Folder of the run.
        record: The record, from `read_record`, with ``length`` and ``loggers``.
        start: From `describe_start`.
    """
    write_json(folder / RECORD, {**record, "starts": [*record.get("starts", []), dict(start)]})
