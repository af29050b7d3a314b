"""``dalle-zoo convert``: converts weights of other code bases to a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle_zoo.cli.outputs import check_folder
from dalle_zoo.cli.parser import parser


def convert(arguments: list[str]) -> None:
    """Converts external weights."""
    p = parser(
        "convert",
        "Convert weights of other code bases to a model folder that every dalle-zoo command accepts. The format is\n"
        "recognized from the content of the files, and no code in them is run. Supported models:\n"
        "docs/generate/external.md.\n\n"
        "  dalle-zoo convert downloads/openai --out models/openai-dvae\n"
        "  dalle-zoo reconstruct image.png --model models/openai-dvae\n"
        "  dalle-zoo convert downloads/malevich downloads/utils --out models/malevich\n"
        "  dalle-zoo convert org/name --files '*_mini.*' detoker.pt --out models/mini",
    )
    p.add_argument(
        "location", nargs="+", help="file of weights, folder with such files, or organization/name on the Hub"
    )
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--family", help="family of the model, if a folder has several")
    p.add_argument("--files", nargs="+", default=(), help="patterns of the file names to read [all]")
    p.add_argument("--revision", help="branch, tag or commit of a repository on the Hub [main]")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    options = p.parse_args(arguments)
    check_folder("--out", options.out, overwrite=options.overwrite)

    from dalle_zoo.convert import FAMILIES, convert, find
    from dalle_zoo.hub import Access
    from dalle_zoo.zoo import find_place

    places = [find_place(one, Access(revision=options.revision), options.files) for one in options.location]
    source = find(places, options.family, options.files)
    record = convert(source, options.out, overwrite=options.overwrite)
    print(f"{' and '.join(options.location)}: {FAMILIES[source.family].title} ({source.family})")
    show(record)
    for component, count in record["parameters"].items():
        print(f"{options.out / component}: {count:,} parameters")
    note = record.get("license_note")
    print(f"license: {record.get('license_name') or record['license']}" + (f" ({note})" if note else ""))
    for file, reason in record.get("unused_files", {}).items():
        print(f"not used: {file}: {reason}")
    if record.get("missing"):
        print(
            f"the model cannot generate images: {' and '.join(record['missing'])} were not found; "
            f"add the location of their files to the command"
        )


def show(record: Mapping[str, Any]) -> None:
    """Prints what was inferred, and from what."""
    for name, value in record["inferred"].items():
        note = record.get("notes", {}).get(name)
        print(f"  {name}: {value}" + (f" ({note})" if note else ""))
    for name, count in record.get("unused", {}).items():
        print(f"left out: {count} tensors of {name}")
    if "image_tokenizer" in record:
        print(f"image tokenizer ({record['image_tokenizer']['family']})")
        show(record["image_tokenizer"])
