from __future__ import annotations

import gzip
import itertools
import json
import logging
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dalle_zoo.composition import CompositionConfig
from dalle_zoo.data import FolderSource, Sample, ShardSource, Skipped, open_source
from dalle_zoo.data.ordering import stretches
from dalle_zoo.registry import UnknownNameError


def keys(source: Any, **arguments: Any) -> list[str]:
    return [sample.key for sample in source.stream(**arguments)]


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz"])
def test_every_form_of_shard_location_is_opened(make: Any, ending: str) -> None:
    folder = make.shards(3, 2, ending=ending)
    (folder / "00000.parquet").write_bytes(b"PAR1")
    (folder / "00000_stats.json").write_text("{}")
    (folder / "._00000.tar").write_bytes(b"hidden")
    expected = [f"s{i:04d}" for i in range(5)]
    places = [folder, str(folder), f"{folder}/*.{ending}", f"{folder}/{{00000..00001}}.{ending}"]
    places += [f"{folder}/{{00001,00000}}.{ending}"]
    for location in places:
        assert keys(open_source(location)) == expected
    assert keys(open_source(f"{folder}/00001.{ending}")) == expected[3:]
    first = next(open_source(folder).stream())
    assert first == Sample("s0000", make.image(0), ("thing 0", "one 0"))


def test_captions_of_shards_are_read(make: Any) -> None:
    image = make.image()
    captions = {
        "list": {"json": b'{"captions": ["a", " b ", "", 3], "caption": "no"}', "txt": b"no"},
        "one": {"json": b'{"caption": "a cat", "url": "x"}', "txt": b"no"},
        "lines": {"json": b'{"width": 3}', "txt": b"\xef\xbb\xbffirst\r\n\r\n second\n"},
        "broken": {"json": b"{", "txt": b"from text"},
        "none": {"json": b"[1]"},
        "latin": {"txt": b"caf\xe9"},
    }
    members = {}
    for key, texts in captions.items():
        members[f"./dir.d/{key}.JPG"] = image
        members |= {f"./dir.d/{key}.{suffix}": text for suffix, text in texts.items()}
        members[f"./dir.d/{key}.pkl"] = b"cos\nsystem\n(S'exit 1'\ntR."
        members[f"./dir.d/{key}.seg.png"] = b"another file of the same sample"
    source = open_source(make.tar("a.tar", members))
    assert {sample.key: sample.captions for sample in source.stream()} == {
        "dir.d/list": ("a", "b"),
        "dir.d/one": ("a cat",),
        "dir.d/lines": ("first", "second"),
        "dir.d/broken": ("from text",),
        "dir.d/none": (),
        "dir.d/latin": (),
    }
    assert source.num_samples == 6


def test_counts_are_read_from_matching_manifest(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make.shards(3, 2)
    records = [
        {"file": p.name, "bytes": p.stat().st_size, "samples": n}
        for p, n in zip(sorted(folder.glob("*.tar")), (3, 2), strict=True)
    ]
    records[1]["bytes"] += 1
    (folder / "manifest.json").write_text(json.dumps({"splits": {"train": {"shards": records}}}))
    scanned = []
    scan = vars(__import__("dalle_zoo.data.shards", fromlist=["x"]))["_scan"]
    monkeypatch.setattr("dalle_zoo.data.shards._scan", lambda path: (scanned.append(path.name), scan(path))[1])
    source = open_source(folder)
    assert len(source) == source.num_samples == 5
    assert scanned == ["00001.tar"]  # the one that has changed, and only once


def test_broken_manifests_are_ignored(make: Any) -> None:
    folder = make.shards(3)
    for text in ("", "[]", '{"shards": [1], "splits": [2]}'):
        (folder / "manifest.json").write_text(text)
        assert open_source(folder).num_samples == 3


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
def test_parts_are_disjoint_equal_and_complete(make: Any, seed: int | None, num_parts: int) -> None:
    folder = make.shards(7, 1, 5, 9)
    images = make.root / "images"
    for i in range(22):
        path = images / f"{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make.image(i))
    for source in (ShardSource(sorted(folder.iterdir()), shuffle_buffer=4), open_source(images)):
        everything = set(keys(source))
        assert len(everything) == 22
        for epoch in (0, 1):
            parts = [keys(source, seed=seed, epoch=epoch, part=p, num_parts=num_parts) for p in range(num_parts)]
            assert Counter(key for part in parts for key in part) == Counter(everything)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="part must be in"):
        next(source.stream(part=num_parts, num_parts=num_parts))


