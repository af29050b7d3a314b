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
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from dalle_zoo.cli.errors import Parser, UserError
from dalle_zoo.cli.keys import KeyChecker, fields_of
from dalle_zoo.hub import new_folder
from dalle_zoo.recipes import find_part, find_recipe, list_recipes
from dalle_zoo.training import StageModule
from dalle_zoo.training.callbacks import PictureLogger, default_loggers
from dalle_zoo.training.checkpoints import Checkpoint, WholeCheckpointIO, newest_checkpoint
from dalle_zoo.training.data_modules import CodeData, PictureData
from dalle_zoo.training.dvae_module import DVAEModule
from dalle_zoo.training.prior_module import PriorModule
from dalle_zoo.training.ranker_module import RankerModule

log = logging.getLogger(__name__)

COMMANDS = ("fit", "validate", "test", "predict")

EXTENDABLE = {"max_steps", "max_epochs", "max_time", "default_root_dir"}
"""Fields of the trainer that may change when a run goes on; the last is where the run lies."""

CONFIG = "config.yaml"
CONFIG_ASIDE = ".config.yaml.part"


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
            save_config_callback=None,
            trainer_defaults={"default_root_dir": str(run)},
            parser_kwargs={"exit_on_error": False} | {name: {"exit_on_error": False} for name in COMMANDS},
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
        state = self.config[self.subcommand].get("ckpt_path")
        if state is not None and not Path(state).exists():
            raise UserError(f"ckpt_path {state!r} does not exist: expected a file below checkpoints/ of a run")
        if self.subcommand != "fit" or not self.run.exists():
            return
        if not self.run.is_dir():
            raise UserError(f"{self.run} is a file: use --run FOLDER for another place")
        if all(path.name == CONFIG_ASIDE for path in self.run.iterdir()):  # killed when it had just begun
            return
        old = read_run(self.run)
        if old is None:
            raise UserError(
                f"{self.run} exists and is no run (it has no {CONFIG} of one): use --run FOLDER for another place"
            )
        if self.overwrite:
            return
        changed = differences(old, yaml.safe_load(self.resolved()))
        changed = [c for c in changed if c.split(":")[0].removeprefix("trainer.") not in EXTENDABLE]
        if changed:
            raise UserError(
                f"{self.run} holds a run of another recipe:\n  " + "\n  ".join(changed[:10]) + "\n"
                "Use --run FOLDER for a new run, or --overwrite to throw the old one away."
            )

    def after_instantiate_classes(self) -> None:
        """Refuses data that the model cannot take, before the run folder is claimed."""
        if self.datamodule is None:
            raise UserError("the recipe has no data: set data.class_path and data.init_args")
        self.model.check_data(self.datamodule)

    def before_fit(self) -> None:
        """Claims the run folder, now that all parts could be built."""
        if not self.trainer.is_global_zero:
            return
        retired = self.run.with_name(f".{self.run.name}.old")
        shutil.rmtree(retired, ignore_errors=True)
        if self.overwrite and self.run.exists():
            self.run.replace(retired)
        self.run.mkdir(parents=True, exist_ok=True)
        aside = self.run / CONFIG_ASIDE
        aside.write_text(self.resolved(), encoding="utf-8")
        aside.replace(self.run / CONFIG)
        shutil.rmtree(retired, ignore_errors=True)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Puts checkpoints, curves and pictures below the run folder."""
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint):
                callback.folder = self.run / "checkpoints"
            if isinstance(callback, PictureLogger):
                callback.folder = self.run / "pictures"
        trainer.loggers = default_loggers(self.run) if self.subcommand == "fit" else []
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("ckpt_path") is None:
            newest = newest_checkpoint(self.run)
            if newest is None and subcommand != "fit":
                raise UserError(f"{self.run} has no checkpoint: run `dalle-zoo fit` first, or pass --ckpt_path FILE")
            if newest is not None:
                log.warning("continuing from %s", newest)
                kwargs["ckpt_path"] = str(newest)
        self.resumed_from: str | None = kwargs.get("ckpt_path")
        return kwargs

    def after_fit(self) -> None:
        """Writes the trained weights, averaged if the recipe averages."""
        if self.trainer.interrupted or not self.trainer.is_global_zero:
            return
        self._average_finished()
        with new_folder(self.run / "model" / self.model.stage, overwrite=True) as folder:
            self.model.export(folder)
        log.warning("weights are in %s", self.run / "model" / self.model.stage)

    def _average_finished(self) -> None:
        """Takes the averaged weights of a run that had ended before: Lightning then skips the hook that does."""
        if self.resumed_from is not None and not self.model.trained:
            state = torch.load(self.resumed_from, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["state_dict"])


def read_run(run: Path) -> dict[str, Any] | None:
    """The resolved recipe of a run folder; None if the folder is no run."""
    path = run / CONFIG
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    ours = isinstance(config, dict) and {"model", "data", "trainer", "checkpoint"} <= config.keys()
    return config if ours else None


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
    return KeyChecker(root, classes, options=("run", "overwrite", "parts"))


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
    parser = recipe_parser(subcommand)
    if arguments[:1] in (["-h"], ["--help"]):  # behind a recipe, --help lists all keys
        parser.print_help()
        return
    known, overrides = parser.parse_known_args(arguments)
    files = [find_recipe(known.recipe), *map(find_part, known.parts)]
    name = known.recipe if known.recipe in list_recipes() else Path(known.recipe).stem
    check_keys(subcommand, files, overrides)
    try:
        ZooCLI(
            known.run or Path("runs") / name,
            known.overwrite,
            [subcommand, *(f"--config={path}" for path in files), *overrides],
        )
    except (ArgumentError, MisconfigurationException, ValueError) as error:
        raise UserError(explain(error)) from error


def recipe_parser(subcommand: str) -> Parser:
    """Parser of our own options; all others are keys of the recipe."""
    p = Parser(
        prog=f"dalle-zoo {subcommand}",
        usage=f"dalle-zoo {subcommand} RECIPE [options] [--KEY VALUE ...]",
        description=f"Every key of a recipe can be given here as well, such as --trainer.max_steps 100;\n"
        f"`dalle-zoo {subcommand} RECIPE --help` lists them all.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    p.add_argument("recipe", metavar="RECIPE", help="name from `dalle-zoo recipes`, or a YAML file")
    p.add_argument("--parts", nargs="+", default=[], metavar="PART", help="parts or YAML files to lay over the recipe")
    p.add_argument("--run", type=Path, metavar="FOLDER", help="folder of the run (runs/RECIPE)")
    p.add_argument("--overwrite", action="store_true", help="throw away what the run holds")
    return p


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
