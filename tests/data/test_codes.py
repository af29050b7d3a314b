from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle_zoo import claims
from dalle_zoo.claims import ClaimedError
from dalle_zoo.data import (
    CodeDataset,
    CodeShardWriter,
    ImageTextDataset,
    ResumableLoader,
    Skipped,
    encode_source,
    encoding,
    open_source,
)
from dalle_zoo.data.captions import INVALID_CAPTION
from dalle_zoo.sharing import Share

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"  # it minds workers on a machine with few cores
)

SIZE, BOOK = 8, 300
OPTIONS: dict[str, Any] = {
    "size": SIZE, "variants": 3, "seed": 5, "batch_size": 4, "samples_per_shard": 10, "chunk": 4,
    "info": {"codebook_size": BOOK, "sha256": "abc"}, "progress": False,
}  # fmt: skip


def encode(images: Tensor) -> Tensor:
    """Replaces an image tokenizer: codes (B, 2, 4) that distinguish images and crops."""
    assert images.dtype == torch.float32
    assert images.max() <= 1
    return (images.unfold(2, 4, 4).unfold(3, 2, 2).sum((1, 4, 5)) * 12).long() % BOOK


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture
def source(make: Any) -> Any:
    return open_source(make.shards(17, 9))


def test_code_files_have_expected_format(make: Any, source: Any) -> None:
    out = make.root / "out"
    manifest = encode_source(source, encode, out, **OPTIONS)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["count"] == 26
    assert manifest["grid"] == [2, 4]
    assert manifest["tokenizer"] == OPTIONS["info"]
    assert manifest["source"] == source.fingerprint()
    assert [s["samples"] for s in manifest["shards"]] == [10, 10, 6]
    assert hashes(out).keys() == {"manifest.json", *(f"codes-0000{i}.tar" for i in range(3))}
    for shard in manifest["shards"]:
        assert hashes(out)[shard["file"]] == shard["sha256"]
    with tarfile.open(out / "codes-00000.tar") as archive:
        assert len(archive.getnames()) == 3 * 2 + 1
        file = archive.extractfile("000001.npy")
        assert file is not None
        codes = np.load(io.BytesIO(file.read()), allow_pickle=False)
    assert codes.dtype == np.uint16
    assert codes.shape == (4, 3, 2, 4)


@pytest.mark.parametrize("epoch", [0, 1, 2, 4])
def test_codes_on_the_fly_equal_encoded_codes(make: Any, source: Any, epoch: int) -> None:
    encode_source(source, encode, make.root / "out", **OPTIONS)
    stored = CodeDataset(make.root / "out", caption="random", seed=5)
    fresh = ImageTextDataset(source, transform="prior", size=SIZE, seed=5, variants=3, caption="random")
    assert len(stored) == len(fresh) == 26
    where = {"seed": None, "epoch": epoch, "start": 0, "stop": 26}
    for a, b in zip(stored.read(**where), fresh.read(**where), strict=True):  # type: ignore[arg-type]
        assert isinstance(a, dict)
        assert isinstance(b, dict)
        assert (a["key"], a["caption"]) == (b["key"], b["caption"])
        assert a["codes"].dtype == torch.int64
        assert torch.equal(a["codes"], encode(b["image"][None].float() / 255)[0])


def test_variants_have_different_crops(make: Any, source: Any) -> None:
    encode_source(source, encode, make.root / "out", **OPTIONS)
    data = CodeDataset(make.root / "out")
    epochs = [
        torch.stack([r["codes"] for r in data.read(seed=None, epoch=e, start=0, stop=26)])  # type: ignore[index]
        for e in range(4)
    ]
    assert torch.equal(epochs[0], epochs[3])
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_code_batches_are_complete_and_resumable(make: Any, source: Any, workers: int) -> None:
    encode_source(source, encode, make.root / "out", **OPTIONS)

    def loader() -> ResumableLoader:
        data = CodeDataset(make.root / "out", caption="random")
        return ResumableLoader(data, 5, seed=1, num_workers=workers, drop_last=False)

    batches = list(loader())
    assert sorted(k for b in batches for k in b["key"]) == [f"s{i:04d}" for i in range(26)]
    assert batches[0]["codes"].shape == (5, 2, 4)
    first = loader()
    stream = iter(first)
    next(stream), next(stream)
    second = loader()
    second.load_state_dict(first.state_dict())
    for a, b in zip(second, batches[2:], strict=True):
        assert a["key"] == b["key"]
        assert a["caption"] == b["caption"]
        assert torch.equal(a["codes"], b["codes"])


