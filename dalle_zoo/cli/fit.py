"""Runs of recipes: a thin LightningCLI behind ``dalle-zoo fit | validate | test | predict``.

A run is a folder, ``runs/<recipe>`` unless ``--run`` names another:

```
config.yaml    the resolved recipe          checkpoints/   resumable checkpoints
run.json       versions, hardware, data     images/        reconstructions or samples
metrics/       CSV curves                   model/<stage>/ weights and config.json, written when the run ends
```
The same command resumes an interrupted run from its newest checkpoint, with the same result.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dalle_zoo.claims import CLAIM, Claims
from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.keys import OPTIONS, RESERVED, TOP_KEYS, KeyChecker, fields_of
from dalle_zoo.cli.parser_errors import explain
from dalle_zoo.cli.run_folder import CONFIG, check_same_recipe, describe_start, read_record, write_record
from dalle_zoo.cli.trainer_options import check_trainer
from dalle_zoo.files import atomic_write, new_folder
from dalle_zoo.planning.recipe import read_setup, read_work
from dalle_zoo.recipes import Keys, Override, merge, override, resolve, resolve_shares, split_arguments, value_at
from dalle_zoo.training import STAGES, StageModule
from dalle_zoo.training.averaging import WeightEMA
from dalle_zoo.training.base import deferred_weights
from dalle_zoo.training.callbacks import ImageLogger
from dalle_zoo.training.checkpoints import AtomicCheckpointIO
from dalle_zoo.training.curves import CurveLogger
from dalle_zoo.training.finite import FiniteGuard, check_weights
from dalle_zoo.training.integrity import check_intact, newest_intact
from dalle_zoo.training.launcher import tied_to_launcher
from dalle_zoo.training.loggers import Spec, completed, listed, start
from dalle_zoo.training.progress import quieter
from dalle_zoo.training.saving import Checkpoint
from dalle_zoo.training.strategies import defers_weights
from dalle_zoo.training.strategy_hooks import hooks_of
from dalle_zoo.training.telemetry import Telemetry
from dalle_zoo.training.trainer import ZooTrainer
from dalle_zoo.training.watch import RankWatch
from dalle_zoo.workspaces import claimed_folder, new_path, place_folder, recover, workspace

log = logging.getLogger(__name__)

T = TypeVar("T")

COMMANDS = ("fit", "validate", "test", "predict")


class ZooCLI(LightningCLI):
    """LightningCLI with run folders, default callbacks and automatic resume.

    Args:
        run: Folder of the run.
        overwrite: Whether to replace an existing run.
        claims: Receives the claim on the run folder, for as long as the run lasts.
        args: Command line for LightningCLI, subcommand first.
        loggers: Loggers as the recipe names them, from `loggers.listed`. Defaults to none.
    """

    def __init__(
        self, run: Path, overwrite: bool, claims: ExitStack, args: ArgsType, loggers: Sequence[Spec] = ()
    ) -> None:
        self.run, self.overwrite, self.claims, self.loggers = run, overwrite, claims, list(loggers)
        super().__init__(
            StageModule,
            None,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=None,
            trainer_class=ZooTrainer,
            trainer_defaults={"default_root_dir": str(run)},
            parser_kwargs={"exit_on_error": False} | {name: {"exit_on_error": False} for name in COMMANDS},
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks of every run, so that recipes and the command line can set their options."""
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(ImageLogger, "samples")
        parser.add_lightning_class_args(Telemetry, "telemetry")
        parser.add_lightning_class_args(RankWatch, "watch")

    def resolved(self) -> str:
        """Returns the resolved recipe as YAML, without the options of a single call."""
        config = self.config[self.subcommand].clone()
        for name in ("config", "ckpt_path", "verbose", "weights_only", "return_predictions"):
            config.pop(name, None)
        config.trainer.logger = self.loggers or None  # without folders and ids, which belong to this run
        parser = self._parser(self.subcommand)
        return str(parser.dump(config, skip_unset=False, skip_validation=True))

    def before_instantiate_classes(self) -> None:
        """Rejects options that cannot work, and a folder that is not this run's, before building anything."""
        state = self.config[self.subcommand].get("ckpt_path")
        if state is not None and not Path(state).exists():
            raise UserError(f"ckpt_path {state!r} does not exist: expected a file in checkpoints/ of a run")
        check_trainer(self.config[self.subcommand].trainer)
        self._check_memory()
        if self.subcommand == "fit":
            check_same_recipe(self.run, yaml.safe_load(self.resolved()), self.overwrite)

    def _check_memory(self) -> None:
        """Rejects a network that does not fit into this machine's memory, before its weights are allocated."""
        config = self.config[self.subcommand]
        if defers_weights(config.trainer.strategy):
            return  # no process allocates all of it
        sizes = (config.model.get("init_args") or {}).get("config") if config.model else None
        stage = find_stage(config.model.class_path) if config.model else None
        if sizes is None or stage is None:
            return
        on_cpu = config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
        trains = self.subcommand == "fit" and on_cpu  # a GPU trains weights that are made on the CPU
        callbacks = [callback.class_path.rpartition(".")[2] for callback in config.trainer.callbacks or []]
        built = stage.config_class(**vars(sizes))
        needed = stage.memory_needed(built, trains=trains, averages=trains and WeightEMA.__name__ in callbacks)
        memory = machine_memory()
        if sum(needed.values()) > memory:
            raise UserError(
                f"the {stage.stage} has {stage.num_parameters(built) / 1e9:.3g} billion parameters: "
                f"{' + '.join(needed)} in float32 take {sum(needed.values()) / 1e9:.3g} GB, this machine has "
                f"{memory / 1e9:.3g} GB. Use a smaller model.init_args.config, or a strategy that shards it: "
                "`dalle-zoo plan` shows what fits."
            )

    def instantiate_classes(self) -> None:
        """Builds a network that will be sharded without weights: each process initializes only its own shard."""
        with deferred_weights() if defers_weights(self.config[self.subcommand].trainer.strategy) else nullcontext():
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """Opens the data and rejects what the model cannot use, before the run folder is claimed."""
        if self.subcommand == "predict" and not self.model.has_sample_images:
            raise UserError(
                f"{type(self.model).__name__} has nothing to generate: predict takes a dVAE, or a prior with an "
                "image_tokenizer; for other runs use validate"
            )
        if self.subcommand == "predict" and hooks_of(self.trainer.strategy).shards:
            raise UserError("a sharded network cannot generate images: predict with --trainer.strategy auto or ddp")
        if self.datamodule is None:
            raise UserError("the recipe has no data: set data.class_path and data.init_args")
        # Lightning does all again on every rank, but only after its loggers have written to the run folder.
        self.model.complete_data(self.datamodule)
        self.datamodule.setup(self.subcommand)
        self.model.check_data(self.datamodule)
        if self.subcommand == "fit":
            if self.trainer.max_steps > 0:
                self.model.check_length(self.trainer.max_steps)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, ImageLogger):
                    callback.check(self.model, self.datamodule)
        elif getattr(self.datamodule, "val", "") is None:
            raise UserError(f"{self.subcommand} needs validation data, and the recipe has none: set data.val")

    def before_fit(self) -> None:
        """Claims the run folder, after everything else was built."""
        if not self.trainer.is_global_zero:
            return
        if self.overwrite and self.run.exists():
            with Claims() as replaced:
                replaced.hold(self.run / CLAIM, self.run)
                self._replace_run()
        self.claims.enter_context(claimed_folder(self.run))
        self._write_config(self.run)
        self._write_record()

    def _write_record(self) -> None:
        """Records this start, with the ids of remote runs, which a resumed run continues."""
        record = read_record(self.run)
        if not record:
            steps = self.trainer.max_steps
            record = {"length": steps if steps > 0 else None}
        begun, settings = record.get("loggers", {}), yaml.safe_load(self.resolved())
        record["loggers"] = {**begun, **start(self.loggers, self.trainer.loggers[1:], begun, settings)}
        found = self.model.collect_fingerprints(self.datamodule)
        write_record(self.run, record, describe_start(found, self.trainer.world_size))

    def _replace_run(self) -> None:
        """Exchanges an earlier run for one that has only its recipe yet."""
        run = self.run.resolve()
        with workspace(run, wait=False) as aside:
            new = new_path(aside)
            new.mkdir()
            self._write_config(new)
            place_folder(new, run, replace=True)

    def _write_config(self, folder: Path) -> None:
        with atomic_write(folder / CONFIG) as temporary:
            temporary.write_text(self.resolved(), encoding="utf-8")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Directs checkpoints, curves and images to the run folder."""
        fits = self.subcommand == "fit"
        loggers = [CurveLogger(self.run), *(self.config_init[self.subcommand].trainer.logger or [])] if fits else False
        chosen = list(self.config_init[self.subcommand].trainer.callbacks or [])  # a list that Lightning extends
        trainer = super().instantiate_trainer(logger=loggers, **kwargs)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [
            FiniteGuard(),
            *(callback if callback in chosen else quieter(callback, fits) for callback in callbacks),
        ]
        for callback in callbacks:
            if isinstance(callback, Checkpoint):
                callback.folder = self.run / "checkpoints"
            if isinstance(callback, ImageLogger):
                callback.folder = self.run / "images"
            if isinstance(callback, Telemetry):
                recipe = yaml.safe_load(self.resolved())
                callback.work, callback.planned = or_none(read_work, recipe), or_none(read_setup, recipe)
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("ckpt_path") is not None:
            check_intact(Path(kwargs["ckpt_path"]))
        else:
            newest = newest_intact(self.run)
            if newest is None and subcommand != "fit":
                raise UserError(f"{self.run} has no checkpoint: run `dalle-zoo fit` first, or pass --ckpt_path FILE")
            if newest is not None:
                log.warning("continuing from %s", newest)
                kwargs["ckpt_path"] = str(newest)
        return kwargs

    def after_fit(self) -> None:
        """Writes the trained weights; the averaged ones if the recipe averages."""
        if self.trainer.interrupted:
            return
        if not self.model.trained:  # the run was complete already: Lightning skips the hook that does this
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightEMA):
                    callback.copy_to(self.model)
        check_weights(self.model, "no model is exported")
        weights = hooks_of(self.trainer.strategy).unsharded_weights("net.")
        if not self.trainer.is_global_zero:
            return
        for name, write in self.model.exports(weights).items():
            with new_folder(self.run / "model" / name, overwrite=True) as folder:
                write(folder)
            log.warning("weights are in %s", self.run / "model" / name)


def find_stage(class_path: str) -> type[StageModule] | None:
    """Returns the stage module that a class path names; None for an external class."""
    return next((stage for stage in STAGES.values() if class_path.rpartition(".")[2] == stage.__name__), None)


def machine_memory() -> int:
    """Returns the memory of this machine, bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def or_none(read: Callable[[Keys], T], recipe: Keys) -> T | None:
    """Returns what a function of `dalle-zoo plan` reads from a recipe; None if it cannot plan it."""
    try:
        return read(recipe)
    except ValueError:
        return None


