"""``dalle-zoo fit | validate | test | predict RECIPE``: a thin LightningCLI.

A run is a folder, ``runs/<recipe>`` unless ``--run`` names another:

```
config.yaml    the resolved recipe          checkpoints/   resumable states
metrics/       CSV curves                   pictures/      reconstructions or samples
model/<stage>/ weights and config.json, written when the run ends
```
The same command continues a killed run from its newest checkpoint, to the same result.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.keys import KeyChecker, fields_of
from dalle_zoo.hub import new_folder
from dalle_zoo.recipes import find_part, find_recipe
from dalle_zoo.training import StageModule
from dalle_zoo.training.callbacks import PictureLogger, default_loggers
from dalle_zoo.training.data_modules import CodeData, PictureData  # noqa: F401 (short names in recipes)
from dalle_zoo.training.dvae_module import DVAEModule  # noqa: F401
from dalle_zoo.training.prior_module import PriorModule  # noqa: F401
from dalle_zoo.training.ranker_module import RankerModule  # noqa: F401

log = logging.getLogger(__name__)

EXTENDABLE = {"max_steps", "max_epochs", "max_time"}
"""Fields of the trainer that may change when a run goes on."""


class Checkpoint(ModelCheckpoint):
    """Resumable states: the newest two, named by the update.

    Two, because the older one survives when the machine dies while the newer one is being written.

    Args:
        every: Updates between two states.
    """

    def __init__(self, every: int = 1000) -> None:
        super().__init__(
            filename="{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every,
            monitor="step",
            mode="max",
            save_top_k=2,
        )


class ZooCLI(LightningCLI):
    """LightningCLI with run folders, default callbacks and automatic resume.

    Args:
        run: Folder of the run.
        overwrite: Whether an existing run is thrown away.
        args: Command line for LightningCLI, subcommand first.
    """

    def __init__(self, run: Path, overwrite: bool, args: ArgsType) -> None:
        self.run, self.overwrite = run, overwrite
        super().__init__(
            StageModule,
            None,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=None,  # type: ignore[arg-type]
            trainer_defaults={"default_root_dir": str(run)},
            parser_kwargs={
                name: {"exit_on_error": False} for name in ("fit", "validate", "test", "predict")
            }
            | {"exit_on_error": False},
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds our callbacks, so that recipes and the command line can set their fields."""
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(PictureLogger, "pictures")

    def resolved(self) -> str:
        """The resolved recipe as YAML, without what belongs to one call only."""
        config = self.config[self.subcommand].clone()
        for name in ("config", "ckpt_path", "verbose", "weights_only", "return_predictions"):
            config.pop(name, None)
        parser = self._parser(self.subcommand)
        return str(parser.dump(config, skip_none=False, skip_validation=True))

    def before_instantiate_classes(self) -> None:
        """Refuses a run folder that holds something else, before anything is built."""
        path = self.run / "config.yaml"
        if self.subcommand != "fit" or not self.run.exists() or not any(self.run.iterdir()):
            return
        if not path.is_file():
            raise UserError(f"{self.run} exists and is no run (it has no config.yaml): use --run FOLDER for another")
        if self.overwrite:
            return
        changed = differences(yaml.safe_load(path.read_text()), yaml.safe_load(self.resolved()))
        changed = [c for c in changed if c.split(":")[0].removeprefix("trainer.") not in EXTENDABLE]
        if changed:
            raise UserError(
                f"{self.run} holds a run of another recipe:\n  " + "\n  ".join(changed[:10]) + "\n"
                "Use --run FOLDER for a new run, or --overwrite to throw the old one away."
            )

    def before_fit(self) -> None:
        """Claims the run folder, now that all parts could be built."""
        if not self.trainer.is_global_zero:
            return
        if self.overwrite:
            shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir(parents=True, exist_ok=True)
        aside = self.run / ".config.yaml.part"
        aside.write_text(self.resolved(), encoding="utf-8")
        aside.replace(self.run / "config.yaml")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Puts checkpoints, curves and pictures below the run folder."""
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint):
                callback.dirpath = str(self.run / "checkpoints")
            if isinstance(callback, PictureLogger):
                callback.folder = self.run / "pictures"
        trainer.loggers = default_loggers(self.run) if self.subcommand == "fit" else []
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("ckpt_path") is None:
            newest = newest_checkpoint(self.run)
            if newest is None and subcommand != "fit":
                raise UserError(
                    f"{self.run} has no checkpoint: run `dalle-zoo fit` first, or pass --ckpt_path FILE"
                )
            if newest is not None:
                log.warning("continuing from %s", newest)
                kwargs["ckpt_path"] = str(newest)
        return kwargs

    def after_fit(self) -> None:
        """Writes the trained weights, averaged if the recipe averages."""
        if self.trainer.interrupted or not self.trainer.is_global_zero:
            return
        with new_folder(self.run / "model" / self.model.stage, overwrite=True) as folder:
            self.model.export(folder)
        log.warning("weights are in %s", self.run / "model" / self.model.stage)


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the highest update, or None."""
    found = sorted((run / "checkpoints").glob("*.ckpt"))
    return found[-1] if found else None


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lines "key: old value → new value" for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}):
            lines += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        return lines
    return [] if old == new else [f"{prefix}: {old!r} → {new!r}"]


