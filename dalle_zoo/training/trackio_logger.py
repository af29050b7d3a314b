"""A logger for trackio, which has none of Lightning's: its functions are those of wandb."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image


class TrackioLogger(Logger):
    """Sends curves, settings and images to a run of trackio.

    The run is continued if it exists. It is stored where trackio stores all runs, in ``TRACKIO_DIR`` or in the cache
    of Hugging Face, from which ``trackio show`` reads it; nothing is sent anywhere without a Space or a server.

    Args:
        project: Project of the run.
        name: Name of the run, unique in its project.
        space_id: Space on the Hub that shows the run. Defaults to none.
        server_url: Server of trackio that shows it. Defaults to none.
    """

    def __init__(self, project: str, name: str, space_id: str | None = None, server_url: str | None = None) -> None:
        super().__init__()
        self.project, self.run_name = project, name
        self.places = {"space_id": space_id, "server_url": server_url}
        self._config: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        """Name of the project."""
        return self.project

    @property
    def version(self) -> str:
        """Name of the run."""
        return self.run_name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of trackio, which begins or continues when it is first needed."""
        if self._run is None:
            import trackio

            with _silent():
                self._run = trackio.init(
                    self.project,
                    name=self.run_name,
                    resume="allow",
                    config=self._config,
                    auto_log_cpu=False,  # the telemetry of the run is logged anyway
                    auto_log_gpu=False,
                    embed=False,
                    **self.places,
                )
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Stores the settings, which replace those of an earlier start."""
        self._config = dict(params) if isinstance(params, dict) else vars(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Sends a row of metrics."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Image.Image], step: int | None = None) -> None:
        """Sends images under one name."""
        import trackio

        for image in images:
            self.experiment.log({key: trackio.Image(image)}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Waits until all rows are stored."""
        if self._run is not None:
            import trackio

            with _silent():
                trackio.finish()
            self._run = None


def _silent() -> contextlib.redirect_stdout[io.StringIO]:
    """Drops what trackio prints about its own commands."""
    return contextlib.redirect_stdout(io.StringIO())