def test_order_depends_only_on_seed_and_epoch(make: Any) -> None:
    source = open_source(make.shards(20, 20, 20))
    orders = [keys(source, seed=s, epoch=e) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]
    assert orders[0] != sorted(orders[0])
    assert keys(source) == sorted(orders[0])
    assert keys(source, epoch=1) == keys(source)


def test_stretches_read_no_more_than_needed() -> None:
    parts = list(stretches([4, 4, 4], seed=None, epoch=0, start=3, stop=9))
    assert [(p.shard, p.start, p.stop) for p in parts] == [(0, 3, 4), (1, 0, 4), (2, 0, 1)]


def test_folder_tree_is_read(make: Any) -> None:
    root = make.root / "tree"
    for name in ("b/cat.png", "a/cat.jpeg", "a/dog.PNG", "a/twin.png", "a/twin.jpg", ".h/x.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make.image(len(name)))
    (root / "b/cat.txt").write_text("one\ntwo\n")
    (root / "a/dog.json").write_text('{"captions": ["dog"]}')
    source = open_source(root)
    assert isinstance(source, FolderSource)
    assert {s.key: s.captions for s in source.stream()} == {
        "a/cat": (),
        "a/dog": ("dog",),
        "a/twin.jpg": (),
        "a/twin.png": (),
        "b/cat": ("one", "two"),
    }
    (root / "a/cat.jpeg").unlink()
    records = list(source.read(seed=None, epoch=0, start=0, stop=5))
    assert isinstance(records[0], Skipped)
    assert records[0].key == "a/cat"


def test_fingerprint_depends_on_names_and_sizes(make: Any) -> None:
    folder = make.shards(2, 2)
    before = open_source(folder).fingerprint()
    assert before == open_source(folder).fingerprint()
    assert before != open_source(folder / "00000.tar").fingerprint()
    images = make.root / "images"
    images.mkdir()
    (images / "a.png").write_bytes(make.image())
    plain = open_source(images).fingerprint()
    (images / "a.txt").write_text("caption")
    assert plain != open_source(images).fingerprint()


def damaged_header(path: Path, make: Any) -> None:
    """Damages the header of the second sample's first member."""
    with tarfile.open(path) as archive:
        offset = archive.getmember("s0001.png").offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 512] = b"x" * 512
    path.write_bytes(bytes(data))


def truncated(path: Path, make: Any) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path, make: Any) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 255
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("ending", "spoil"),
    [("tar", damaged_header), ("tar", truncated), ("tar.gz", truncated), ("tar.gz", flipped)],
)
def test_damaged_shards_are_listed_and_others_are_read(
    make: Any, caplog: pytest.LogCaptureFixture, ending: str, spoil: Any
) -> None:
    folder = make.shards(6, 6, ending=ending)
    spoil(folder / f"00000.{ending}", make)
    source = ShardSource(sorted(folder.iterdir()))
    with caplog.at_level(logging.WARNING):
        found = keys(source)
    assert set(found) >= {f"s{i:04d}" for i in range(6, 12)}
    assert found == sorted(set(found))
    warnings = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert len(warnings) == 1
    assert f"00000.{ending}" in warnings[0]
    assert "damaged" in warnings[0]


def test_truncated_gzip_shard_loses_only_its_tail(make: Any) -> None:
    path = make.shards(50, ending="tar.gz") / "00000.tar.gz"
    truncated(path, make)
    found = keys(ShardSource([path]))
    assert len(found) >= 15
    assert found == [f"s{i:04d}" for i in range(len(found))]


def test_captions_without_an_image_are_skipped(make: Any) -> None:
    members = {**make.members(0, 2), "x.txt": b"no image", **make.members(2, 4)}
    source = open_source(make.tar("a.tar", members))
    assert source.num_samples == 4
    records = list(source.read(seed=None, epoch=0, start=0, stop=4))
    assert [r.key for r in records] == ["s0000", "s0001", "x", "s0002", "s0003"]
    assert isinstance(records[2], Skipped)


