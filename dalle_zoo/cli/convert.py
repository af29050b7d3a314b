"""``dalle-zoo convert``: weights of other code bases to a folder of ours."""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.cli.main import parser


def convert(arguments: list[str]) -> None:
    """Converts foreign weights."""
    p = parser(
        "convert",
        "Convert weights of other code bases to a folder of safetensors that every command here takes. They are\n"
        "recognised by content; nothing that a file asks for is run. docs/convert.md lists what is known.\n\n"
        "  dalle-zoo convert downloads/openai --out models/openai-dvae\n"
        "  dalle-zoo reconstruct picture.png --model models/openai-dvae",
    )
    p.add_argument("location", type=Path, help="file of weights, or folder of such files")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--family", help="what it is, where a folder holds several")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    options = p.parse_args(arguments)

    from dalle_zoo.convert import FAMILIES, convert, find

    source = find(options.location, options.family)
    record = convert(source, options.out, overwrite=options.overwrite)
    print(f"{options.location}: {FAMILIES[source.family].title} ({source.family})")
    for name, value in record["inferred"].items():
        note = record.get("notes", {}).get(name)
        print(f"  {name}: {value}" + (f" ({note})" if note else ""))
    for name, count in record.get("unused", {}).items():
        print(f"left out: {count} tensors of {name}")
    for component, count in record["parameters"].items():
        print(f"{options.out / component}: {count:,} parameters")
    print(f"license: {record['license']}")
