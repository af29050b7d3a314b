"""``dalle-zoo fit | validate | test | predict RECIPE``: argument parsing, without importing PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle_zoo.cli.keys import RESERVED, check_names
from dalle_zoo.cli.parser import Parser
from dalle_zoo.recipes import find_part, find_recipe, list_recipes, read_recipe, split_arguments

WHAT = {
    "fit": "Train a recipe. Run the same command again to resume an interrupted run from its newest checkpoint.",
    "validate": "Compute the metrics of a run on its validation data.",
    "test": "Compute the metrics of a run on its validation data, in the trainer's test loop.",
    "predict": "Generate images for a run's validation data. A dVAE reconstructs every image. A prior generates\n"
    "images for the first captions of each batch, at most --model.num_samples. A ranker generates nothing.",
}
EXAMPLES = """\
Any key of a recipe can be overridden on the command line:

  dalle-zoo {command} prior/tiny --trainer.accelerator cpu --data.batch_size 2
  dalle-zoo {command} prior/tiny --model.config.width 64 --seed_everything 1 --run runs/wider
  dalle-zoo {command} prior/tiny --parts 1gpu

`dalle-zoo {command} RECIPE --print_config` prints every key with its value,
`dalle-zoo {command} RECIPE --help` lists every key with its meaning and default, those of model and data first."""


def recipe_parser(subcommand: str) -> Parser:
    """Returns the parser of the command's options; other options are keys of the recipe."""
    p = Parser(
        prog=f"dalle-zoo {subcommand}",
        usage=f"dalle-zoo {subcommand} RECIPE [options] [--KEY VALUE ...]",
        description=WHAT[subcommand],
        epilog=EXAMPLES.format(command=subcommand),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    p.add_argument("recipe", metavar="RECIPE", help="name from `dalle-zoo recipes`, or a YAML file")
    p.add_argument("--parts", nargs="+", default=[], metavar="PART", help="parts or YAML files merged into the recipe")
    p.add_argument("--run", type=run_folder, metavar="FOLDER", help="folder of the run [runs/RECIPE]")
    if subcommand == "fit":
        p.add_argument("--overwrite", action="store_true", help="replace an existing run")
    return p


def run_folder(text: str) -> Path:
    """Returns the folder of a run; "." and ".." become absolute, since files are written next to it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a folder, got nothing: is a variable of the shell unset?")
    path = Path(text)
    return path if path.name not in ("", "..") else path.resolve()


def run_command(subcommand: str, arguments: list[str]) -> None:
    """Runs one of the four Lightning commands.

    Args:
        subcommand: "fit", "validate", "test" or "predict".
        arguments: Recipe, options, and keys such as ``--trainer.max_steps 10``.
    """
    parser = recipe_parser(subcommand)
    if arguments[:1] in (["-h"], ["--help"]):  # after a recipe, --help lists all keys
        parser.print_help()
        return
    known, overrides = parser.parse_known_args(arguments)
    files = {path: read_recipe(path) for path in (find_recipe(known.recipe), *map(find_part, known.parts))}
    check_names(subcommand, files, split_arguments(overrides, reserved=RESERVED)[0])
    name = known.recipe if known.recipe in list_recipes() else Path(known.recipe).stem

    from dalle_zoo.cli.fit import run_recipe  # loads PyTorch and Lightning, which takes seconds

    if "-h" in overrides or "--help" in overrides:
        from dalle_zoo.cli.key_help import print_keys

        print_keys(parser, subcommand, files, split_arguments(overrides, reserved=("-h", "--help"))[0])
        return
    run_recipe(subcommand, known.run or Path("runs") / name, getattr(known, "overwrite", False), files, overrides)


def fit(arguments: list[str]) -> None:
    """Trains a recipe."""
    run_command("fit", arguments)


def validate(arguments: list[str]) -> None:
    """Computes the metrics of a run on its validation data."""
    run_command("validate", arguments)


def test(arguments: list[str]) -> None:
    """Computes the metrics of a run in the trainer's test loop."""
    run_command("test", arguments)


def predict(arguments: list[str]) -> None:
    """Generates images for a run's validation data."""
    run_command("predict", arguments)
