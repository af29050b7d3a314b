"""The ``dalle-zoo`` command. Each sub-command imports what it needs when it runs, so help answers at once."""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dalle_zoo.cli.errors import Parser, UserError
from dalle_zoo.registry import suggest
from dalle_zoo.version import __version__

COMMANDS = {
    "demo": ("dalle_zoo.cli.generate:demo", "generate a grid of 16 images with the bundled weights"),
    "generate": ("dalle_zoo.cli.generate:generate", "images from a prompt"),
    "reconstruct": ("dalle_zoo.cli.generate:reconstruct", "images through the image tokenizer and back"),
    "recipes": ("dalle_zoo.cli.listing:recipes", "list the recipes, or show one"),
    "models": ("dalle_zoo.cli.listing:models", "list the models that are known by name"),
    "masks": ("dalle_zoo.cli.listing:masks", "list the attention masks, or plot them"),
    "fit": ("dalle_zoo.cli.train:fit", "train a recipe; the same command continues a killed run"),
    "plan": ("dalle_zoo.cli.plan:plan", "what training of a recipe takes: memory, time, network"),
    "validate": ("dalle_zoo.cli.train:validate", "measure a run on its validation data"),
    "test": ("dalle_zoo.cli.train:test", "like validate, through the trainer's test loop"),
    "predict": ("dalle_zoo.cli.train:predict", "generate the images of a run's validation data"),
    "tokenizer": ("dalle_zoo.cli.prepare:tokenizer", "train a BPE tokenizer on captions"),
    "encode": ("dalle_zoo.cli.prepare:encode", "images to code shards"),
    "plot": ("dalle_zoo.cli.runs:plot", "curves of a run as PNG"),
    "consolidate": ("dalle_zoo.cli.runs:consolidate", "a checkpoint of any strategy to one folder of weights"),
    "eval": ("dalle_zoo_eval.command:main", "measure a model by a protocol"),
    "report": ("dalle_zoo_eval.command:report", "render the report of result files again"),
    "overlap": ("dalle_zoo_eval.command:overlap", "list images of a benchmark that a training set has too"),
    "card": ("dalle_zoo_eval.command:card", "render a model card from result files"),
    "convert": ("dalle_zoo.cli.convert:convert", "weights of other code bases to a dalle-zoo model folder"),
    "publish": ("dalle_zoo.cli.publish:publish", "a model folder to the Hub, with its card"),
    "export": ("dalle_zoo.cli.runs:export", "put trained stages together as one model folder"),
}
"""Name to (function, one line of help)."""


def usage() -> str:
    """The help page."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dalle-zoo COMMAND [arguments]      dalle-zoo COMMAND --help",
            "",
            f"A model zoo for DALL-E, version {__version__}.",
            "",
            *lines,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    Args:
        argv: Arguments without the program's name. Defaults to those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"dalle-zoo: {suggest('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    module, function = COMMANDS[name][0].split(":")
    try:
        run: Callable[[list[str]], int | None] = getattr(importlib.import_module(module), function)
        with warnings.catch_warnings():
            quiet_third_parties()
            return run(rest) or 0
    except (UserError, ValueError, OSError, ImportError) as error:  # ImportError: a package of an extra is missing
        print(f"dalle-zoo {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ndalle-zoo {name}: interrupted", file=sys.stderr)
        return 130


@contextmanager
def without_collection() -> Iterator[None]:
    """Imports without Python's cyclic garbage collection.

    PyTorch makes half a million objects that stay; to look through them again and again takes a tenth of the time.
    """
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # once per process: what was imported is not looked through later either
            gc.freeze()
        gc.enable()


def quiet_third_parties() -> None:
    """Hides what libraries say that tells a user nothing to act on."""
    # lightning 2.6 calls a deprecated part of torch's pytree, and warns of any iterable data set with a length;
    # our loader divides samples among its workers exactly.
    for message in (
        "treespec, LeafSpec",
        "`IterableDataset` has `__len__` defined",
        "does not have many workers",
        "LightningCLI's args parameter is intended",  # it must not read those of the process, which name a recipe
        "loading a checkpoint outside the 'fit' stage",  # its weights are the averaged ones, which is what is wanted
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    # lightning calls what jsonargparse will rename.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning")
    # lightning advertises.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Parser of a light sub-command, with examples kept as written."""
    return Parser(
        prog=f"dalle-zoo {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