def test_windows_of_code_shards_have_expected_samples(make: Any, source: Any) -> None:
    encode_source(source, encode, make.root / "out", **OPTIONS)
    data = CodeDataset(make.root / "out")
    for start, stop in ((0, 1), (3, 5), (7, 23), (9, 11), (25, 26)):
        found = data.read(seed=None, epoch=0, start=start, stop=stop)
        assert [r["key"] for r in found] == [f"s{i:04d}" for i in range(start, stop)]  # type: ignore[index]


def test_large_codebooks_are_stored_wider(make: Any, source: Any) -> None:
    options = OPTIONS | {"info": {"codebook_size": 70_000}}
    encode_source(source, lambda x: encode(x) + 69_000, make.root / "out", **options)
    assert next(iter(CodeDataset(make.root / "out")))["codes"].min() >= 69_000


def test_unusable_samples_are_skipped_and_listed(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    members = make.members(0, 12)
    members["s0003.png"] = b"oops"
    del members["s0011.txt"], members["s0011.json"]
    source = open_source(make.tar("a.tar", members))
    manifest = encode_source(source, encode, make.root / "out", **OPTIONS)
    assert manifest["count"] == 10
    assert manifest["skipped"].keys() == {"s0003", "s0011"}
    assert "skipped s0003" in caplog.text
    assert "skipped s0011: no caption" in caplog.text
    data = CodeDataset(make.root / "out")
    assert len(data) == len(list(data)) == 10


def test_skipped_samples_do_not_change_bytes_of_others(make: Any) -> None:
    members = {**make.members(0, 3), "bad.png": b"oops", "bad.txt": b"caption"}
    source = open_source(make.tar("a.tar", members))
    first, second = (encode_source(source, encode, make.root / name, **OPTIONS) for name in ("one", "two"))
    assert first["skipped"].keys() == {"bad"}
    assert first["shards"] == second["shards"]
    assert hashes(make.root / "one") == hashes(make.root / "two")


def test_no_usable_sample_raises(make: Any) -> None:
    source = open_source(make.tar("a.tar", {"x.png": b"oops", "x.txt": b"caption"}))
    with pytest.raises(ValueError, match="no sample of the source can be used: x: not a readable"):
        encode_source(source, encode, make.root / "out", **OPTIONS)
    assert not (make.root / "out").exists()


@pytest.mark.parametrize("fail_at", [1, 4, 6, 13, 20])
def test_interrupted_encoding_is_continued(make: Any, source: Any, fail_at: int) -> None:
    calls = 0

    def failing(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise RuntimeError("out of memory")
        return encode(images)

    encode_source(source, encode, make.root / "complete", **OPTIONS)
    out = make.root / "out"
    with pytest.raises(RuntimeError, match="out of memory"):
        encode_source(source, failing, out, **OPTIONS)
    with pytest.raises(ValueError, match="unfinished"):
        CodeDataset(out)
    done = calls
    encode_source(source, failing, out, **OPTIONS)
    assert hashes(out) == hashes(make.root / "complete")
    assert fail_at < 13 or calls - done < 26  # finished shards are not encoded again


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_codes as t
def slow(images):
    time.sleep(0.02)
    return t.encode(images)
t.encode_source(t.open_source({shards!r}), slow, {out!r}, **t.OPTIONS)
"""


@pytest.mark.slow
def test_killed_process_loses_no_chunks(make: Any, source: Any) -> None:
    encode_source(source, encode, make.root / "complete", **OPTIONS)
    out = make.root / "out"
    script = SCRIPT.format(tests=str(Path(__file__).parent), shards=str(make.root / "shards"), out=str(out))
    for finished in (0, 2):
        process = subprocess.Popen([sys.executable, "-c", script])
        waiting = out / f".codes-0000{finished}.tar.writing"
        deadline = time.monotonic() + 60
        while not waiting.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
        assert len(list(out.glob("codes-*.tar"))) >= finished
    encode_source(source, encode, out, **OPTIONS)
    assert hashes(out) == hashes(make.root / "complete")


def test_process_killed_after_manifest_is_complete(make: Any, source: Any) -> None:
    out = make.root / "out"
    manifest = encode_source(source, encode, out, **OPTIONS)
    before = hashes(out)
    settings = {k: v for k, v in manifest.items() if k not in ("count", "grid", "num_skipped", "skipped", "shards")}
    (out / "encoding.json").write_text(json.dumps(settings))
    assert encode_source(source, encode, out, **OPTIONS) == manifest
    assert hashes(out) == before


def test_existing_shards_are_not_overwritten(make: Any, source: Any) -> None:
    out = make.root / "out"
    encode_source(source, encode, out, **OPTIONS)
    before = hashes(out)
    for changes in ({}, {"seed": 6}):
        with pytest.raises(ValueError, match="finished encoding"):
            encode_source(source, encode, out, **OPTIONS | changes)
        assert hashes(out) == before
    encode_source(source, encode, out, **OPTIONS | {"seed": 6, "overwrite": True})
    assert hashes(out).keys() == before.keys()
    assert hashes(out) != before
    encode_source(source, encode, out, **OPTIONS | {"overwrite": True})
    assert hashes(out) == before


def test_old_encoding_remains_until_new_one_is_complete(make: Any, source: Any) -> None:
    out, calls = make.root / "out", 0
    encode_source(source, encode, out, **OPTIONS)
    before = hashes(out)

    def failing(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 13:  # in the second shard
            raise RuntimeError("stop")
        return encode(images)

    changed = OPTIONS | {"seed": 6, "overwrite": True}
    with pytest.raises(RuntimeError, match="stop"):
        encode_source(source, failing, out, **changed)
    assert hashes(out) == before
    encode_source(source, failing, out, **changed)
    assert calls < 13 + 26, "the first shard was kept"
    encode_source(source, encode, make.root / "complete", **OPTIONS | {"seed": 6})
    assert hashes(out) == hashes(make.root / "complete")
    assert sorted(path.name for path in make.root.iterdir()) == ["complete", "out", "shards"]
    (out / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes\)"):
        encode_source(source, encode, out, **changed)
    assert (out / "notes").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_second_concurrent_encoding_raises(make: Any, source: Any, overwrite: bool) -> None:
    out, refusals = make.root / "out", []
    options = OPTIONS | {"samples_per_shard": 30, "overwrite": overwrite}  # one shard of several chunks
    if overwrite:
        encode_source(source, encode, out, **options | {"seed": 6})
    encode_source(source, encode, make.root / "complete", **options)

    def meanwhile(images: Tensor) -> Tensor:
        with pytest.raises(ClaimedError, match=r"^process \d+ on .* writes .*out.*: wait until it ends") as refusal:
            encode_source(source, encode, out, **options)
        refusals.append(refusal)
        return encode(images)

    encode_source(source, meanwhile, out, **options)
    assert len(refusals) > 4
    assert hashes(out) == hashes(make.root / "complete")


def test_concurrent_encodings_without_locks_lose_nothing(
    make: Any, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "fcntl", None)
    options = OPTIONS | {"samples_per_shard": 30}
    encode_source(source, encode, make.root / "complete", **options)
    out, waiting = make.root / "out", [encode_source]

    def meanwhile(images: Tensor) -> Tensor:
        while waiting:
            waiting.pop()(source, encode, out, **options)
        return encode(images)

    manifest = encode_source(source, meanwhile, out, **options)
    assert manifest["count"] == 26
    assert hashes(out) == hashes(make.root / "complete")


@pytest.mark.parametrize("overwrite", [False, True])
def test_kill_at_any_time_loses_nothing(
    make: Any, overwrite: bool, tmp_path: Path, killed_states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    root, source = tmp_path / "root", open_source(make.shards(3))
    options = OPTIONS | {"variants": 1, "samples_per_shard": 2, "overwrite": overwrite}
    encode_source(source, encode, make.root / "complete", **options)
    encode_source(source, encode, make.root / "old", **options | {"seed": 6})
    complete, old = hashes(make.root / "complete"), hashes(make.root / "old")
    root.mkdir()
    if overwrite:
        shutil.copytree(make.root / "old", root / "out")
    with killed_states(root):
        encode_source(source, encode, root / "out", **options)
    states = sorted((tmp_path / "killed").iterdir())
    assert len(states) > 20
    for state in states:
        if overwrite:
            assert hashes(state / "out") in (old, complete)
        elif (state / "out/manifest.json").exists() and not (state / "out/encoding.json").exists():
            options = options | {"overwrite": True}  # it was finished
        encode_source(source, encode, state / "out", **options)
        assert hashes(state / "out") == complete
        assert [path.name for path in state.iterdir()] == ["out"], "nothing is left"


def test_other_settings_or_files_raise(make: Any, source: Any) -> None:
    out = make.root / "out"

    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        encode_source(source, broken, out, **OPTIONS)
    with pytest.raises(ValueError, match="seed was 5 and is 6 now"):
        encode_source(source, encode, out, **OPTIONS | {"seed": 6})
    encode_source(source, encode, out, **OPTIONS | {"seed": 6, "overwrite": True})
    photos = make.root / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"other files \(a.png\)"):
            encode_source(source, encode, photos, **OPTIONS | {"overwrite": overwrite})
    external = make.shards(2, folder="external")
    (external / "manifest.json").write_text('{"shards": []}')
    with pytest.raises(ValueError, match=r"finished|other files"):
        encode_source(source, encode, external, **OPTIONS | {"overwrite": True})
    assert (photos / "a.png").read_bytes() == b"mine"


def test_wrong_options_raise(make: Any, source: Any) -> None:
    out = make.root / "out"
    for changes, message in (
        ({"variants": 0}, "variants must be an integer of at least 1"),
        ({"chunk": 0}, "chunk must be an integer of at least 1"),
        ({"info": {}}, "info must have an integer codebook_size"),
        ({"transform": "priors"}, "Did you mean 'prior'"),
        ({"info": {"codebook_size": 2}}, r"codes must be in 0..1"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_source(source, encode, out, **OPTIONS | changes)
    with (
        pytest.raises(ValueError, match="codes must be integers"),
        CodeShardWriter(make.root / "x.tar", codebook_size=4) as writer,
    ):
        writer.add("k", ["c"], torch.zeros(2, 2))


def test_wrong_folders_raise(make: Any, source: Any) -> None:
    with pytest.raises(ValueError, match="it holds nothing"):
        CodeDataset(make.root / "missing")
    with pytest.raises(ValueError, match="it holds images"):
        CodeDataset(make.root / "shards")
    out = make.root / "out"
    encode_source(source, encode, out, **OPTIONS)
    with pytest.raises(ValueError, match="CodeDataset"):
        open_source(out)
    (out / "codes-00001.tar").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"codes-00001.tar' has 5 bytes, its manifest says"):
        CodeDataset(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": 0}, "variants must be an integer of at least 1, got 0"),
        ({"chunk": "4"}, "chunk must be an integer of at least 1, got '4'"),
        ({"grid": [2]}, "not enough values"),
        ({"grid": [2, 10**9]}, "cannot have 10 samples"),
        ({"tokenizer": {}}, "there is no 'codebook_size'"),
        ({"tokenizer": []}, "list indices"),
        ({"shards": [[]]}, "list indices"),
        ({"shards": [{"file": "../x.tar", "samples": 1, "bytes": 1}]}, "must have file, samples and bytes"),
        ({"shards": [{"file": "codes-00000.tar", "samples": 10**9, "bytes": 10240}]}, "cannot have 1000000000"),
        ({"shards": [{"file": "codes-00000.tar", "samples": -1, "bytes": 10240}]}, "cannot have -1 samples"),
    ],
)
def test_wrong_manifests_raise(make: Any, source: Any, change: dict[str, Any], message: str) -> None:
    encode_source(source, encode, make.root / "out", **OPTIONS)
    path = make.root / "out/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"manifest.json is damaged.*{message}"):
        CodeDataset(make.root / "out")


def array(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("000001.npy", b"x", "000001.npy is not an array"),
        ("000001.npy", array(np.zeros((4, 3, 2, 5), np.uint16)), "must hold integers of shape"),
        ("000001.npy", array(np.zeros((4, 3, 2, 4))), "must hold integers of shape"),
        ("000001.npy", array(np.full((4, 3, 2, 4), BOOK, np.uint16)), r"codes must be in 0..299, got 300..300"),
        ("000001.json", b"[]", "must contain a JSON object"),
        ("000001.json", b'{"keys": ["a"], "captions": [["b"]]}', "must hold keys and captions of 4 samples"),
        ("000001.json", b'{"keys": [1, 2, 3, 4], "captions": [[], [], [], []]}', "must hold keys and captions"),
        (None, b"", "there is no 000001.npy"),
    ],
)
def test_damaged_chunks_are_skipped_and_listed(
    make: Any, source: Any, name: str | None, data: bytes, message: str
) -> None:
    out = make.root / "out"
    encode_source(source, encode, out, **OPTIONS)
    with tarfile.open(out / "codes-00000.tar") as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    if name is None:
        del members["000001.npy"]
    else:
        members[name] = data
    path = make.tar("out/codes-00000.tar", members)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = path.stat().st_size
    (out / "manifest.json").write_text(json.dumps(manifest))
    records = list(CodeDataset(out).read(seed=None, epoch=0, start=0, stop=26))
    skipped = [record for record in records if isinstance(record, Skipped)]
    assert skipped == skipped[:1] * 4, "each sample has a position"
    assert skipped[0].key.endswith("codes-00000.tar, chunk 1")
    assert re.search(message, skipped[0].reason)
    assert len(records) == 26


def test_bad_captions_and_names_do_not_stop_encoding(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make.root / "in"
    root.mkdir()
    for i, name in enumerate((b"a", b"b", b"caf\xe9", b"c")):
        path = root / os.fsdecode(name + b".png")
        path.write_bytes(make.image(i))
        path.with_suffix(".txt").write_text("a thing")
    (root / "b.json").write_text('{"caption": "half \\ud83d"}')
    (root / "c.json").write_text('{"captions": ["half \\ud83d", "whole"]}')
    out = make.root / "out"
    manifest = encode_source(open_source(root), encode, out, **OPTIONS)
    assert manifest["skipped"] == {"b": INVALID_CAPTION, "c (one of its captions)": INVALID_CAPTION}
    monkeypatch.setattr(encoding, "MAX_NAMED", 1)
    short = encode_source(open_source(root), encode, make.root / "short", **OPTIONS)
    assert (short["num_skipped"], short["skipped"]) == (2, {"b": INVALID_CAPTION})
    assert {item["key"]: item["caption"] for item in CodeDataset(out)} == {
        "a": "a thing", "c": "whole", "caf\\udce9": "a thing"
    }  # fmt: skip


def test_description_of_a_shard_precedes_it(make: Any, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    early, write = [], encoding.write_json

    def watch(path: Path, value: Any) -> None:
        if path.name.startswith("codes-"):
            early.append(not path.with_suffix(".tar").exists())
        write(path, value)

    monkeypatch.setattr(encoding, "write_json", watch)
    manifest = encode_source(source, encode, make.root / "out", **OPTIONS)
    # Otherwise another process could find all shards, finish, and leave a description that comes later.
    assert early == [True] * len(manifest["shards"])


@pytest.mark.parametrize("world", [2, 5])
def test_processes_that_share_the_work_write_the_same_bytes(make: Any, source: Any, world: int) -> None:
    encode_source(source, encode, make.root / "complete", **OPTIONS)
    out, results = make.root / "out", []

    def work(rank: int) -> None:
        results.append(encode_source(source, encode, out, **OPTIONS, share=Share(rank=rank, world=world)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work(0)  # a process that comes late
    assert hashes(out) == hashes(make.root / "complete")
    assert results == [results[0]] * (world + 1)


def test_processes_that_share_the_work_survive_one_that_fails(make: Any, source: Any) -> None:
    def failing(images: Tensor) -> Tensor:
        raise RuntimeError("lost")

    out = make.root / "out"
    with pytest.raises(RuntimeError, match="lost"):
        encode_source(source, failing, out, **OPTIONS, share=Share(rank=1, world=2))
    with pytest.raises(ValueError, match="seed was 5 and is 6 now"):
        encode_source(source, encode, out, **OPTIONS | {"seed": 6}, share=Share(rank=0, world=2))
    encode_source(source, encode, out, **OPTIONS, share=Share(rank=0, world=2))
    encode_source(source, encode, make.root / "complete", **OPTIONS)
    assert hashes(out) == hashes(make.root / "complete")
    with pytest.raises(ValueError, match="overwrite is for one process"):
        encode_source(source, encode, out, **OPTIONS, overwrite=True, share=Share(rank=0, world=2))


@pytest.mark.slow
def test_a_killed_process_costs_its_shard(make: Any, source: Any) -> None:
    encode_source(source, encode, make.root / "complete", **OPTIONS)
    out = make.root / "out"
    script = SCRIPT.format(tests=str(Path(__file__).parent), shards=str(make.root / "shards"), out=str(out))
    script = script.replace("**t.OPTIONS", "**t.OPTIONS, share=t.Share.of_environment()")
    ranks = [
        subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in range(2)
    ]
    deadline = time.monotonic() + 60
    while not (out / ".codes-00001.tar.claim").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    ranks[1].send_signal(signal.SIGKILL)
    assert [rank.wait() for rank in ranks] == [0, -signal.SIGKILL]
    assert hashes(out) == hashes(make.root / "complete")
