"""``dalle-zoo eval PROTOCOL``: measures a model and writes a result file."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from dalle_zoo.cli.main import parser
from dalle_zoo.registry import UnknownNameError, suggest

PROTOCOLS = ("emoji64",)


def main(arguments: list[str]) -> None:
    """Runs a protocol; the entry of the sub-command.

    Args:
        arguments: Command line after ``dalle-zoo eval``.
    """
    p = parser(
        "eval",
        "Measure a model and write a JSON result and sheets of its pictures. The same command goes\n"
        "on where a killed one stood.\n\n"
        "  dalle-zoo eval emoji64 --evaluator FOLDER --out eval/results/emoji64.json",
    )
    p.add_argument("protocol", help=f"one of: {', '.join(PROTOCOLS)}")
    p.add_argument("--model", default="emoji64", help="bundled name, or folder such as ./mine (emoji64)")
    p.add_argument(
        "--evaluator",
        help="folder with mobilenet_v1_025_224.safetensors; without it concept accuracy is left out",
    )
    p.add_argument("--out", type=Path, help="result file (PROTOCOL.json)")
    p.add_argument("--seed", type=int, default=0, help="seed of everything random (0)")
    p.add_argument("--train-captions", type=int, help="captions of train to draw (256)")
    p.add_argument("--val-captions", type=int, help="captions of each other split (all)")
    p.add_argument("--candidates", type=int, help="pictures a caption (16)")
    p.add_argument("--temperature", type=float, help="sampling temperature (1)")
    p.add_argument("--top-k", type=int, help="draw among the k most likely tokens")
    p.add_argument("--top-p", type=float, help="draw among tokens of this probability")
    p.add_argument("--guidance", type=float, help="classifier-free guidance (1, none)")
    p.add_argument("--device", default="cpu", help="where the networks run (cpu)")
    p.add_argument("--overwrite", action="store_true", help="replace an existing result file and its sheets")
    options = p.parse_args(arguments)
    if options.protocol not in PROTOCOLS:
        raise UnknownNameError(suggest("protocol", options.protocol, PROTOCOLS))

    from dalle_zoo_eval.emoji64 import Protocol, evaluate_emoji64

    given = {f.name: getattr(options, f.name, None) for f in fields(Protocol)}
    result = evaluate_emoji64(
        options.model,
        options.evaluator,
        options.out or Path(f"{options.protocol}.json"),
        protocol=Protocol(**{name: value for name, value in given.items() if value is not None}),
        device=options.device,
        overwrite=options.overwrite,
    )
    for target in result["targets"]:
        verdict = "reached" if target["met"] else "not reached"
        print(  # noqa: T201 (what a command is for)
            f"{target['name']}: {target['reached']:.3f} (asked: {target['required']}), {verdict}"
        )
    for line in result["left_out"]:
        print(f"left out: {line}")  # noqa: T201


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
