"""Loggers of a run beside its CSV file, by short names, with the run they continue.

| name | class | default place | a resumed run continues |
|---|---|---|---|
| ``tensorboard`` | Lightning's `TensorBoardLogger` | ``tensorboard/`` in the run folder | the folder |
| ``wandb`` | Lightning's `WandbLogger` | ``wandb/`` in the run folder, offline | the run of the recorded id |
| ``mlflow`` | Lightning's `MLFlowLogger` | ``mlflow.db``, ``mlruns/`` in the run folder | the run of the recorded id |
| ``trackio`` | `TrackioLogger` | trackio's own folder | the run of the recorded name |
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from dalle_zoo.registry import suggest
from dalle_zoo.training.curves import CurveLogger

Spec = dict[str, Any]
"""A logger as recipes describe it: ``class_path`` and ``init_args``."""
PROJECT = "dalle-zoo"
"""Project or experiment of a logger that is given none."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a run needs to know of a logger."""

    path: str
    """Path of the class."""
    package: str
    """Package that the class imports, which need not be installed."""
    defaults: Callable[[Path], Mapping[str, Any]]
    """Arguments for a run folder, unless they are given."""
    id_argument: str | None = None
    """Argument that makes it continue an earlier run."""
    id_attribute: str = ""
    """Attribute that then has the id; reading it may create the run."""
    new_id: Callable[[Path], str | None] = lambda run: None
    """Returns the id of a new run, by its folder; None if the service chooses it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that keep the package from printing about itself, unless they are set."""
    replaces_settings: bool = False
    """Whether each start replaces the settings of the run, even by none."""

    @property
    def name(self) -> str:
        """Name of the class."""
        return self.path.rpartition(".")[2]


KINDS: Mapping[str, Kind] = {
    "tensorboard": Kind(
        path="lightning.pytorch.loggers.TensorBoardLogger",
        package="tensorboard",
        defaults=lambda run: {"save_dir": str(run), "name": "tensorboard", "version": ""},
    ),
    "wandb": Kind(
        path="lightning.pytorch.loggers.WandbLogger",
        package="wandb",
        defaults=lambda run: {
            "save_dir": str(run),
            "project": PROJECT,
            "name": run.name,
            "offline": True,
            "resume": "allow",
        },
        id_argument="id",
        id_attribute="version",
        new_id=lambda run: _random(),
        environment={"WANDB_SILENT": "true"},
    ),
    "mlflow": Kind(
        path="lightning.pytorch.loggers.MLFlowLogger",
        package="mlflow",
        defaults=lambda run: {
            "tracking_uri": f"sqlite:///{run.absolute() / 'mlflow.db'}",
            "artifact_location": f"file:{run.absolute() / 'mlruns'}",
            "experiment_name": PROJECT,
            "run_name": run.name,
        },
        id_argument="run_id",
        id_attribute="run_id",
    ),
    "trackio": Kind(
        path="dalle_zoo.training.trackio_logger.TrackioLogger",
        package="trackio",
        defaults=lambda run: {"project": PROJECT},
        id_argument="name",
        id_attribute="version",
        new_id=lambda run: f"{run.name}-{_random()}",
        replaces_settings=True,
    ),
}
"""Loggers by the short names of recipes."""


def _random() -> str:
    return uuid.uuid4().hex[:8]


def listed(value: Any) -> list[Spec]:
    """Returns the loggers that ``trainer.logger`` asks for, in the form of `Spec`.

    Args:
        value: None or True for none, a name, a class path, a mapping with ``class_path``, or a list of them.

    Raises:
        ValueError: It asks for no curves at all, or an entry is none of these or unknown.
    """
    if value is None or value is True:
        return []
    if value is False:
        raise ValueError("trainer.logger cannot be False: a run always writes its curves to metrics/")
    return [_spec(entry) for entry in (value if isinstance(value, list) else [value])]


