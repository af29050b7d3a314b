"""Shards with wrong headers: reading ends quickly and reports damage."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalle_zoo.data import Sample, ShardSource, Skipped, open_source, shards
from dalle_zoo.data.archives import MAX_EXTENSION, DamagedArchiveError, read_members

END = bytes(1024)


def header(name: bytes, size: bytes | int, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A header with any given size field and a valid checksum."""
    block = bytearray(512)
    fields = {0: name, 100: b"0000644\0", 124: b"%011o\0" % size if isinstance(size, int) else size}
    fields |= {136: b"%011o\0" % 0, 148: b" " * 8, 156: kind, 157: link, 257: b"ustar\x0000"}
    for offset, value in fields.items():
        block[offset : offset + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def binary(size: int) -> bytes:
    return size.to_bytes(12, "big", signed=True) if size < 0 else b"\x80" + size.to_bytes(11, "big")


def record(name: str, value: str) -> bytes:
    text = f" {name}={value}\n"
    return f"{len(text) + 2}{text}".encode() if len(text) < 98 else f"{len(text) + 3}{text}".encode()


def pax(*fields: bytes, kind: bytes = b"x") -> bytes:
    data = b"".join(fields)
    return header(b"p", len(data), kind) + padded(data)


def shard(make: Any, tail: bytes, name: str = "a.tar") -> ShardSource:
    """Three valid samples, followed by given bytes."""
    path: Path = make.tar("plain.tar", make.members(0, 3))
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    data = path.read_bytes()[: last.offset_data] + padded(b"{}") + tail + END
    path = path.with_name(name)
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    return ShardSource([path])


HOSTILE: dict[str, tuple[bytes, str]] = {
    "a negative size": (header(b"n.png", binary(-512)), "has the size -512"),
    "an absurd size": (header(b"n.mp4", binary(2**80)), "truncated"),
    "an absurd size of a wanted member": (header(b"n.png", binary(2**60)), "truncated"),
    "an absurd size in an extended header": (
        pax(record("size", "9" * 18)) + header(b"n.mp4", 10) + padded(b"x"), "truncated"
    ),
    "a negative size in an extended header": (pax(record("size", "-9999")) + header(b"n.png", 10), "the size '-9999'"),
    "a size with a million digits": (
        header(b"p", 1_000_015, b"x") + padded(b"1000015 size=" + b"9" * 1_000_001 + b"\n") + header(b"n.png", 0),
        "has the size '9999",
    ),
    "a long name without end": (header(b"././@LongLink", binary(2**60), b"L"), "an extended header has"),
    "a negative long name": (header(b"././@LongLink", binary(-512), b"L"), "an extended header has -512"),
    "extended headers one after the other": (
        (header(b"././@LongLink", 5, b"L") + padded(b"a.png")) * 1000 + header(b"n.png", 0), ""
    ),
    "an extended header that searches take long for": (
        header(b"p", 2**19, b"x") + b"1" * 2**19 + header(b"n.png", 0), "an extended header is damaged"
    ),
    "an extended header with a record of no length": (pax(b"0 a=b\n"), "an extended header is damaged"),
    "a sparse file that claims more blocks": (
        header(b"n.png", 0, b"S")[:482] + b"\1" + bytes(29) + b"x" * 504 + b"\1" * 8, ""
    ),
    "noise": (b"x" * 512, "invalid header"),
    "another archive": (END + header(b"n.png", 0), "more members follow"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("case", HOSTILE)
def test_malicious_headers_are_rejected(make: Any, case: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    tail, message = HOSTILE[case]
    source = shard(make, tail, name)
    assert source.num_samples == 3 + (case.startswith("extended headers"))
    records = list(source.read(seed=None, epoch=0, start=0, stop=source.num_samples))
    assert [r.key for r in records[:3]] == ["s0000", "s0001", "s0002"]
    assert all(isinstance(r, Sample) for r in records[:3])
    if message:
        (skipped,) = records[3:]
        assert isinstance(skipped, Skipped)
        assert message in skipped.reason
        assert len(skipped.reason) < 250


def test_members_above_the_limit_are_skipped_and_listed(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_IMAGE_BYTES", 1000)
    source = open_source(make.tar("a.tar", {**make.members(0, 1), "b.png": bytes(1001), **make.members(2, 3)}))
    assert source.num_samples == 3
    records = list(source.read(seed=None, epoch=0, start=0, stop=3))
    assert records[1] == Skipped("b", "the image is 1001 bytes long, more than 1000")
    assert [r.key for r in records] == ["s0000", "b", "s0002"]
    (only,) = source.read(seed=None, epoch=0, start=2, stop=3)
    assert only.key == "s0002", "a skipped sample has a position"


def test_links_are_skipped_with_reason(make: Any) -> None:
    tail = header(b"a.png", len(make.image())) + padded(make.image()) + header(b"a.txt", 9, b"1", b"s0000.txt")
    source = shard(make, tail + header(b"b.png", 0, b"2", b"s0000.png"))
    assert source.num_samples == 5
    records = list(source.read(seed=None, epoch=0, start=3, stop=5))
    assert isinstance(records[0], Sample)
    assert "the caption is a link to 's0000.txt', and links in archives are not followed" in records[0].problem
    assert isinstance(records[1], Skipped)
    assert "`tar --dereference --hard-dereference`" in records[1].reason


def test_listed_members_are_read(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    image = make.image()
    members = {
        "__a__/000.png": image,
        "001.png": image,
        "._001.png": b"x",
        "__MACOSX/._1.jpg": b"x",
        "d/.h/2.png": b"x",
    }
    source = open_source(make.tar("a.tar", members))
    assert [s.key for s in source.stream()] == ["__a__/000", "001"]
    assert source.num_samples == 2
    assert not caplog.records


def test_names_in_every_format_agree_with_tarfile(make: Any) -> None:
    names = ["b.png", "ordner/" * 20 + "ä" * 40 + ".png", "n" * 300 + ".png"]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        path = make.root / f"{form}.tar"
        with tarfile.open(path, "w", format=form, pax_headers={"comment": "global"}) as archive:
            for name in names[: 2 if form == tarfile.USTAR_FORMAT else 3]:
                info = tarfile.TarInfo(name)
                info.size = 3
                archive.addfile(info, io.BytesIO(b"abc"))
        with tarfile.open(path) as archive:
            expected = [(member.name, b"abc") for member in archive]
        assert [(member.name, member.data) for member in read_members(path, lambda _: 10)] == expected


def test_groups_agree_with_webdataset(make: Any) -> None:
    from webdataset import tariterators

    members = make.members(0, 3) | {"d.d/a.JPG": b"1", "d.d/a.seg.png": b"2", "d.d/a.txt": b"x", "e.png": b"3"}
    path = make.tar("a.tar", members)
    with path.open("rb") as stream:
        files = tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        groups = list(tariterators.group_by_keys(files))
    expected = [(g["__key__"], g.get("png", g.get("jpg"))) for g in groups]
    assert [(sample.key, sample.image) for sample in open_source(path).stream()] == expected


def test_names_that_are_not_utf8_are_escaped(make: Any) -> None:
    image = make.image()
    tail = header(b"caf\xe9.png", len(image)) + padded(image) + header(b"caf\xe9.txt", 6) + padded(b"coffee")
    tail += pax(record("path", "na")[:-3] + b"\xef\xff\n") + header(b"x", len(image)) + padded(image)
    names = [sample.key for sample in shard(make, tail + header(b"d.png", 0, b"5")).stream()]
    assert names[3] == "caf\\udce9"
    assert all(name.encode() for name in names)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (("0.png", "1.png", "0.txt", "1.txt"), "captions without an image next to them in a.tar"),
        (("v1.0 shot.png", "v1.0 shot.txt"), "so 'v1.0 shot.png' has the key 'v1' and the suffix '0 shot.png'"),
        (("0.png", "0.PNG"), "the first is used of several members of a.tar with the suffix 'png'"),
    ],
)
def test_unused_members_have_reasons(make: Any, members: tuple[str, ...], reason: str) -> None:
    path = make.tar("a.tar", dict.fromkeys(members, make.image()))
    assert reason in next(ShardSource([path]).problems()).reason
    if "v1" in members[0]:
        with pytest.raises(ValueError, match=r"holds no image .v1: no image in a.tar: a key ends at the first dot"):
            open_source(path)


def test_extended_headers_have_a_limit(make: Any) -> None:
    path = make.root / "a.tar"
    path.write_bytes(header(b"p", MAX_EXTENSION + 1, b"x") + bytes(MAX_EXTENSION + 512) + END)
    read: Callable[[], Any] = lambda: list(read_members(path, lambda _: 1))  # noqa: E731
    with pytest.raises(DamagedArchiveError, match=f"more than {MAX_EXTENSION}"):
        read()
