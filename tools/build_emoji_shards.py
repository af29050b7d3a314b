"""Build captioned emoji image shards (WebDataset tar files) from npm tarballs.

Every sample has three members with the same key: ``KEY.webp`` (RGB on white), ``KEY.txt`` (one caption) and
``KEY.json`` (all captions and metadata of the image).

Get the sources with ``npm pack`` (pinned versions, see SOURCES below) into one folder, then

    python tools/build_emoji_shards.py --sources DIR --out shards --size 64

Needs Pillow and resvg-py. The same sources, versions and options give the same bytes: the defaults
give `dalle_zoo/_data/emoji64`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

CLDR = "emojibase-data-17.0.0.tgz"


@dataclass(frozen=True)
class Source:
    """One emoji style: where its images come from and how captions name it."""

    tarball: str
    npm: str
    kind: str  # "raster": one file per code point sequence; "iconify": SVG bodies in one JSON file
    phrase: str
    license: str
    credit: str

    def facts(self) -> dict[str, str]:
        """What the manifest says of the source."""
        return {
            "npm": self.npm,
            "license": self.license,
            "credit": self.credit,
            "caption_word": self.phrase,
        }


SOURCES = {
    "fluent-3d": Source(
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "@lobehub/fluent-emoji-3d@1.1.0",
        "raster",
        "3d",
        "MIT",
        "Fluent Emoji, (c) Microsoft Corporation",
    ),
    "fluent-flat": Source(
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "iconify",
        "flat",
        "MIT",
        "Fluent Emoji, (c) Microsoft Corporation",
    ),
    "noto": Source(
        "iconify-json-noto-1.2.9.tgz",
        "@iconify-json/noto@1.2.9",
        "iconify",
        "cartoon",
        "Apache-2.0",
        "Noto Emoji, (c) Google",
    ),
    "noto-v1": Source(
        "iconify-json-noto-v1-1.2.5.tgz",
        "@iconify-json/noto-v1@1.2.5",
        "iconify",
        "blob",
        "Apache-2.0",
        "Noto Emoji v1, (c) Google",
    ),
    "twemoji": Source(
        "iconify-json-twemoji-1.2.5.tgz",
        "@iconify-json/twemoji@1.2.5",
        "iconify",
        "twitter",
        "CC-BY-4.0",
        "Twemoji, (c) Twitter, Inc and other contributors",
    ),
    "openmoji": Source(
        "iconify-json-openmoji-1.2.29.tgz",
        "@iconify-json/openmoji@1.2.29",
        "iconify",
        "outlined",
        "CC-BY-SA-4.0",
        "OpenMoji, openmoji.org",
    ),
}
PERMISSIVE = ("fluent-3d", "fluent-flat", "noto", "noto-v1")
SKIPPED_GROUPS = {"component", "flags"}


def code_key(text: str) -> str:
    """Code point sequence in lower case, without variation selectors or leading zeros."""
    parts = (part.lstrip("0") or "0" for part in text.lower().split("-"))
    return "-".join(part for part in parts if part != "fe0f")


def slug(text: str) -> str:
    """Name as iconify spells it: ASCII words joined by hyphens."""
    plain = unicodedata.normalize("NFKD", text.replace("\u2019", "").replace("'", ""))
    return re.sub(r"[^a-z0-9]+", "-", plain.encode("ascii", "ignore").decode().lower()).strip("-")


def _words(listed: str) -> frozenset[str]:
    """Comma-separated words, on as many lines as needed."""
    return frozenset(" ".join(listed.split()).split(", "))


_UNCOUNTED = _words("""
    bacon, bread, broccoli, butter, chopsticks, clothes, confetti, curry rice, dango,
    fireworks, fog, food, footprints, french fries, fire, garlic, ginger, gloves, glasses,
    goggles, honey, jeans, lipstick, lungs, meat on bone, money, oden, pants, popcorn, salt,
    sake, scissors, seaweed, shorts, skis, soap, spaghetti, sushi, tofu, water, wind, wood,
    yarn, zzz, ice hockey, field hockey, tennis, badminton, lacrosse, ping pong, cricket game,
    construction, cooked rice, thread, dizzy, dashing away, high voltage, volleyball game,
    mate, statue of liberty, tokyo tower, moon viewing ceremony, performing arts, mount fuji,
    pouring liquid, night with stars
""")
_BARE = _words("""
    keycap, input, women, men, people, no, non-potable, santa, mrs., locked, unlocked, japan,
    world, high, building, counterclockwise, clockwise
""")
_SIGNS = _words("""
    arrow, button, circle, square, diamond, heart, star, mark, sign, suit, cross, wheel,
    symbol, hexagram, asterisk, hexagon, dragon, bubble, number, ring, loop, triangle
