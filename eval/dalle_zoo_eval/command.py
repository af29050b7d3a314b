"""The commands ``dalle-zoo eval``, ``report``, ``overlap`` and ``card``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from dalle_zoo.cli.errors import UserError, check_device
from dalle_zoo.cli.outputs import check_file, check_folder
from dalle_zoo.cli.parser import parser, path_argument
from dalle_zoo.files import check_ending
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo_eval.data_files import read_yaml
from dalle_zoo_eval.protocol import COPY, TRAIN, Protocol, find_protocol, list_protocols, protocol_file

LISTED = """\
Evaluate a model or a folder of images with a protocol, and write a result file, a report and image sheets. Run the
same command again to resume. `dalle-zoo eval PROTOCOL --help` lists the options.

protocols:
"""


def main(arguments: list[str]) -> None:
    """Runs a protocol: the entry point of ``dalle-zoo eval``.

    Args:
        arguments: Command line after ``dalle-zoo eval``.
    """
    names = list_protocols()
    if not arguments or arguments[0].startswith("-"):
        lines = [f"  {name:<16}{read_yaml(protocol_file(name)).get('title', '')}" for name in names]
        p = parser("eval", LISTED + "\n".join(lines))
        p.add_argument("protocol", help="protocol name, or a YAML file; must be the first argument")
        p.parse_args(arguments[:1] if arguments[:1] in (["-h"], ["--help"]) else [])
    name = arguments[0]
    if name not in names and Path(name).suffix not in (".yaml", ".yml"):
        raise UnknownNameError(suggest("protocol", name, names))
    protocol = find_protocol(name)
    options = _parser(name, protocol).parse_args(arguments)
    check_options(options)
    _check_places(options)
    _run(name, options, shlex.join(["dalle-zoo", "eval", *arguments]))


def check_options(options: argparse.Namespace) -> None:
    """Checks the options that ``eval`` and ``compare`` share: networks, copies, device, and places to write to.

    Raises:
        ValueError: An option cannot be used, needs another one, or is given twice.
    """
    from dalle_zoo_eval.report import Output

    given = [network for network, _ in options.network]
    if len(set(given)) != len(given):
        raise ValueError(f"--network names {max(given, key=given.count)!r} twice: give each network once")
    for option in ("threshold", "copies_network"):
        if getattr(options, option) is not None and options.training is None:
            raise ValueError(f"--{option.replace('_', '-')} needs --training, the images in which copies are searched")
    check_device(options.device)
    out = Output.of(options.out)
    check_file("--out", out.result)  # a killed evaluation is continued there
    check_folder("--out", out.folder)
    if options.save_reference is not None:
        check_ending("--save-reference", options.save_reference, (".safetensors",))
        check_file("--save-reference", options.save_reference)
    if options.cache is not None:
        check_folder("--cache", options.cache)


def _check_places(options: argparse.Namespace) -> None:
    """Raises an error unless the folders of images exist."""
    for option in ("data", "images"):
        place = getattr(options, option)
        manifest = option == "images" and place is not None and place.suffix == ".jsonl" and place.is_file()
        if place is not None and not place.is_dir() and not manifest:
            problem = "is a file" if place.exists() else "does not exist"
            raise UserError(f"--{option} {place} {problem}: expected a folder")


def _run(name: str, options: argparse.Namespace, command: str) -> None:
    from dalle_zoo.sharing import Share, device_of_environment
    from dalle_zoo_eval.report import Output, summary
    from dalle_zoo_eval.request import Request
    from dalle_zoo_eval.runner import evaluate

    changes = {n: getattr(options, n, None) for n in CHANGES}
    request = Request(
        protocol=name,
        data=options.data,
        out=options.out,
        model=options.model,
        images=options.images,
        layout=options.layout,
        networks=dict(options.network),
        leave_out=tuple(options.leave_out),
        exclusions=options.exclusions,
        reference=options.reference,
        save_reference=options.save_reference,
        changes={n: value for n, value in changes.items() if value is not None},
        training=options.training,
        threshold=COPY if options.threshold is None else options.threshold,
        copies_network=options.copies_network,
        save_images=options.save_images,
        batch_size=options.batch_size,
        cache=options.cache,
        device=device_of_environment(options.device),
        share=Share.of_environment(),
        overwrite=options.overwrite,
        command=command,
    )
    result = evaluate(request)
    if result is None:
        return
    print(summary([result]))  # noqa: T201 (what a command is for)
    for line in result["left_out"]:
        print(f"left out: {line}")  # noqa: T201
    print(f"report: {Output.of(request.out).folder / 'report.html'}")  # noqa: T201


CHANGES = (
    "seed", "captions", "train_captions", "val_captions", "candidates", "temperature", "top_k", "top_p",
    "guidance_scale",
)  # fmt: skip
"""Options that are arguments of `Protocol.changed`."""


def _parser(name: str, protocol: Protocol) -> argparse.ArgumentParser:
    usual, several = protocol.sampling, len(protocol.groups) > 1
    counts = {group: rule.captions.count or "all" for group, rule in protocol.groups.items()}
    each = "the protocol's" if several else next(iter(counts.values()))
    usage = [f"  dalle-zoo eval {name} --out RESULT.json"]
    if protocol.model is None:
        usage = [
            f"  dalle-zoo eval {name} --model MODEL --data DIR --network inception-2015=FILE --network clip=DIR",
            f"  dalle-zoo eval {name} --images DIR --data DIR ...     images of another system",
            f"  dalle-zoo eval {name} --model MODEL --data DIR --leave-out inception-2015 --leave-out clip",
        ]
    lines = [*usage, f"  torchrun --nproc-per-node 8 -m dalle_zoo eval {name} ...   the same result on 8 processes"]
    metrics = ", ".join(rule.name for rule in protocol.metrics)
    p = parser(
        f"eval {name}",
        f"Evaluate a model or a folder of images: {metrics}.\n\n" + "\n".join(lines),
    )
    p.add_argument("protocol", help="name of a protocol, or a YAML file")
    default = f" [{protocol.model}]" if protocol.model else ""
    p.add_argument("--model", help=f"name of a bundled model, or a model folder such as ./mine{default}")
    p.add_argument(
        "--images",
        type=Path,
        help="images to evaluate instead of a model: a folder, with captions in .txt files, or a manifest in JSONL",
    )
    p.add_argument("--data", type=Path, help="folder of the dataset; bundled datasets need none")
    p.add_argument("--layout", help="layout of the dataset folder [the protocol's first layout]")
    add_network_options(p)
    p.add_argument("--reference", type=Path, help="file of statistics in the place of the real images")
    p.add_argument(
        "--save-reference", type=Path, help="also write the statistics of the real images: NAME.safetensors"
    )
    p.add_argument("--exclusions", type=Path, help="list of dataset images to exclude, one key per line")
    p.add_argument(
        "--captions",
        type=int,
        help=f"number of captions per group, for quick trials; scores are marked as not comparable [{each}]",
    )
    if TRAIN in counts and several:
        others = "; ".join(f"{group}: {count}" for group, count in counts.items() if group != TRAIN)
        p.add_argument("--train-captions", type=int, help=f"number of captions of the group train [{counts[TRAIN]}]")
        p.add_argument("--val-captions", type=int, help=f"number of captions of each other group [{others}]")
    p.add_argument(
        "--candidates", type=int, help=f"images per caption, of which the ranker keeps one [{usual.candidates}]"
    )
    p.add_argument("--temperature", type=float, help=f"sampling temperature [{usual.temperature:g}]")
    p.add_argument("--top-k", type=int, help=f"sample from the k most likely tokens [{usual.top_k or 'all'}]")
    p.add_argument(
        "--top-p",
        type=float,
        help=f"sample from the most likely tokens with this total probability [{usual.top_p or 'all'}]",
    )
    none = ", none" if usual.guidance_scale == 1 else ""
    p.add_argument(
        "--guidance-scale", type=float, help=f"scale of classifier-free guidance [{usual.guidance_scale:g}{none}]"
    )
    p.add_argument("--seed", type=int, help=f"seed for sampling and for the choice of images [{protocol.seed}]")
    p.add_argument("--save-images", action="store_true", help="also write the generated images as PNG files")
    p.add_argument("--batch-size", type=int, help="number of images generated at once [64]")
    add_copy_options(p)
    add_output_options(p, f"eval-{Path(name).stem}")
    return p


def add_network_options(p: argparse.ArgumentParser) -> None:
    """Adds the options that name the files of networks, or omit them."""
    from dalle_zoo_eval.extractors import EXTRACTORS

    names = [spec.name for spec in EXTRACTORS.specs() if not spec.model_part]
    p.add_argument(
        "--network", type=named_path, action="append", default=[], metavar="NAME=PATH",
        help=f"file or folder of a network: {', '.join(names)}; repeatable",
    )  # fmt: skip
    p.add_argument(
        "--leave-out", action="append", default=[], metavar="NAME", help="omit a network and its metrics; repeatable"
    )


def add_copy_options(p: argparse.ArgumentParser) -> None:
    """Adds the options of the search for copies of training images."""
    p.add_argument("--training", help="training images (folder or shards) in which to search for copies")
    p.add_argument("--threshold", type=float, help=f"minimum cosine similarity of a copy [{COPY}]")
    p.add_argument(
        "--copies-network", metavar="NAME",
        help="network for the search for copies [that of the first FID family, or the first given]",
    )  # fmt: skip


def add_output_options(p: argparse.ArgumentParser, out: str) -> None:
    """Adds the options of device, output and cache.

    Args:
        p: The parser.
        out: Default output folder.
    """
    p.add_argument("--device", default="cpu", help="device of the networks, such as cuda [cpu]")
    p.add_argument(
        "--out", type=Path, default=Path(out),
        help=f"output folder, or result file NAME.json with its report in the folder NAME [{out}]",
    )  # fmt: skip
    p.add_argument("--cache", type=Path, help="folder of features, which evaluations can share [.cache in --out]")
    p.add_argument("--overwrite", action="store_true", help="replace the result of another evaluation")


def named_path(text: str) -> tuple[str, Path]:
    """Parses ``NAME=PATH``, an option of a network."""
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, such as clip=./clip-vit-base-patch32, got {text!r}")
    return name, path_argument(path)


def report(arguments: list[str]) -> None:
    """Renders a report from result files: the entry point of ``dalle-zoo report``.

    Args:
        arguments: Command line after ``dalle-zoo report``.
    """
    p = parser(
        "report",
        "Render a report from result files of `dalle-zoo eval`: one result, or several results of one protocol.\n\n"
        "  dalle-zoo report eval/results/composition.json\n"
        "  dalle-zoo report eval-one/result.json eval-other/result.json --out comparison --name one --name other\n"
        "  dalle-zoo report eval-one/result.json --format latex,csv --out table",
    )
    p.add_argument("results", type=Path, nargs="+", help="result files")
    p.add_argument("--out", type=Path, help="output folder of the report [folder of the evaluation]")
    p.add_argument(
        "--format", default="md,html",
        help="comma-separated formats of md, html, latex (with the figures as PDF) and csv [md,html]",
    )  # fmt: skip
    p.add_argument(
        "--name", action="append", default=[], help="name of a system, once per result, in their order [the results']"
    )
    options = p.parse_args(arguments)

    if options.out is not None:
        check_folder("--out", options.out)
    from dalle_zoo_eval.report import FORMS, write_report

    forms = [form.strip() for form in options.format.split(",")]
    for form in forms:
        if form not in FORMS:
            raise UserError(suggest("format", form, FORMS))
    written = write_report(options.results, options.out, forms=forms, names=options.name)
    for path in written[: len(forms)]:
        print(path)  # noqa: T201


def overlap(arguments: list[str]) -> None:
    """Lists dataset images that are also in a training set: the entry point of ``dalle-zoo overlap``.

    Args:
        arguments: Command line after ``dalle-zoo overlap``.
    """
    p = parser(
        "overlap",
        "Find the images of a dataset that are also in a training set. Writes their list for\n"
        "`dalle-zoo eval ... --exclusions`, and writes a sheet of the closest pairs for choosing the threshold.\n\n"
        "  dalle-zoo overlap coco-30k --data COCO --training FOLDER --network clip=DIR --out overlaps.txt",
    )
    p.add_argument("protocol", help="protocol whose dataset is checked")
    p.add_argument("--data", type=Path, required=True, help="folder of the dataset")
    p.add_argument("--layout", help="layout of the dataset folder [the protocol's first layout]")
    p.add_argument(
        "--training", required=True, help="training images: folder, shards, or a pattern such as 'shards/*.tar'"
    )
    p.add_argument(
        "--network", type=named_path, required=True, metavar="NAME=PATH", help="network that compares the images"
    )
    p.add_argument("--threshold", type=float, default=COPY, help=f"minimum cosine similarity of an overlap [{COPY}]")
    p.add_argument("--device", default="cpu", help="device of the network, such as cuda [cpu]")
    p.add_argument("--out", type=Path, required=True, help="list to write, NAME.txt; the sheet is NAME.png next to it")
    options = p.parse_args(arguments)

    check_device(options.device)
    check_file("--out", options.out)
    from dalle_zoo.sharing import Share, device_of_environment
    from dalle_zoo_eval.memorization import find_overlaps

    found = find_overlaps(
        options.protocol, options.data, options.layout, options.training, options.network, options.threshold,
        options.out, device_of_environment(options.device), Share.of_environment(),
    )  # fmt: skip
    if found is not None:
        print(f"{options.out}: {found[0]} of {found[1]} images")  # noqa: T201


def card(arguments: list[str]) -> None:
    """Renders a model card: the entry point of ``dalle-zoo card``.

    Args:
        arguments: Command line after ``dalle-zoo card``.
    """
    p = parser(
        "card",
        "Render the card of a model from its files and its result file.\n\n"
        "  dalle-zoo card composition --result eval/results/composition.json --out model_cards/composition.md",
    )
    p.add_argument("model", help="name of a bundled model, or a model folder")
    p.add_argument("--result", type=Path, required=True, help="result file of dalle-zoo eval")
    p.add_argument("--out", type=Path, required=True, help="Markdown file to write; an existing file is replaced")
    options = p.parse_args(arguments)
    check_file("--out", options.out)

    from dalle_zoo.cards import write_card
    from dalle_zoo.zoo import find_model

    print(write_card(find_model(options.model), options.result, options.out))  # noqa: T201
