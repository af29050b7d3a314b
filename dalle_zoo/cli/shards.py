"""``dalle-zoo manifest | filter``: prepare shards of images."""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.outputs import check_file, check_folder
from dalle_zoo.cli.parser import parser
from dalle_zoo.values import as_integer


def manifest(arguments: list[str]) -> None:
    """Counts the samples of shards."""
    p = parser(
        "manifest",
        "Count the samples of shards, and write manifest.json next to them. Without it, all commands count them on\n"
        "each start. Shards that an existing manifest.json lists with their present size are not counted again.\n\n"
        "  dalle-zoo manifest cc/train",
    )
    p.add_argument("data", help="shards: a folder, a file, or a pattern such as 'shards/{00000..00009}.tar'")
    p.add_argument("--out", type=Path, help="file to write [manifest.json next to the shards]")
    p.add_argument("--processes", type=int, default=1, help="number of processes that count [1]")
    options = p.parse_args(arguments)
    as_integer("--processes", options.processes, least=1)

    from dalle_zoo.data import ShardSource, open_source
    from dalle_zoo.data.shards import MANIFEST
    from dalle_zoo.files import write_json

    source = open_source(options.data, processes=options.processes)
    if not isinstance(source, ShardSource):
        raise UserError(f"{options.data} has no shards: expected .tar, .tar.gz or .tgz files; others need no manifest")
    folders = {path.parent for path in source.paths}
    if options.out is None and len(folders) > 1:
        raise UserError(f"the shards are in {len(folders)} folders: run the command for each of them, or pass --out")
    out = options.out or folders.pop() / MANIFEST
    if not isinstance(out, Path):
        raise UserError(f"{out} cannot be written: pass --out manifest.json, and upload that file next to the shards")
    if options.out is not None or not source.is_listed:
        check_file("--out", out)
        _check_replaceable(out)
        found = zip(source.paths, source.sizes, source.counts, strict=True)
        shards = [{"file": path.name, "bytes": size, "samples": count} for path, size, count in found]
        write_json(out, {"shards": shards})
    print(f"{out}: {source.num_samples:,} samples in {len(source.paths):,} shards")


def _check_replaceable(path: Path) -> None:
    """Raises an error if a file exists that is no manifest of this command."""
    if not path.exists():
        return
    from dalle_zoo.files import try_read_json

    found = try_read_json(path)
    if found is None or found.keys() != {"shards"}:
        what = "no JSON file" if found is None else f"a file with {', '.join(sorted(found.keys() - {'shards'})[:3])}"
        raise UserError(f"{path} is {what}, which would be lost: move it, or choose another file with --out")


def filter_shards(arguments: list[str]) -> None:
    """Copies the samples that pass the paper's filters."""
    from dalle_zoo.data.filters import Filters

    defaults = Filters()
    p = parser(
        "filter",
        "Copy the samples of a data set that pass the filters of the paper to new shards, and print how many samples\n"
        "each filter drops. Run the same command again to resume an interrupted one; several processes share the\n"
        "work under torchrun or srun.\n\n"
        "  dalle-zoo filter cc/train --out cc/filtered",
    )
    p.add_argument("data", help="shards, a folder, or a bundled split such as composition:train")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument(
        "--min-words", type=int, default=defaults.min_words, help=f"minimum words of a caption [{defaults.min_words}]"
    )
    p.add_argument(
        "--max-aspect-ratio",
        type=float,
        default=defaults.max_aspect_ratio,
        help=f"longest side of an image in units of its shortest [{defaults.max_aspect_ratio:g}]",
    )
    p.add_argument("--any-language", action="store_true", help="also keep captions that are not English")
    p.add_argument("--keep-duplicates", action="store_true", help="also keep image files that occurred before")
    p.add_argument("--samples-per-shard", type=int, default=10_000, help="samples of the input per shard [10000]")
    options = p.parse_args(arguments)
    check_folder("--out", options.out)  # interrupted work is resumed there

    from dalle_zoo.data import filter_source, open_source
    from dalle_zoo.data.filtering import kept_of
    from dalle_zoo.sharing import Share

    found = filter_source(
        open_source(options.data),
        options.out,
        filters=Filters(
            min_words=options.min_words,
            max_aspect_ratio=options.max_aspect_ratio,
            english=not options.any_language,
            duplicates=not options.keep_duplicates,
        ),
        samples_per_shard=options.samples_per_shard,
        share=Share.of_environment(),
    )
    print(f"{options.out}: {kept_of(found)}")