def key_checker(subcommand: str) -> KeyChecker:
    """Keys of a recipe, and the classes that may stand in it by their short names."""
    method = set(inspect.signature(getattr(Trainer, subcommand)).parameters) - {"self"}
    root: dict[str, Any] = {
        "seed_everything": None,
        "model": None,
        "data": None,
        "trainer": fields_of(Trainer),
        "checkpoint": fields_of(Checkpoint),
        "pictures": fields_of(PictureLogger),
    }
    root |= dict.fromkeys(method - LightningCLI.subcommands()[subcommand])
    stages: list[type] = [DVAEModule, PriorModule, RankerModule]
    data: list[type] = [PictureData, CodeData]
    classes = {"model": {c.__name__: c for c in stages}, "data": {c.__name__: c for c in data}}
    return KeyChecker(root, classes)


def check_keys(subcommand: str, files: list[Path], overrides: list[str]) -> None:
    """Answers an unknown key with the nearest right one, before anything is built."""
    checker = key_checker(subcommand)
    for path in files:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {error}") from None
        checker.check_file(content, str(path))
    for argument, following in itertools.pairwise([*overrides, ""]):
        if argument.startswith("--") and argument not in ("--help", "--print_config"):
            key, _, value = argument[2:].partition("=")
            checker.check_override(key, value or following)


def run_command(subcommand: str, arguments: list[str]) -> None:
    """Entry of the four Lightning commands.

    Args:
        subcommand: "fit", "validate", "test" or "predict".
        arguments: Recipe name, our options, and overrides such as ``--trainer.max_steps 10``.
    """
    parser = argparse.ArgumentParser(prog=f"dalle-zoo {subcommand}", add_help=False, allow_abbrev=False)
    parser.add_argument("recipe")
    parser.add_argument("--parts", nargs="+", default=[])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--overwrite", action="store_true")
    known, overrides = parser.parse_known_args(arguments)
    files = [find_recipe(known.recipe), *map(find_part, known.parts)]
    run = known.run or Path("runs") / Path(known.recipe).with_suffix("")
    check_keys(subcommand, files, overrides)
    # LightningCLI warns when it gets arguments beside those of the process, and logs them as the command.
    sys.argv = ["dalle-zoo"]
    try:
        ZooCLI(run, known.overwrite, [subcommand, *(f"--config={path}" for path in files), *overrides])
    except (ArgumentError, ValueError) as error:
        raise UserError(explain(error)) from error


def explain(error: Exception) -> str:
    """The reason in a parser's message, without the union types and values around it."""
    text = str(error)
    if "Does not validate" not in text:
        return text
    reasons = [line.strip().removeprefix("- ") for line in text.splitlines() if line.lstrip().startswith("- ")]
    return "; ".join(reason for reason in reasons if "NoneType" not in reason) or text


def fit(arguments: list[str]) -> None:
    """Trains a recipe."""
    run_command("fit", arguments)


def validate(arguments: list[str]) -> None:
    """Measures a run on its validation data."""
    run_command("validate", arguments)


def test(arguments: list[str]) -> None:
    """Measures a run by the trainer's test loop."""
    run_command("test", arguments)


def predict(arguments: list[str]) -> None:
    """Draws the pictures of a run's validation data."""
    run_command("predict", arguments)
