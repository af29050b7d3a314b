"""The command ``dalle-zoo captions``: the captions of a protocol as files, without a model or a network."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from dalle_zoo.cli.outputs import check_folder
from dalle_zoo.cli.parser import parser
from dalle_zoo_eval.datasets import DatasetError, UnavailableGroupError, load_exclusions, save_captions
from dalle_zoo_eval.groups import choose, read_prompts
from dalle_zoo_eval.protocol import ALL, find_protocol

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """Writes the captions of a protocol: the entry point of ``dalle-zoo captions``.

    Args:
        arguments: Command line after ``dalle-zoo captions``.
    """
    p = parser(
        "captions",
        "Write the captions that a protocol generates images from: one JSONL file per group, first its sha256, then\n"
        "[key, caption] each. Other systems can generate their images from it.\n\n"
        "  dalle-zoo captions coco-30k --data COCO --out captions",
    )
    p.add_argument("protocol", help="name of a protocol, or a YAML file")
    p.add_argument("--data", type=Path, help="folder of the dataset; bundled datasets need none")
    p.add_argument("--layout", help="layout of the dataset folder [the protocol's first layout]")
    p.add_argument("--exclusions", type=Path, help="list of dataset images to exclude, one key per line")
    p.add_argument("--captions", type=int, help="number of captions per group [the protocol's]")
    p.add_argument("--seed", type=int, help="seed of the choice [the protocol's]")
    p.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = p.parse_args(arguments)
    check_folder("--out", options.out)
    paths = write_captions(
        options.protocol, options.out, data=options.data, layout=options.layout, exclusions=options.exclusions,
        count=options.captions, seed=options.seed,
    )  # fmt: skip
    for path in paths:
        print(path)  # noqa: T201 (what a command is for)


def write_captions(
    name: str,
    out: Path,
    *,
    data: Path | None = None,
    layout: str | None = None,
    exclusions: Path | None = None,
    count: int | None = None,
    seed: int | None = None,
) -> list[Path]:
    """Writes a file per group that generates images.

    Args:
        name: Name of a protocol, or a YAML file.
        out: Output folder.
        data: Folder of the dataset. Defaults to None, for bundled datasets.
        layout: Layout of the dataset. Defaults to the protocol's first one.
        exclusions: List of images to exclude. Defaults to none.
        count: Number of captions of each group. Defaults to the protocol's.
        seed: Seed of the choice. Defaults to the protocol's.

    Returns:
        The files.

    Raises:
        DatasetError: The dataset is unusable, or allows no group.
    """
    protocol = find_protocol(name).changed(captions=count, seed=seed)
    excluded = frozenset[str]() if exclusions is None else load_exclusions(exclusions)
    paths = []
    with tempfile.TemporaryDirectory() as cache:
        for group, rule in protocol.groups.items():
            try:
                prompts = read_prompts(protocol, group, layout=layout, data=data, excluded=excluded, cache=Path(cache))
            except UnavailableGroupError as error:
                log.warning("the group %s is left out: %s", group, error)
                continue
            captions = choose(protocol, group, prompts, count=rule.captions.count)
            path = out / (f"{protocol.name}.jsonl" if group == ALL else f"{protocol.name}-{group}.jsonl")
            save_captions(captions, path)
            paths.append(path)
    if not paths:
        raise DatasetError(f"{data} allows no group of {protocol.name}: see the warnings")
    return paths
