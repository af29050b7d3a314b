"""The ``dalle-zoo`` command. Each subcommand imports what it needs when it runs, so help is fast."""

from __future__ import annotations

import importlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Sequence

from dalle_zoo.cli.errors import debug_text, explain
from dalle_zoo.registry import suggest
from dalle_zoo.version import __version__

COMMANDS = {
    "demo": ("dalle_zoo.cli.demo:demo", "generate a grid of 16 images with the bundled weights"),
    "generate": ("dalle_zoo.cli.generate:generate", "generate images from a prompt"),
    "serve": ("dalle_zoo.cli.serve:serve", "serve a web page and an HTTP interface that generate images"),
    "reconstruct": (
        "dalle_zoo.cli.reconstruct:reconstruct",
        "encode images with the image tokenizer and decode them",
    ),
    "list": ("dalle_zoo.cli.listing:list_", "list masks, tokenizers, strategies, precisions, schedules, metrics"),
    "recipes": ("dalle_zoo.cli.listing:recipes", "list the recipes, or print one"),
    "inspect": ("dalle_zoo.cli.inspect:inspect", "print what an image was generated with, or what a model contains"),
    "env": ("dalle_zoo.cli.inspect:env", "print versions and devices, for bug reports"),
    "models": ("dalle_zoo.cli.listing:models", "list the models available by name"),
    "masks": ("dalle_zoo.cli.listing:masks", "list or plot the attention masks"),
    "fit": ("dalle_zoo.cli.train:fit", "train a recipe, or resume an interrupted run"),
    "plan": ("dalle_zoo.cli.plan:plan", "estimate what training a recipe takes: memory, time, network traffic"),
    "validate": ("dalle_zoo.cli.train:validate", "compute the metrics of a run on its validation data"),
    "test": ("dalle_zoo.cli.train:test", "like validate, but in the trainer's test loop"),
    "predict": ("dalle_zoo.cli.train:predict", "generate images for a run's validation data"),
    "manifest": ("dalle_zoo.cli.shards:manifest", "count the samples of shards, so that they open at once"),
    "filter": ("dalle_zoo.cli.shards:filter_shards", "copy the samples that pass the paper's filters to new shards"),
    "tokenizer": ("dalle_zoo.cli.prepare:tokenizer", "train a BPE tokenizer on captions"),
    "encode": ("dalle_zoo.cli.prepare:encode", "encode images as code shards"),
    "ray": ("dalle_zoo.cli.ray_tasks:ray", "run encode, filter, tokenizer or overlap on a Ray cluster"),
    "plot": ("dalle_zoo.cli.runs:plot", "plot the training curves of a run"),
    "consolidate": ("dalle_zoo.cli.runs:consolidate", "convert a checkpoint of any strategy to a folder of weights"),
    "average": ("dalle_zoo.cli.runs:average", "write the mean of the weights of several priors"),
    "eval": ("dalle_zoo_eval.command:main", "evaluate a model with a protocol"),
    "compare": ("dalle_zoo_eval.compare:main", "compare two sets of images: folders, archives, models, statistics"),
    "report": ("dalle_zoo_eval.command:report", "render a report from result files"),
    "study": ("dalle_zoo_eval.study.command:main", "compare systems by votes of people"),
    "overlap": ("dalle_zoo_eval.command:overlap", "list benchmark images that are also in a training set"),
    "captions": ("dalle_zoo_eval.caption_lists:main", "write the captions of a protocol as files"),
    "benchmark": ("dalle_zoo_eval.exchange.command:main", "exchange images and results with other benchmarks"),
    "card": ("dalle_zoo_eval.command:card", "render a model card from result files"),
    "convert": ("dalle_zoo.cli.convert:convert", "convert weights of other code bases to a model folder"),
    "publish": ("dalle_zoo.cli.publish:publish", "publish a model folder on the Hub, with its card"),
    "export": ("dalle_zoo.cli.runs:export", "combine trained stages into a model folder"),
}
"""Name to (function, one line of help)."""
DEBUG = "--debug"
"""Option of all commands."""


def usage() -> str:
    """Returns the help page."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dalle-zoo COMMAND [arguments]      dalle-zoo COMMAND --help",
            "",
            "Every command accepts --debug, which prints the traceback of an error.",
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
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that is not UTF-8 must not end a command after its work
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG in arguments
    arguments = [argument for argument in arguments if argument != DEBUG]
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
    except KeyboardInterrupt:
        print(f"\ndalle-zoo {name}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the only place where exceptions become messages
        if debug:
            print(debug_text(error), file=sys.stderr, end="")
        message, status = explain(error)
        print(f"dalle-zoo {name}: {message}", file=sys.stderr)
        return status


def quiet_third_parties() -> None:
    """Hides warnings of libraries that a user cannot act on, and second copies of their lines."""
    # Lightning 2.6 calls a deprecated part of torch's pytree, and warns about every iterable data set with a length;
    # ours divides its samples among workers exactly.
    for message in (
        "treespec, LeafSpec",
        "`IterableDataset` has `__len__` defined",
        "does not have many workers",
        "is smaller than the logging interval",  # which counts the steps of the run, not those of an epoch
        "across ranks is zero",  # of a recipe without validation data, which needs none
        "LightningCLI's args parameter is intended",  # the arguments of the process name a recipe
        "loading a checkpoint outside the 'fit' stage",  # the averaged weights are loaded on purpose
        "You have overridden `on_before_batch_transfer`",  # in the module on purpose: which tokens count depends on it
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    # Lightning calls functions that jsonargparse will rename.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning")
    # Lightning logs advertisements, and which devices do not exist.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    # huggingface_hub has a handler of its own: its lines would be printed twice.
    logging.getLogger("huggingface_hub").propagate = False
    # torchao calls a deprecated function of torch when it is imported.
    logging.getLogger("torch.utils._pytree").addFilter(_is_not_for_users)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in ("Tip:", "GPU available: False", "TPU available: False"))


def _is_not_for_users(record: logging.LogRecord) -> bool:
    return "register_constant() on Enum" not in record.getMessage()