def _spec(entry: Any) -> Spec:
    known = {name: kind.path for short, kind in KINDS.items() for name in (short, kind.name)}
    mapping: Any = {"class_path": entry} if isinstance(entry, str) else entry
    if not isinstance(mapping, Mapping) or not isinstance(mapping.get("class_path"), str):
        raise ValueError(f"trainer.logger must name loggers, got {entry!r}: use {', '.join(KINDS)}, or a class path")
    path = mapping["class_path"]
    if path in known:
        path = known[path]
    elif "." not in path:
        raise ValueError(f"trainer.logger: {suggest('logger', path, KINDS)}. The path of a class works as well")
    return {"class_path": path, "init_args": dict(mapping.get("init_args") or {})}


def completed(specs: Sequence[Spec], run: Path, ids: Mapping[str, str]) -> list[Spec]:
    """Adds the defaults of a run folder, and the ids of the remote runs that it continues.

    Args:
        specs: Loggers, from `listed`.
        run: Folder of the run.
        ids: Ids that `start` returned when the run began, empty for a new run.

    Raises:
        ImportError: A logger's package is not installed.
    """
    made = []
    for key, (short, kind), spec in _keyed(specs):
        if kind is None:
            made.append(spec)
            continue
        if find_spec(kind.package) is None:
            raise ImportError(f"trainer.logger {short} needs {kind.package}: pip install 'dalle-zoo[{short}]'")
        for name, value in kind.environment.items():
            os.environ.setdefault(name, value)
        chosen = ids.get(key) or kind.new_id(run)
        continued = {kind.id_argument: chosen} if kind.id_argument and chosen else {}
        made.append({**spec, "init_args": {**kind.defaults(run), **continued, **spec["init_args"]}})
    return made


def start(
    specs: Sequence[Spec], loggers: Sequence[Logger], begun: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, str]:
    """Sends the settings to the loggers that have none yet; a service that chooses ids creates its run now.

    Args:
        specs: Loggers, from `listed`.
        loggers: The objects, in the same order.
        begun: What this function returned at earlier starts of the run; empty for a new run.
        settings: The resolved recipe.

    Returns:
        Ids of remote runs by logger, ``""`` for loggers without ids.
    """
    found = {}
    for (key, (_, kind), _), logger in zip(_keyed(specs), loggers, strict=True):
        if key not in begun or (kind is not None and kind.replaces_settings):
            logger.log_hyperparams(dict(settings))
        has_id = kind is not None and kind.id_argument is not None
        found[key] = str(getattr(logger, kind.id_attribute)) if kind is not None and has_id else ""
    return found


def _keyed(specs: Iterable[Spec]) -> list[tuple[str, tuple[str, Kind | None], Spec]]:
    """A key that is unique in the run, name and kind, for each logger; external classes have no kind."""
    found: list[tuple[str, tuple[str, Kind | None], Spec]] = []
    for spec in specs:
        name = spec["class_path"].rpartition(".")[2]
        short, kind = next(((s, k) for s, k in KINDS.items() if spec["class_path"] == k.path), (name, None))
        number = sum(key.partition("-")[0] == short for key, _, _ in found)
        found.append((f"{short}-{number + 1}" if number else short, (short, kind), spec))
    return found


@rank_zero_only
def rewind(logger: Logger, step: int) -> None:
    """Hides the rows of a step and of later ones, which a run that resumes at this step logs again.

    W&B can do this on its server only, by its own count of rows; MLflow and trackio cannot.
    """
    if isinstance(logger, CurveLogger):
        logger.rewind(step)
        return
    writer: Any = getattr(logger, "experiment", None)
    if hasattr(writer, "purge_step"):  # TensorBoard
        writer.close()
        writer.purge_step = max(step, 1)  # of the file that the next row begins; step 0 has the settings of the run


def log_image(logger: Logger, name: str, image: Image.Image, step: int) -> None:
    """Sends an image to a logger that accepts images; others ignore it."""
    if hasattr(logger, "log_image"):  # W&B and trackio
        logger.log_image(key=name, images=[image], step=step)
        return
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):  # TensorBoard
        import numpy as np

        experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
    elif hasattr(experiment, "log_image"):  # MLflow's client
        experiment.log_image(logger.run_id, image, key=name.replace("/", "_"), step=step)  # type: ignore[attr-defined]
