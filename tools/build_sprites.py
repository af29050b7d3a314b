"""Build the bundled sprite set (transparent 64 x 64 images) from npm tarballs.

Get the sources with ``npm pack`` (pinned versions, see SOURCES in emoji_sources.py) into one folder, then

    python -m tools.build_sprites --sources DIR --out dalle_zoo/_data/sprites64

Needs Pillow and resvg-py. The same sources and versions give the same bytes. `sprite_names.txt` next to this file
lists the objects and their common names.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tools.emoji_sources import SOURCES, Entry, load_images, load_names, slug, split_of

SIZE = 64
MIRRORED = {"animals-nature", "food-drink", "people-body", "travel-places"}
"""Groups whose images may be flipped."""


def read_list(path: Path) -> dict[str, tuple[str, ...]]:
    """Reads CLDR short names with their common names."""
    names: dict[str, tuple[str, ...]] = {}
    for line in path.read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, others = line.partition(":")
            names[name.strip()] = tuple(word.strip() for word in (others or name).split(","))
    return names


def rasterize(image: bytes | str) -> Image.Image:
    """RGBA of a raster file or an SVG text; vectors at four times the final size."""
    if isinstance(image, str):
        import resvg_py

        image = bytes(resvg_py.svg_to_bytes(svg_string=image, width=4 * SIZE, height=4 * SIZE, skip_system_fonts=True))
    return Image.open(io.BytesIO(image)).convert("RGBA")


def reduced(image: Image.Image) -> Image.Image:
    """The image at 64 x 64: reduced with premultiplied colors, so that transparent pixels leave no fringe."""
    values = np.asarray(image, np.float32) / 255
    values[..., :3] *= values[..., 3:]
    channels = [
        np.asarray(Image.fromarray(values[..., c]).resize((SIZE, SIZE), Image.Resampling.LANCZOS)) for c in range(4)
    ]
    small = np.stack(channels, -1).clip(0, 1)
    alpha = small[..., 3:]
    small[..., :3] = np.where(alpha > 0, small[..., :3] / np.maximum(alpha, 1e-6), 0)
    return Image.fromarray((small.clip(0, 1) * 255 + 0.5).astype(np.uint8))


def chosen(sources: Path, names: dict[str, tuple[str, ...]]) -> Iterator[tuple[Entry, str, str]]:
    """Entry, style and split of every sprite."""
    entries = load_names(sources)
    by_name = {slug(entry.label): code for code, entry in reversed(list(entries.items()))}
    for style in sorted(SOURCES, key=lambda name: name == "noto-v1"):
        for code, image in load_images(sources, style, by_name).items():
            if code in entries:
                entries[code].images[style] = image
    found = {entry.name for entry in entries.values()}
    if missing := names.keys() - found:
        raise SystemExit(f"the sources have no {sorted(missing)[0]!r}")
    for entry in sorted(entries.values(), key=lambda e: e.code):
        if entry.name in names and not entry.tone and entry.code == entry.base:
            styles = [style for style in SOURCES if style in entry.images]
            for style in styles:
                yield entry, style, split_of(entry, style, styles, 0.05, 0.25)


def keywords(entry: Entry, names: tuple[str, ...]) -> list[str]:
    """CLDR's keywords that fit into a caption."""
    words = (tag.lower() for tag in entry.tags if tag.isascii() and tag.replace(" ", "").isalpha())
    return [word for word in words if word not in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="folder with the npm tarballs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quality", type=int, default=90, help="WebP quality of the colors (90)")
    parser.add_argument("--alpha-quality", type=int, default=60, help="WebP quality of the transparency (60)")
    args = parser.parse_args()

    names = read_list(Path(__file__).with_name("sprite_names.txt"))
    args.out.mkdir(parents=True, exist_ok=True)
    records, counts = [], Counter[str]()
    with tarfile.open(args.out / "sprites.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for entry, style, split in chosen(args.sources, names):
            key = f"{entry.code}_{style}"
            file = io.BytesIO()
            reduced(rasterize(entry.images[style])).save(
                file, "WEBP", quality=args.quality, alpha_quality=args.alpha_quality, method=6
            )
            member = tarfile.TarInfo(f"{key}.webp")
            member.size, member.mode = len(file.getvalue()), 0o644
            tar.addfile(member, io.BytesIO(file.getvalue()))
            records.append(
                {
                    "key": key,
                    "thing": entry.code,
                    "names": names[entry.name],
                    "style": SOURCES[style].phrase,
                    "keywords": keywords(entry, names[entry.name]),
                    "mirrored": entry.group in MIRRORED,
                    "split": split,
                    "group": entry.group,
                    "source": style,
                    "license": SOURCES[style].license,
                }
            )
            counts[split] += 1
    index = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (args.out / "sprites.jsonl").write_text(index, "utf-8")
    manifest = {
        "size": SIZE,
        "quality": args.quality,
        "alpha_quality": args.alpha_quality,
        "things": len({record["thing"] for record in records}),
        "splits": dict(counts),
        "files": {
            name: hashlib.sha256((args.out / name).read_bytes()).hexdigest()
            for name in ("sprites.tar", "sprites.jsonl")
        },
        "sources": {style: SOURCES[style].facts() for style in SOURCES},
    }
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(dict(counts), "in all", len(records))


if __name__ == "__main__":
    main()