def test_user_without_home_directory_is_reported() -> None:
    with pytest.raises(ValueError, match="location of the data '~no-such-user/x': this home folder is not known"):
        open_source("~no-such-user/x")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("missing.tar", "does not exist"),
        ("shard", "Did you mean .*shards'"),
        ("empty", "holds no image"),
        ("shards/00000.txt", "not a shard"),
        ("shards/*.tgz", "matches no shard"),
        ("shards/0000{0..3}.tar", r"00002.tar' matches no shard"),
        ("shards/{0..3.tar", "unbalanced"),
        ("images/*.png", "name their folder"),
        ("noise.tar", "holds no image"),
        ("texts.tar", "holds no image"),
        ("codes", "CodeDataset"),
    ],
)
def test_wrong_locations_raise(make: Any, location: str, message: str) -> None:
    (make.shards(2, 2) / "00000.txt").write_text("x")
    (make.root / "empty").mkdir()
    (make.root / "images").mkdir()
    (make.root / "images/a.png").write_bytes(make.image())
    (make.root / "noise.tar").write_bytes(b"noise" * 1000)
    make.tar("texts.tar", {"a.txt": b"caption"})
    make.tar("codes/codes-00000.tar", {"000000.npy": b""})
    with pytest.raises(ValueError, match=message):
        open_source(make.root / location)


@pytest.mark.parametrize(
    ("location", "meant"),
    [
        ("compositoin:train", "composition:train"),
        ("compositon:val-style", "composition:val-styles"),
        ("composition", "composition:train"),
    ],
)
def test_the_bundled_composition_is_suggested(
    location: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"does not exist. Did you mean '{meant}'"):
        open_source(location)


def test_locations_that_start_programs_raise() -> None:
    with pytest.raises(ValueError, match="starts a program"):
        open_source("pipe:touch x")


def test_splits_of_a_composition() -> None:
    assert open_source("composition:train").num_samples == CompositionConfig.load().samples
    first = itertools.islice(open_source("composition:val-styles").stream(), 3)
    assert [sample.key for sample in first] == ["single-0", "single-1", "single-2"]
    with pytest.raises(UnknownNameError, match="Did you mean 'val-styles'"):
        open_source("composition:val-style")


def test_gzip_is_recognized_by_contents(make: Any) -> None:
    path = make.tar("a.tar", make.members(0, 3))
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert len(keys(open_source(path))) == 3


def listing(folder: Path, *counts: Any) -> None:
    """Writes a manifest with the given counts."""
    paths = sorted(folder.glob("*.tar"))
    shards = [{"file": p.name, "bytes": p.stat().st_size, "samples": n} for p, n in zip(paths, counts, strict=True)]
    (folder / "manifest.json").write_text(json.dumps({"shards": shards}))


@pytest.mark.parametrize("count", [-1, 0, 10**12, 1e3, "3", None, [3], True])
def test_impossible_counts_are_ignored(make: Any, count: Any) -> None:
    folder = make.shards(3)
    listing(folder, count)
    assert open_source(folder).num_samples == 3


@pytest.mark.parametrize(("count", "relation"), [(2, "more"), (5, "fewer")])
def test_wrong_counts_are_reported(make: Any, count: int, relation: str) -> None:
    folder = make.shards(3, 4)
    listing(folder, count, 4)
    source = open_source(folder)
    assert source.num_samples == count + 4
    records = list(source.read(seed=None, epoch=0, start=0, stop=count + 4))
    skipped, *lost = [record for record in records if isinstance(record, Skipped)]
    assert len(lost) == max(count - 3, 0), "each sample has a position, even if the shard lacks it"
    assert f"the shard has {relation} samples than the {count} that the manifest.json" in skipped.reason
    assert sum(record.listed for record in records) == count + 4


def test_shard_without_samples_is_reported(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = make.shards(3)
    (folder / "1.tar").write_bytes(b"noise" * 1000)
    assert open_source(folder).num_samples == 3
    assert "1.tar has no sample" in caplog.text
    assert "the shard is damaged" in caplog.text
