"""``dalle-zoo eval``, ``report``, ``overlap`` and ``card``: measures models and images, and writes what it found."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from dalle_zoo.cli.errors import check_device
from dalle_zoo.cli.parser import parser
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo_eval.data_files import read_yaml
from dalle_zoo_eval.protocol import COPY, TRAIN, Protocol, find_protocol, list_protocols, protocol_file

LISTED = """\
Measure a model, or a folder of images, by a protocol: result file, report and sheets. The same command continues a
killed run. `dalle-zoo eval PROTOCOL --help` has the options.

protocols:
"""


def main(arguments: list[str]) -> None:
    """Runs a protocol; the entry of the sub-command.

    Args:
        arguments: Command line after ``dalle-zoo eval``.
    """
    names = list_protocols()
    if not arguments or arguments[0].startswith("-"):
        lines = [f"  {name:<16}{read_yaml(protocol_file(name)).get('title', '')}" for name in names]
        p = parser("eval", LISTED + "\n".join(lines))
        p.add_argument("protocol", help="name above, or a YAML file; it comes first")
        p.parse_args(arguments[:1] if arguments[:1] in (["-h"], ["--help"]) else [])
    name = arguments[0]
    if name not in names and Path(name).suffix not in (".yaml", ".yml"):
        raise UnknownNameError(suggest("protocol", name, names))
    protocol = find_protocol(name)
    options = _parser(name, protocol).parse_args(arguments)
    networks = dict(options.network)
    given = [network for network, _ in options.network]
    if len(set(given)) != len(given):
        raise ValueError(f"--network names {max(given, key=given.count)!r} twice: give each network once")
    if options.evaluator is not None:
        if "mobilenet" in networks:
            raise ValueError("--evaluator is --network mobilenet=...: give one of the two")
        networks["mobilenet"] = options.evaluator
    for option in ("threshold", "copies_network"):
        if getattr(options, option) is not None and options.training is None:
            raise ValueError(f"--{option.replace('_', '-')} needs --training, the folder in which copies are searched")
    check_device(options.device)
    _run(name, options, networks, shlex.join(["dalle-zoo", "eval", *arguments]))


def _run(name: str, options: argparse.Namespace, networks: dict[str, Path], command: str) -> None:
    from dalle_zoo_eval.report import Output, summary
    from dalle_zoo_eval.request import Request, device_of_environment, share_of_environment
    from dalle_zoo_eval.runner import evaluate

    changes = {n: getattr(options, n, None) for n in CHANGES}
    request = Request(
        protocol=name,
        data=options.data,
        out=options.out,
        model=options.model,
        images=options.images,
        layout=options.layout,
        networks=networks,
        leave_out=tuple(options.leave_out),
        exclusions=options.exclusions,
        changes={n: value for n, value in changes.items() if value is not None},
        training=options.training,
        threshold=COPY if options.threshold is None else options.threshold,
        copies_network=options.copies_network,
        save_images=options.save_images,
        batch_size=options.batch_size,
        cache=options.cache,
        device=device_of_environment(options.device),
        share=share_of_environment(),
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
"""Options that stand for arguments of `Protocol.changed`."""


def _parser(name: str, protocol: Protocol) -> argparse.ArgumentParser:
    usual, several = protocol.sampling, len(protocol.groups) > 1
    counts = {group: rule.captions.count or "all" for group, rule in protocol.groups.items()}
    usage = [] if protocol.model is None else [f"  dalle-zoo eval {name} --out RESULT.json"]
    if protocol.model is None:
        usage = [
            f"  dalle-zoo eval {name} --model MODEL --data DIR --network inception-2015=FILE --network clip=DIR",
            f"  dalle-zoo eval {name} --images DIR --data DIR ...     images of another system",
        ]
    lines = [*usage, f"  torchrun --nproc-per-node 8 -m dalle_zoo eval {name} ...   the same result, sooner"]
    metrics = ", ".join(rule.name for rule in protocol.metrics)
    p = parser(
        f"eval {name}",
        f"Measure a model, or a folder of images: {metrics}.\n\n" + "\n".join(lines),
    )
    p.add_argument("protocol")
    p.add_argument(
        "--model", help=f"bundled name, or folder such as ./mine{f' ({protocol.model})' if protocol.model else ''}"
    )
    p.add_argument("--images", type=Path, help="folder of images to score instead; captions in .txt files")
    p.add_argument("--data", type=Path, help="folder of the dataset, unless it is in the package")
    p.add_argument("--layout", help="layout of that folder (the protocol's first)")
    p.add_argument(
        "--network", type=_named_path, action="append", default=[], metavar="NAME=PATH",
        help="file or folder of a network: inception-2015, dmgan, clip, ranker, mobilenet; once for each",
    )  # fmt: skip
    p.add_argument("--evaluator", type=Path, metavar="PATH", help="the same as --network mobilenet=PATH")
    p.add_argument(
        "--leave-out", action="append", default=[], metavar="NAME", help="go without a network and its scores"
    )
    p.add_argument("--exclusions", type=Path, help="list of images of the dataset to leave out")
    p.add_argument(
        "--captions", type=int, help="captions of every group, for a try: the score is marked as not comparable"
    )
    if TRAIN in counts and several:
        others = "; ".join(f"{group}: {count}" for group, count in counts.items() if group != TRAIN)
        p.add_argument("--train-captions", type=int, help=f"captions of train ({counts[TRAIN]})")
        p.add_argument("--val-captions", type=int, help=f"captions of each other group ({others})")
    p.add_argument(
        "--candidates", type=int, help=f"images per caption, of which the ranker keeps one ({usual.candidates})"
    )
    p.add_argument("--temperature", type=float, help=f"sampling temperature ({usual.temperature:g})")
    p.add_argument("--top-k", type=int, help=f"sample among the k most likely tokens ({usual.top_k or 'all'})")
    p.add_argument("--top-p", type=float, help=f"sample among tokens of this probability ({usual.top_p or 'all'})")
    none = ", none" if usual.guidance_scale == 1 else ""
    p.add_argument("--guidance-scale", type=float, help=f"classifier-free guidance ({usual.guidance_scale:g}{none})")
    p.add_argument("--seed", type=int, help=f"seed of the generated images, and of chosen samples ({protocol.seed})")
    p.add_argument("--training", help="training images, folder or shards: searches copies among the generated ones")
    p.add_argument("--threshold", type=float, help=f"cosine from which an image is a copy ({COPY})")
    p.add_argument(
        "--copies-network", metavar="NAME", help="network that searches copies (inception-2015, or the first given)"
    )
    p.add_argument("--save-images", action="store_true", help="write the generated images as PNG files too")
    p.add_argument("--batch-size", type=int, help="images generated at once (64)")
    p.add_argument("--device", default="cpu", help="where the networks run (cpu)")
    stem = Path(name).stem
    p.add_argument(
        "--out", type=Path, default=Path(f"eval-{stem}"),
        help=f"folder of the result, or result file NAME.json with its report in the folder NAME (eval-{stem})",
    )  # fmt: skip
    p.add_argument("--cache", type=Path, help="folder of features, to share those of real images (.cache in --out)")
    p.add_argument("--overwrite", action="store_true", help="replace the result of another evaluation")
    return p


def _named_path(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, such as clip=./clip-vit-base-patch32, got {text!r}")
    return name, Path(path)


def report(arguments: list[str]) -> None:
    """Renders reports again from result files; the entry of the sub-command ``report``.

    Args:
        arguments: Command line after ``dalle-zoo report``.
    """
    p = parser(
        "report",
        "Render a report from result files of `dalle-zoo eval`: one, or several of one benchmark side by side.\n\n"
        "  dalle-zoo report eval/results/emoji64.json\n"
        "  dalle-zoo report eval-one/result.json eval-other/result.json --out comparison",
    )
    p.add_argument("results", type=Path, nargs="+", help="result files")
    p.add_argument("--out", type=Path, help="folder of the report (where the evaluation has put it)")
    options = p.parse_args(arguments)

    from dalle_zoo_eval.report import write_report

    print(write_report(options.results, options.out)[1])  # noqa: T201


def overlap(arguments: list[str]) -> None:
    """Lists images of a benchmark that lie in a training set too; the entry of the sub-command ``overlap``.

    Args:
        arguments: Command line after ``dalle-zoo overlap``.
    """
    p = parser(
        "overlap",
        "Find the images of a benchmark that are in a training set too, and write their list for\n"
        "`dalle-zoo eval ... --exclusions`, beside a sheet of the closest pairs to choose the threshold by.\n\n"
        "  dalle-zoo overlap coco-30k --data COCO --training FOLDER --network clip=DIR --out overlaps.txt",
    )
    p.add_argument("protocol", help="protocol whose benchmark is meant")
    p.add_argument("--data", type=Path, required=True, help="folder of the benchmark")
    p.add_argument("--layout", help="layout of that folder (the protocol's first)")
    p.add_argument("--training", required=True, help="training images: folder, shards, or 'shards/*.tar'")
    p.add_argument("--network", type=_named_path, required=True, metavar="NAME=PATH", help="network that compares")
    p.add_argument("--threshold", type=float, default=COPY, help=f"cosine from which images overlap ({COPY})")
    p.add_argument("--device", default="cpu", help="where the network runs (cpu)")
    p.add_argument("--out", type=Path, required=True, help="list to write; the sheet is written next to it as .png")
    options = p.parse_args(arguments)

    check_device(options.device)
    from dalle_zoo_eval.memorization import find_overlaps
    from dalle_zoo_eval.request import device_of_environment, share_of_environment

    found = find_overlaps(
        options.protocol, options.data, options.layout, options.training, options.network, options.threshold,
        options.out, device_of_environment(options.device), share_of_environment(),
    )  # fmt: skip
    if found is not None:
        print(f"{options.out}: {found[0]} of {found[1]} images")  # noqa: T201


def card(arguments: list[str]) -> None:
    """Renders a model card; the entry of the sub-command ``card``.

    Args:
        arguments: Command line after ``dalle-zoo card``.
    """
    p = parser(
        "card",
        "Render the card of a model from its files and its result file.\n\n"
        "  dalle-zoo card emoji64 --result eval/results/emoji64.json --out model_cards/emoji64.md",
    )
    p.add_argument("model", help="bundled name or folder")
    p.add_argument("--result", type=Path, required=True, help="result file of dalle-zoo eval")
    p.add_argument("--out", type=Path, required=True, help="Markdown file to write, replaced")
    options = p.parse_args(arguments)

    from dalle_zoo.cards import write_card
    from dalle_zoo.zoo import find_model

    print(write_card(find_model(options.model), options.result, options.out))  # noqa: T201
