"""``dalle-zoo eval``, ``report``, ``overlap`` and ``card``: measures models and images, and writes what it found."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from dalle_zoo.cli.errors import check_device
from dalle_zoo.cli.main import parser
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo_eval.protocol import CONCEPTS, COPY, list_protocols, protocol_file, read_fields

LISTED = """\
Measure a model, or a folder of images, by a protocol: result file, report and sheets. The same command goes on
where a killed one stood. `dalle-zoo eval PROTOCOL --help` has the options.

protocols:
"""


def main(arguments: list[str]) -> None:
    """Runs a protocol; the entry of the sub-command.

    Args:
        arguments: Command line after ``dalle-zoo eval``.
    """
    names = list_protocols()
    if not arguments or arguments[0].startswith("-"):
        lines = [f"  {name:<16}{read_fields(protocol_file(name))[1].get('title', '')}" for name in names]
        p = parser("eval", LISTED + "\n".join(lines))
        p.add_argument("protocol", help="name above, or a YAML file; it comes first")
        p.parse_args(arguments[:1] if arguments[:1] in (["-h"], ["--help"]) else [])
    protocol = arguments[0]
    if protocol not in names and Path(protocol).suffix not in (".yaml", ".yml"):
        raise UnknownNameError(suggest("protocol", protocol, names))
    kind, _ = read_fields(protocol_file(protocol))
    (_concepts if kind == CONCEPTS else _benchmark)(protocol, arguments)


def _concepts(protocol: str, arguments: list[str]) -> None:
    from dalle_zoo_eval.concepts.protocol import find_concept_protocol

    usual, stem = find_concept_protocol(protocol), Path(protocol).stem
    captions = {name: rule.captions or "all" for name, rule in usual.splits.items()}
    others = "; ".join(f"{name}: {count}" for name, count in captions.items() if name != "train")
    p = parser(
        f"eval {protocol}",
        "Measure a model on things seen and unseen: result file, report and sheets of its images.\n\n"
        f"  dalle-zoo eval {protocol} --evaluator FOLDER --out {stem}.json\n"
        f"  torchrun --nproc-per-node 8 -m dalle_zoo eval {protocol} ...   the same result, sooner",
    )
    p.add_argument("protocol")
    p.add_argument("--model", default="emoji64", help="bundled name, or folder such as ./mine (emoji64)")
    p.add_argument(
        "--evaluator",
        help="folder with mobilenet_v1_025_224.safetensors; without it concept accuracy is left out",
    )
    p.add_argument(
        "--out", type=Path, default=Path(f"{stem}.json"),
        help=f"result file; report and sheets go into the folder of its name ({stem}.json and {stem}/)",
    )  # fmt: skip
    p.add_argument("--seed", type=int, help=f"seed of everything random ({usual.seed})")
    p.add_argument("--train-captions", type=int, help=f"captions of train to sample ({captions.get('train', 'none')})")
    p.add_argument("--val-captions", type=int, help=f"captions of each other split ({others})")
    p.add_argument("--candidates", type=int, help=f"images per caption ({usual.candidates})")
    _add_sampling(p, **usual.sampling())
    p.add_argument("--device", default="cpu", help="where the networks run (cpu)")
    p.add_argument("--overwrite", action="store_true", help="replace an existing result file, with its report")
    options = p.parse_args(arguments)

    check_device(options.device)
    from dalle_zoo_eval.concepts.evaluate import evaluate_concepts
    from dalle_zoo_eval.concepts.report import concept_summary, report_folder
    from dalle_zoo_eval.evaluate import device_of_environment, share_of_environment

    changeable = ("seed", "train_captions", "val_captions", "candidates", *usual.sampling())
    result = evaluate_concepts(
        usual.changed(**{name: getattr(options, name) for name in changeable}),
        options.model,
        options.evaluator,
        options.out,
        device=device_of_environment(options.device),
        overwrite=options.overwrite,
        share=share_of_environment(),
    )
    if result is None:
        return
    print(concept_summary(result))  # noqa: T201 (what a command is for)
    for line in result["left_out"]:
        print(f"left out: {line}")  # noqa: T201
    print(f"report: {report_folder(options.out) / 'report.html'}")  # noqa: T201


def _add_sampling(
    p: argparse.ArgumentParser,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
) -> None:
    p.add_argument("--temperature", type=float, help=f"sampling temperature ({temperature:g})")
    p.add_argument("--top-k", type=int, help=f"sample among the k most likely tokens ({top_k or 'all'})")
    p.add_argument("--top-p", type=float, help=f"sample among tokens of this probability ({top_p or 'all'})")
    p.add_argument(
        "--guidance", type=float, help=f"classifier-free guidance ({guidance:g}{', none' * (guidance == 1)})"
    )


def _named_path(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, such as clip=./clip-vit-base-patch32, got {text!r}")
    return name, Path(path)


def _benchmark(protocol: str, arguments: list[str]) -> None:
    p = parser(
        f"eval {protocol}",
        "Measure a model, or a folder of images, against a benchmark.\n\n"
        f"  dalle-zoo eval {protocol} --model MODEL --data DIR --network inception-2015=FILE --network clip=DIR\n"
        f"  dalle-zoo eval {protocol} --images DIR --data DIR ...     images of another system\n"
        f"  torchrun --nproc-per-node 8 -m dalle_zoo eval {protocol} ...   the same images, sooner",
    )
    p.add_argument("protocol")
    p.add_argument("--model", help="bundled name, or folder: the model that generates")
    p.add_argument("--images", type=Path, help="folder of images to score instead; captions beside them as .txt")
    p.add_argument("--data", type=Path, required=True, help="folder of the benchmark")
    p.add_argument("--layout", help="layout of that folder (the protocol's first)")
    p.add_argument(
        "--network", type=_named_path, action="append", default=[], metavar="NAME=PATH",
        help="file or folder of a network: inception-2015, dmgan, clip, ranker, mobilenet; once for each",
    )  # fmt: skip
    p.add_argument(
        "--leave-out", action="append", default=[], metavar="NAME", help="go without a network and its scores"
    )
    p.add_argument("--exclusions", type=Path, help="list of images of the benchmark to leave out")
    p.add_argument("--captions", type=int, help="fewer captions, for a try: the score is marked as not comparable")
    p.add_argument("--candidates", type=int, help="images per caption, of which the ranker keeps one")
    _add_sampling(p)
    p.add_argument("--seed", type=int, help="seed of the generated images (the protocol's)")
    p.add_argument("--training", help="training images, folder or shards: looks for copies among the judged ones")
    p.add_argument("--threshold", type=float, help=f"cosine from which an image is a copy ({COPY})")
    p.add_argument(
        "--copies-network", metavar="NAME", help="network that looks for copies (inception-2015, or the first given)"
    )
    p.add_argument("--save-images", action="store_true", help="write the judged images as PNG files too")
    p.add_argument("--batch-size", type=int, help="images generated at once (64)")
    p.add_argument("--device", default="cpu", help="where the networks run (cpu)")
    p.add_argument("--out", type=Path, help="folder of the result (eval-PROTOCOL)")
    p.add_argument("--cache", type=Path, help="folder of measured chunks, to share the reference's (OUT/.cache)")
    options = p.parse_args(arguments)

    given = [name for name, _ in options.network]
    if len(set(given)) != len(given):
        raise ValueError(f"--network names {max(given, key=given.count)!r} twice: give each network once")
    if options.threshold is not None and options.training is None:
        raise ValueError("--threshold needs --training, the folder in which copies are looked for")
    if options.copies_network is not None and options.training is None:
        raise ValueError("--copies-network needs --training, the folder in which copies are looked for")

    check_device(options.device)
    from dalle_zoo_eval.evaluate import RESULT, Request, device_of_environment, evaluate, share_of_environment
    from dalle_zoo_eval.report import summary

    sampling = {n: getattr(options, n) for n in ("temperature", "top_k", "top_p", "guidance", "seed")}
    request = Request(
        protocol=protocol,
        data=options.data,
        out=options.out or Path(f"eval-{Path(protocol).stem}"),
        model=options.model,
        images=options.images,
        layout=options.layout,
        networks=dict(options.network),
        leave_out=tuple(options.leave_out),
        exclusions=options.exclusions,
        captions=options.captions,
        candidates=options.candidates,
        sampling={n: value for n, value in sampling.items() if value is not None},
        training=options.training,
        threshold=COPY if options.threshold is None else options.threshold,
        save_images=options.save_images,
        batch_size=options.batch_size,
        cache=options.cache,
        device=device_of_environment(options.device),
        share=share_of_environment(),
        copies_network=options.copies_network,
        command=shlex.join(["dalle-zoo", "eval", *arguments]),
    )
    result = evaluate(request)
    if result is None:
        return
    print(summary([request.out / RESULT]))  # noqa: T201
    for line in result["left_out"]:
        print(f"left out: {line}")  # noqa: T201
    print(f"report: {request.out / 'report.html'}")  # noqa: T201


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

    from dalle_zoo_eval.rendering import render

    print(render(options.results, options.out)[1])  # noqa: T201


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
    p.add_argument("--out", type=Path, required=True, help="list to write; the sheet lies beside it as .png")
    options = p.parse_args(arguments)

    check_device(options.device)
    from dalle_zoo_eval.evaluate import device_of_environment, share_of_environment
    from dalle_zoo_eval.memorization import find_overlaps

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
