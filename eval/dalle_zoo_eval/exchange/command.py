"""The command ``dalle-zoo benchmark``."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle_zoo.cli.outputs import check_file, check_folder
from dalle_zoo.cli.parser import parser
from dalle_zoo.files import check_ending, write_json
from dalle_zoo_eval.exchange.layouts import LAYOUTS, export_layout


def main(arguments: list[str]) -> None:
    """Exports images to other benchmarks, or imports their results: the entry point of ``dalle-zoo benchmark``.

    Args:
        arguments: Command line after ``dalle-zoo benchmark``.
    """
    p = parser(
        "benchmark",
        "Write images in the layout of another benchmark, and bring its result file into a report.\n\n"
        "  dalle-zoo generate --prompts geneval2_data.jsonl --folder images ...\n"
        "  dalle-zoo benchmark export geneval2 images --prompts geneval2_data.jsonl --out image_paths.json\n"
        "  dalle-zoo benchmark import geneval2 score_lists.json --prompts geneval2_data.jsonl --name A --out r.json\n"
        "  dalle-zoo report r.json --out report",
    )
    actions = p.add_subparsers(dest="action", required=True, help="what to do")
    export = actions.add_parser(
        "export", allow_abbrev=False, description="Write images in the layout that a benchmark's own code reads."
    )
    read = actions.add_parser(
        "import", allow_abbrev=False, description="Write a result file of the scores that a benchmark's code computed."
    )
    export.add_argument("layout", choices=LAYOUTS, help="the benchmark")
    export.add_argument("images", type=Path, help="manifest of dalle-zoo generate, or a folder with .txt files")
    export.add_argument("--prompts", type=Path, help="prompts of the benchmark, which must all have an image")
    export.add_argument(
        "--out", type=Path, required=True,
        help="JSON file of geneval2, folder of t2i-compbench, or JSONL file of evalscope",
    )  # fmt: skip
    read.add_argument("layout", choices=LAYOUTS, help="the benchmark")
    read.add_argument("file", type=Path, help="score_lists.json, vqa_result.json, or a report of EvalScope")
    read.add_argument("--name", required=True, help="name of the evaluated system")
    read.add_argument("--prompts", type=Path, help="prompts of the benchmark; evalscope needs none")
    read.add_argument("--part", default="", help="category of t2i-compbench, such as color [the folder of the file]")
    read.add_argument("--out", type=Path, required=True, help="result file to write, NAME.json")
    options = p.parse_args(arguments)
    if options.action == "export":
        _export(options)
    else:
        _import(options)


def _export(options: argparse.Namespace) -> None:
    if options.layout == "t2i-compbench":
        check_folder("--out", options.out, overwrite=None)
    else:
        check_file("--out", options.out)
    count = export_layout(options.layout, options.images, options.out, options.prompts)
    print(f"{options.out}: {count} images")  # noqa: T201 (what a command is for)


def _import(options: argparse.Namespace) -> None:
    check_ending("--out", options.out, (".json",))
    check_file("--out", options.out)
    from dalle_zoo_eval.exchange.imports import import_result
    from dalle_zoo_eval.report import summary

    result = import_result(options.layout, options.file, name=options.name, prompts=options.prompts, part=options.part)
    write_json(options.out, result)
    print(summary([result]))  # noqa: T201
