"""``dalle-zoo plan RECIPE``: estimates what training takes, without importing Lightning."""

from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path

from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.outputs import check_file
from dalle_zoo.cli.parser import Parser
from dalle_zoo.planning.hardware import MFU
from dalle_zoo.recipes import Override, complete_key, find_part, find_recipe, read_recipe, resolve, split_arguments

DESCRIPTION = """\
Estimates what training a recipe takes: memory per GPU and whether it fits, changes that would make it fit, operations,
network traffic and time. Nothing is trained or allocated."""
EXAMPLES = """\
  dalle-zoo plan prior/paper-12b --gpu v100-16gb
  dalle-zoo plan prior/paper-12b --gpu a100-80gb --trainer.num_nodes 8 --trainer.strategy hsdp
  dalle-zoo plan prior/tiny --parts 1gpu --gpu-memory 8 --json plan.json
  dalle-zoo plan prior/composition --gpu cpu

Keys of the recipe are given as for `dalle-zoo fit`. Formulas and assumptions: docs/design/planning.md."""


def plan_parser() -> Parser:
    """Returns the parser of the command's options; other options are keys of the recipe."""
    p = Parser(
        prog="dalle-zoo plan",
        usage="dalle-zoo plan RECIPE [options] [--KEY VALUE ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("recipe", metavar="RECIPE", help="name from `dalle-zoo recipes`, or a YAML file")
    p.add_argument("--parts", nargs="+", default=[], metavar="PART", help="parts or YAML files merged into the recipe")
    p.add_argument(
        "--gpu", metavar="NAME", help="GPU, such as v100-16gb: whether it fits, and times; cpu measures this machine"
    )
    p.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of a GPU [of --gpu, or in a part's name]")
    p.add_argument("--reserve", type=float, metavar="GIB", help="memory for CUDA, NCCL and allocator [1.0; paper 0.5]")
    p.add_argument("--mfu", type=float, help=f"share of the peak rate while computing [{MFU}]")
    p.add_argument("--intra", type=float, metavar="GB/S", help="rate of a GPU inside its node [80 %% of its link]")
    p.add_argument("--inter", type=float, metavar="GB/S", help="rate of a node to others [80 %% of its link]")
    p.add_argument("--formats", choices=["native", "paper"], default="native", help="formats of numbers [native]")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the plan as JSON")
    p.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return p


def plan(arguments: list[str]) -> None:
    """Prints what training a recipe takes."""
    options, arguments = plan_parser().parse_known_args(arguments)
    if options.json is not None:
        check_file("--json", options.json, overwrite=options.overwrite)
    overrides, others = split_arguments(arguments)
    files = [read_recipe(path) for path in (find_recipe(options.recipe), *map(find_part, options.parts))]

    from dalle_zoo.files import write_json
    from dalle_zoo.planning.formats import GIB
    from dalle_zoo.planning.hardware import CPU, find_gpu
    from dalle_zoo.planning.measure import measure_cpu
    from dalle_zoo.planning.plan import Hardware, Plan, as_data
    from dalle_zoo.planning.recipe import READ, read_setup, read_work
    from dalle_zoo.planning.report import render

    check_overrides(overrides, others, READ)
    keys = resolve(files, overrides)
    check_numbers(options)
    work, setup = read_work(keys), read_setup(keys, options.formats == "paper")
    measured = options.gpu == CPU
    gpu = measure_cpu(work, setup) if measured else find_gpu(options.gpu) if options.gpu else None
    memory = options.gpu_memory or (gpu.memory if gpu else memory_in(options.parts))
    hardware = Hardware(
        memory=None if memory is None else memory * GIB,
        gpu=gpu,
        mfu=(1.0 if measured else MFU) if options.mfu is None else options.mfu,
        intra=options.intra,
        inter=options.inter,
        reserve=None if options.reserve is None else options.reserve * GIB,
    )
    made = Plan(work, setup, hardware)
    print(render(made, options.recipe))
    if options.json is not None:
        write_json(options.json, as_data(made, options.recipe))


def check_numbers(options: argparse.Namespace) -> None:
    """Raises `UserError` for a number out of range, and for a rate without a GPU."""
    for name in ("gpu_memory", "reserve", "intra", "inter"):
        value = getattr(options, name)
        if value is not None and not (value > 0 or (name == "reserve" and value == 0)):
            raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
    for name in ("mfu", "intra", "inter"):
        if getattr(options, name) is not None and options.gpu is None:
            raise UserError(f"--{name} is for times, which need the GPU: add --gpu NAME")


def check_overrides(overrides: list[Override], others: list[str], read: tuple[str, ...]) -> None:
    """Raises `UserError` for an argument that belongs to no option, and for a key that a plan does not depend on."""
    for key, _ in overrides:
        name = complete_key(key)
        if not any(name == known or name.startswith(f"{known}.") for known in read):
            near = difflib.get_close_matches(name, read, n=1, cutoff=0.6)
            hint = f" Did you mean --{near[0]}?" if near else ""
            raise UserError(
                f"--{key} changes nothing that a plan computes.{hint} It depends on: {', '.join(read)}; omit all "
                "other keys"
            )
    if others:
        raise UserError(f"{others[0]!r} belongs to no option: expected a recipe, then options and keys")


def memory_in(parts: list[str]) -> float | None:
    """Returns the GiB of a GPU from the name of a part such as ``8x16gb``, None if no name has it."""
    sizes = [re.search(r"(\d+)gb$", Path(part).stem) for part in parts]
    found = [float(size.group(1)) for size in sizes if size]
    return found[-1] if found else None