""")
_VOWEL = re.compile(r"(?i:[aeiou](?!nicorn|nicycle|ranus)|hour|x-ray)|[FHLMNRSX][A-Z]")


def plain_name(label: str) -> str:
    """CLDR short name as running text: no colon or typographic quotes, clock faces named."""
    name = label.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"').replace("\u2013", "-")
    if name.endswith(("o'clock", "-thirty")):
        return f"clock face at {name}"
    head, colon, rest = name.partition(":")
    if not colon:
        return name.strip()
    rest = rest.strip()
    if head in ("keycap", "flag"):
        return f"{head} {rest}"
    *first, last = [part.strip() for part in rest.split(",")]
    listed = f"{', '.join(first)} and {last}" if first else last
    if listed.startswith("facing"):
        return f"{head} {listed}"
    if last == "bald":
        return f"bald {head}" + (f" with {' and '.join(first)}" if first else "")
    return f"{head} {'of' if head in ('kiss', 'family', 'couple with heart') else 'with'} {listed}"


def with_article(name: str, group: str) -> str:
    """Name with "a" or "an" where English wants one, decided by the words alone."""
    head = re.split(r" (?:with|of|on|in|and|at|facing|gesturing|holding) ", name)[0]
    words = head.lower().split()
    first, last = (words[0], words[-1]) if words else ("", "")
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is", "lens")) and last != "mrs."
    if plural or first in _BARE or name.lower() in _UNCOUNTED or last in _UNCOUNTED:
        return name
    if not head[:1].isalnum() or head.isupper() or (group == "symbols" and last not in _SIGNS):
        return name
    return f"{'an' if _VOWEL.match(head) else 'a'} {name}"


def captions(name: str, group: str, style: str, tags: list[str]) -> list[str]:
    """Captions of one image, the plainest first."""
    thing = with_article(name, group)
    extra = [tag for tag in tags if tag.isascii() and tag.lower() not in name.lower()][:3]
    article = "an" if style[0] in "aeiou" else "a"
    out = [f"{article} {style} emoji of {thing}", f"{name}, {style} emoji style"]
    if extra:
        out.append(f"{article} {style} emoji of {thing}, {', '.join(extra)}")
    return [text.lower() for text in out]


@dataclass
class Entry:
    """One emoji: its names and, by style, its images (raster bytes or SVG text)."""

    code: str
    name: str
    label: str
    group: str
    subgroup: str
    tags: list[str]
    tone: bool
    base: str
    images: dict[str, bytes | str] = field(default_factory=dict)


def read_member(tarball: Path, name: str) -> bytes:
    with tarfile.open(tarball) as tar:
        handle = tar.extractfile(name)
        if handle is None:
            raise FileNotFoundError(f"{tarball.name} has no {name}")
        return handle.read()


def load_names(folder: Path) -> dict[str, Entry]:
    rows = json.loads(read_member(folder / CLDR, "package/en/data.json"))
    words = json.loads(read_member(folder / CLDR, "package/meta/groups.json"))
    entries: dict[str, Entry] = {}
    for row in rows:
        if "group" not in row:
            continue
        group, subgroup = (
            words["groups"][str(row["group"])],
            words["subgroups"][str(row["subgroup"])],
        )
        base = code_key(row["hexcode"])
        for item in [row, *row.get("skins", [])]:
            code = code_key(item["hexcode"])
            entries[code] = Entry(
                code,
                plain_name(item["label"]),
                item["label"],
                group,
                subgroup,
                list(row.get("tags", [])),
                "tone" in item,
                base,
            )
    return entries


def load_images(folder: Path, style: str, by_name: dict[str, str]) -> dict[str, bytes | str]:
    """Images of one style by code; an iconify set without code points is matched by name."""
    source = SOURCES[style]
    path = folder / source.tarball
    out: dict[str, bytes | str] = {}
    if source.kind == "raster":
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".webp"):
                    handle = tar.extractfile(member)
                    assert handle is not None  # a .webp member is a file
                    out[code_key(Path(member.name).stem)] = handle.read()
        return out
    icons = json.loads(read_member(path, "package/icons.json"))
    chars = json.loads(read_member(path, "package/chars.json"))
    aliases = icons.get("aliases", {})
    if not chars:
        names = [*icons["icons"], *aliases]
        pairs = [(by_name[name], name) for name in names if name in by_name]
    else:
        pairs = [(code_key(code), name) for code, name in chars.items()]
        for code, name in pairs:
            by_name.setdefault(name, code)
    for code, name in pairs:
        icon = icons["icons"].get(name) or icons["icons"].get(aliases.get(name, {}).get("parent", ""))
        if icon is None or code in out:
            continue
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
        out[code] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
            f"{icon['body']}</svg>"
        )
    return out


def render(source: bytes | str, size: int) -> Image.Image:
    """Image on white at size x size; vectors are rendered four times larger first."""
    if isinstance(source, bytes):
        image = Image.open(io.BytesIO(source)).convert("RGBA")
    else:
        import resvg_py

        big = max(256, 4 * size) if size < 256 else size
        data = resvg_py.svg_to_bytes(svg_string=source, width=big, height=big, skip_system_fonts=True)
        image = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    ground.alpha_composite(image)
    return ground.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def fraction(text: str) -> float:
    """Number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def split_of(entry: Entry, style: str, styles: list[str], unseen: float, held: float) -> str:
    """Split of an image, by hashes, so that it stays when styles or sizes are added.

    No style of a val-concepts concept is trained on; of a val-styles one, one is held back.
    """
    place = fraction(f"concept:{entry.base}")
    if place < unseen:
        return "val-concepts"
    if place < unseen + held and len(styles) > 2:
        pick = int(fraction(f"style:{entry.base}") * len(styles))
        if styles[pick] == style:
            return "val-styles"
    return "train"