def key_checker(subcommand: str) -> KeyChecker:
    """Returns a checker of the keys of a recipe, and of the classes that it can name without their module."""
    root: dict[str, Any] = dict.fromkeys(TOP_KEYS[subcommand]) | {
        "trainer": fields_of(Trainer),
        "checkpoint": fields_of(Checkpoint),
        "samples": fields_of(ImageLogger),
        "telemetry": fields_of(Telemetry),
        "watch": fields_of(RankWatch),
    }
    classes: dict[str, dict[str, type]] = {
        "model": {stage.__name__: stage for stage in STAGES.values()},
        "data": {cls.__name__: cls for stage in STAGES.values() for cls in stage.data_classes},
    }
    return KeyChecker(root, classes)


def check_keys(subcommand: str, files: Mapping[Path, Keys], overrides: Iterable[Override]) -> None:
    """Raises `UserError` for an unknown key, with the nearest known one, before anything is built."""
    checker = key_checker(subcommand)
    for path, content in files.items():
        checker.check(content, str(path))
    for key, text in overrides:
        if key == "trainer.default_root_dir":
            raise UserError("trainer.default_root_dir is the folder of the run: use --run FOLDER")
        checker.check(override(key, text or ""), "command line", options=OPTIONS[subcommand])


def run_recipe(
    subcommand: str, run: Path, overwrite: bool, files: Mapping[Path, Keys], arguments: Sequence[str]
) -> None:
    """Runs a Lightning command.

    Args:
        subcommand: "fit", "validate", "test" or "predict".
        run: Folder of the run.
        overwrite: Whether to replace an existing run.
        files: Recipe and parts, path to content; later ones win.
        arguments: Keys such as ``--trainer.max_steps 10``, ``--help`` or ``--print_config``.
    """
    logging.getLogger("lightning").handlers.clear()  # on import it gets one, which would print every line twice
    overrides, others = split_arguments(arguments, reserved=RESERVED)
    check_keys(subcommand, files, overrides)
    # It is read as YAML, which has no surrogate pairs, so other characters than ASCII are not escaped.
    record = read_record(run, overwrite)
    resolved = resolve_shares(resolve(files.values(), overrides), record.get("length"))
    loggers = listed(value_at(resolved, "trainer.logger")) if subcommand == "fit" else []
    resolved = merge(resolved, {"trainer": {"logger": completed(loggers, run, record.get("loggers", {}))}})
    keys = json.dumps(resolved, ensure_ascii=False)
    if broken := re.search(r'[^"]*[\ud800-\udfff][^"]*', keys):
        raise UserError(
            f"{broken[0]!a} is not valid Unicode, as a name that is not UTF-8: rename it, or correct the key"
        )
    recover(run)
    try:
        with tied_to_launcher(), ExitStack() as claims:
            ZooCLI(run, overwrite, claims, [subcommand, f"--config={keys}", *others], loggers)
    except (ArgumentError, MisconfigurationException, ValueError) as error:
        raise UserError(explain(error)) from error
    except SIGTERMException:
        rank_zero_only(log.warning)("ended by SIGTERM: the same command resumes from the newest checkpoint in %s", run)
        raise
    finally:
        if torch.distributed.is_initialized():
            # Its threads release Python objects: when one does while the interpreter ends, C++ ends the process with
            # "terminate called without an active exception".
            torch.distributed.destroy_process_group()
