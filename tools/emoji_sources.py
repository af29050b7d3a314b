"""Reads emoji images and their CLDR names from npm tarballs, and assigns them to splits: for `tools.build_sprites`."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

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
}


def code_key(text: str) -> str:
    """Code point sequence in lower case, without variation selectors or leading zeros."""
    parts = (part.lstrip("0") or "0" for part in text.lower().split("-"))
    return "-".join(part for part in parts if part != "fe0f")


def slug(text: str) -> str:
    """Name as iconify spells it: ASCII words joined by hyphens."""
    plain = unicodedata.normalize("NFKD", text.replace("\u2019", "").replace("'", ""))
    return re.sub(r"[^a-z0-9]+", "-", plain.encode("ascii", "ignore").decode().lower()).strip("-")


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


@dataclass
class Entry:
    """One emoji: its names and, by style, its images (raster bytes or SVG text)."""

    code: str
    name: str
    label: str
    group: str
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
        group, base = words["groups"][str(row["group"])], code_key(row["hexcode"])
        for item in [row, *row.get("skins", [])]:
            code = code_key(item["hexcode"])
            entries[code] = Entry(
                code,
                plain_name(item["label"]),
                item["label"],
                group,
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