def members(entry: Entry, style: str, size: int, quality: int) -> Iterator[tuple[str, bytes]]:
    """Endings and contents of one sample's files."""
    source = SOURCES[style]
    texts = captions(entry.name, entry.group, source.phrase, entry.tags)
    facts = {
        "captions": texts,
        "name": entry.name,
        "style": source.phrase,
        "source": style,
        "code": entry.code,
        "group": entry.group,
        "subgroup": entry.subgroup,
        "tags": entry.tags,
        "license": source.license,
    }
    encoded = io.BytesIO()
    image = render(entry.images[style], size)
    if quality > 100:
        image.save(encoded, "WEBP", lossless=True, method=6)
    else:
        image.save(encoded, "WEBP", quality=quality, method=6)
    yield "webp", encoded.getvalue()
    yield "txt", (texts[0] + "\n").encode()
    yield "json", json.dumps(facts, ensure_ascii=False, separators=(",", ":")).encode()


def write_shard(path: Path, samples: list[tuple[str, list[tuple[str, bytes]]]], zipped: bool) -> int:
    """Writes a tar without times or owners, so that bytes repeat; returns their number."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, parts in samples:
            for ending, data in parts:
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size, info.mtime, info.mode = len(data), 0, 0o644
                tar.addfile(info, io.BytesIO(data))
    data = raw.getvalue()
    if zipped:
        squeezed = io.BytesIO()
        with gzip.GzipFile(fileobj=squeezed, mode="wb", compresslevel=9, mtime=0, filename="") as out:
            out.write(data)
        data = squeezed.getvalue()
    path.write_bytes(data)
    return len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="folder with the npm tarballs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--quality", type=int, default=90, help="WebP quality; over 100 means lossless")
    parser.add_argument("--styles", nargs="+", default=list(PERMISSIVE), choices=list(SOURCES))
    parser.add_argument("--tones", action="store_true", help="take the skin tone variants too")
    parser.add_argument("--flags", action="store_true", help="take the flags too")
    parser.add_argument("--unseen", type=float, default=0.05, help="share of concepts kept for val-concepts")
    parser.add_argument("--held", type=float, default=0.25, help="share of concepts with one style in val-styles")
    parser.add_argument("--per-shard", type=int, default=1500)
    parser.add_argument("--plain-tar", action="store_true", help="write .tar, not .tar.gz")
    args = parser.parse_args()

    entries = load_names(args.sources)
    by_name = {slug(entry.label): code for code, entry in reversed(list(entries.items()))}
    for style in sorted(args.styles, key=lambda name: name == "noto-v1"):
        for code, image in load_images(args.sources, style, by_name).items():
            if code in entries:
                entries[code].images[style] = image
    skipped = SKIPPED_GROUPS - ({"flags"} if args.flags else set())
    chosen = [
        (entry, style)
        for entry in entries.values()
        for style in args.styles
        if style in entry.images and entry.group not in skipped and (args.tones or not entry.tone)
    ]
    chosen.sort(key=lambda pair: fraction(f"order:{pair[0].code}:{pair[1]}"))

    splits: dict[str, list[tuple[Entry, str]]] = {
        "train": [],
        "val-styles": [],
        "val-concepts": [],
    }
    for entry, style in chosen:
        available = [name for name in args.styles if name in entries[entry.base].images]
        splits[split_of(entry, style, available, args.unseen, args.held)].append((entry, style))

    args.out.mkdir(parents=True, exist_ok=True)
    ending = "tar" if args.plain_tar else "tar.gz"
    split_facts: dict[str, object] = {}
    for split, pairs in splits.items():
        shards: list[dict[str, object]] = []
        for first in range(0, len(pairs), args.per_shard):
            part = pairs[first : first + args.per_shard]
            samples = [
                (f"{entry.code}_{style}", list(members(entry, style, args.size, args.quality)))
                for entry, style in part
            ]
            name = f"emoji{args.size}-{split}-{len(shards):05d}.{ending}"
            count = write_shard(args.out / name, samples, not args.plain_tar)
            digest = hashlib.sha256((args.out / name).read_bytes()).hexdigest()
            shards.append({"file": name, "samples": len(part), "bytes": count, "sha256": digest})
        styles = dict(Counter(style for _, style in pairs))
        split_facts[split] = {"samples": len(pairs), "shards": shards, "styles": styles}
    manifest = {
        "size": args.size,
        "format": "webp",
        "quality": args.quality,
        "keys": ["webp", "txt", "json"],
        "splits": split_facts,
        "sources": {style: SOURCES[style].facts() for style in args.styles},
    }
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    total = sum(len(pairs) for pairs in splits.values())
    print({split: len(pairs) for split, pairs in splits.items()}, "total", total)


if __name__ == "__main__":
    main()
