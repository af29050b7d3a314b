from __future__ import annotations

import itertools
import json
import logging
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_zoo.data import (
    CodeDataset,
    Collate,
    EmptyDataError,
    ImageTextDataset,
    ResumableLoader,
    ShardSource,
    archives,
    decode_image,
    encode_source,
    iterate_batches,
    open_source,
    prior_transform,
    sample_rng,
)
from dalle_zoo.data.captions import INVALID_CAPTION

TOTAL = 23

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"  # it minds workers on a machine with few cores
)


@pytest.fixture
def source(make: Any) -> ShardSource:
    return ShardSource(sorted(make.shards(9, 2, 12).iterdir()), shuffle_buffer=5)


def images(source: Any, **options: Any) -> ImageTextDataset:
    return ImageTextDataset(source, **{"transform": "prior", "size": 8, "seed": 3} | options)


def encode(captions: Sequence[str], keys: Sequence[str], epoch: int) -> Tensor:
    return torch.tensor([[len(c), len(k), epoch] for c, k in zip(captions, keys, strict=True)])


def take(loader: ResumableLoader, count: int) -> list[dict[str, Any]]:
    """Yields a number of batches over several epochs."""
    found: list[dict[str, Any]] = []
    while len(found) < count:
        found.extend(itertools.islice(loader, count - len(found)))
    return found


def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) if isinstance(a[name], Tensor) else a[name] == b[name] for name in a)
        for a, b in zip(left, right, strict=True)
    )


def test_items_have_key_image_and_caption(source: Any, make: Any) -> None:
    dataset = images(source)
    assert len(dataset) == TOTAL
    items = list(dataset)
    assert [item["key"] for item in items] == [f"s{i:04d}" for i in range(TOTAL)]
    image = decode_image(make.image(4))
    assert torch.equal(items[4]["image"], prior_transform(image, 8, sample_rng(3, "s0004", 0)))
    assert items[4]["caption"] == "thing 4"


def test_variants_repeat_crops_and_none_does_not(source: Any) -> None:
    def image(epoch: int, **options: Any) -> Tensor:
        item = next(iter(images(source, **options).read(seed=None, epoch=epoch, start=0, stop=1)))
        assert isinstance(item, dict)
        image: Tensor = item["image"]
        return image

    assert torch.equal(image(0, variants=2), image(2, variants=2))
    assert not torch.equal(image(0, variants=2), image(1, variants=2))
    assert not torch.equal(image(0), image(6))


def test_random_captions_depend_on_key_and_epoch(source: Any) -> None:
    def captions(epoch: int) -> list[str]:
        dataset = images(source, caption="random")
        return [r["caption"] for r in dataset.read(seed=None, epoch=epoch, start=0, stop=TOTAL)]  # type: ignore[index]

    assert captions(0) == captions(0)
    assert captions(0) != captions(1)
    assert {c.split()[0] for c in captions(0)} == {"thing", "one"}


def test_batches_have_expected_shapes(source: Any) -> None:
    batch = next(iter(ResumableLoader(images(source), 4, seed=0, collate=Collate(encode))))
    assert batch.keys() == {"key", "image", "caption", "epoch", "text"}
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert 0.5 < batch["image"].max() <= 1
    assert batch["text"].tolist() == [[len(c), 5, 0] for c in batch["caption"]]
    for key, caption in zip(batch["key"], batch["caption"], strict=True):
        assert caption == f"thing {int(key[1:])}"


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_epoch_reads_every_sample_once(source: Any, workers: int, world_size: int) -> None:
    dataset = images(source)
    for drop_last in (True, False):
        loaders = [
            ResumableLoader(
                dataset, 3, seed=0, rank=rank, world_size=world_size, num_workers=workers,
                drop_last=drop_last,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        assert len({len(loader) for loader in loaders}) == 1
        batches = [batch for loader in loaders for batch in loader]
        assert len(batches) == world_size * len(loaders[0])
        counts = Counter(key for batch in batches for key in batch["key"])
        if drop_last:
            assert max(counts.values()) == 1
            assert len(counts) == len(batches) * 3
        else:
            assert len(counts) == TOTAL
            assert sum(counts.values()) == -(-TOTAL // world_size) * world_size


def test_epochs_have_different_orders(source: Any) -> None:
    loader = ResumableLoader(images(source), 4, seed=0)
    orders = [[k for b in loader for k in b["key"]] for _ in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    plain = ResumableLoader(images(source), 4, seed=0, shuffle=False, drop_last=False)
    first, second = list(plain), list(plain)
    assert [k for b in first for k in b["key"]] == sorted(f"s{i:04d}" for i in range(TOTAL))
    assert same(first, second)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 3, 5, 7, 12])  # 5 batches an epoch: within, at and beyond ends
def test_resumed_stream_equals_uninterrupted_stream(source: Any, workers: int, stop: int) -> None:
    def loader() -> ResumableLoader:
        dataset = images(source, caption="random")
        return ResumableLoader(
            dataset, 4, seed=7, num_workers=workers, collate=Collate(encode)
        )  # fmt: skip

    undisturbed = loader()
    everything = take(undisturbed, 14)
    broken = loader()
    assert len(broken) == 5
    assert same(take(broken, stop), everything[:stop])
    state = broken.state_dict()
    assert (state["epoch"], state["batches"]) == divmod(stop, 5)
    resumed = loader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert same(take(resumed, 14 - stop), everything[stop:])


def test_position_advances_before_last_batch_is_returned(source: Any) -> None:
    loader = ResumableLoader(images(source), 4, seed=7)
    batches = iter(loader)
    for _ in range(len(loader)):
        next(batches)
    state = loader.state_dict()
    assert (state["epoch"], state["batches"]) == (1, 0)


def test_interrupted_epoch_is_not_repeated(source: Any) -> None:
    loader = ResumableLoader(images(source), 4, seed=7)
    first, second = (next(iter(loader)) for _ in range(2))
    assert (first["epoch"], second["epoch"]) == (0, 1)
    assert first["key"] != second["key"]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_stream_does_not_decode_skipped_samples(mixed: Any, workers: int) -> None:
    def loader() -> ResumableLoader:
        return ResumableLoader(images(mixed), 3, seed=0, num_workers=workers)

    alone = take(loader(), 8)
    broken = loader()
    take(broken, 3)
    state = broken.state_dict()
    assert len(state["positions"]) == 1
    assert sum(state["positions"][0]) == 9 + len(broken.skipped)
    resumed = loader()
    resumed.load_state_dict(state)
    assert same(take(resumed, 5), alone[3:])
    if workers == 0:
        resumed, decoded = loader(), []
        decode = resumed.dataset.item

        def spy(record: Any, epoch: int) -> Any:
            decoded.append(record.key)
            return decode(record, epoch)

        resumed.dataset.item = spy  # type: ignore[method-assign]
        resumed.load_state_dict(state)
        (batch,) = take(resumed, 1)
        passed = {key for earlier in alone[:3] for key in earlier["key"]}
        assert passed & set(decoded) <= set(batch["key"]) <= set(decoded)


@pytest.mark.parametrize("layout", ["shards", "gz", "folder", "codes"])
@pytest.mark.parametrize("buffer", [1, 4, 100])
@pytest.mark.parametrize("seed", [None, 1])
def test_skipped_records_are_not_read(make: Any, layout: str, buffer: int, seed: int | None) -> None:
    data: Any
    if layout == "folder":
        for name, content in make.members(0, TOTAL).items():
            (make.root / name).write_bytes(content)
        data = open_source(make.root)
    else:
        shards = make.shards(9, 2, 12, ending="tar.gz" if layout == "gz" else "tar")
        data = ShardSource(sorted(shards.iterdir()), shuffle_buffer=buffer)
    if layout == "codes":
        encode_source(data, lambda x: x[:, 0, :2, :2].long(), make.root / "codes", size=8, chunk=2, progress=False,
                      samples_per_shard=10, info={"codebook_size": 2})  # fmt: skip
        data = CodeDataset(make.root / "codes", shuffle_buffer=buffer)
    read = data.records if layout == "codes" else data.read
    everything = [record.key for record in read(seed=seed, epoch=2, start=3, stop=TOTAL)]
    for skip in (0, 1, 7, TOTAL - 4, TOTAL - 3):
        rest = list(read(seed=seed, epoch=2, start=3, stop=TOTAL, skip=skip))
        assert [record.key for record in rest] == everything[skip:]
        assert layout == "codes" or all(record.image and record.captions for record in rest)


def test_what_is_skipped_is_found_without_reading_contents(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = ShardSource(sorted(make.shards(9, 2, 12).iterdir()), shuffle_buffer=5), []
    original = archives._Reader.read

    def spy(self: Any, size: int) -> bytes:
        read.append(size)
        return original(self, size)

    monkeypatch.setattr(archives._Reader, "read", spy)
    records = list(source.read(seed=4, epoch=0, start=0, stop=TOTAL, skip=TOTAL - 4))
    assert len([size for size in read if size != 512]) == len(records) * 3, "members of four samples"


def test_damage_does_not_shift_what_follows(make: Any) -> None:
    folder = make.shards(9, 2, 12)
    shards = [
        {"file": path.name, "bytes": path.stat().st_size, "samples": count}
        for path, count in zip(sorted(folder.iterdir()), (12, 2, 12), strict=True)
    ]
    (folder / "manifest.json").write_text(json.dumps({"shards": shards}))

    def loader() -> ResumableLoader:
        return ResumableLoader(images(ShardSource(sorted(folder.glob("*.tar")), shuffle_buffer=5)), 2, seed=5)

    alone = take(loader(), 13)
    for stop in (1, 6, 10, 12):
        broken, resumed = loader(), loader()
        take(broken, stop)
        resumed.load_state_dict(broken.state_dict())
        assert same(take(resumed, 13 - stop), alone[stop:])


def test_a_position_of_an_earlier_version_may_repeat_samples(mixed: Any, caplog: Any) -> None:
    broken, resumed = (ResumableLoader(images(mixed), 3, seed=0) for _ in range(2))
    take(broken, 2)
    state = broken.state_dict()
    del state["positions"]
    resumed.load_state_dict(state)
    assert len(take(resumed, 2)) == 2
    assert "if some of the first 2 batches could not be used, some samples are repeated" in caplog.text


def test_limited_epoch_ends_at_its_limit(source: Any) -> None:
    def loader() -> ResumableLoader:
        return ResumableLoader(images(source), 4, seed=7, limit=2)

    alone = take(loader(), 6)
    assert [batch["epoch"] for batch in alone] == [0, 0, 1, 1, 2, 2]
    assert len(loader()) == 5, "the trainer takes fractions of it"
    broken = loader()
    take(broken, 2)
    assert (broken.state_dict()["epoch"], broken.state_dict()["batches"]) == (1, 0)
    for state in (broken.state_dict(), broken.state_dict() | {"epoch": 0, "batches": 2}):  # the latter is an old one
        resumed = loader()
        resumed.load_state_dict(state)
        assert same(take(resumed, 4), alone[2:])


def test_reading_does_not_use_global_randomness(source: Any) -> None:
    torch.manual_seed(0)
    random.seed(0)
    expected = torch.rand(1), random.random()
    torch.manual_seed(0)
    random.seed(0)
    list(ResumableLoader(images(source), 4, seed=1, num_workers=2))
    list(ResumableLoader(images(source), 4, seed=1))
    assert (torch.rand(1), random.random()) == expected


def test_other_batch_layout_is_reported(source: Any, caplog: pytest.LogCaptureFixture) -> None:
    state = ResumableLoader(images(source), 4, seed=7).state_dict() | {"batches": 3}
    ResumableLoader(images(source), 2, seed=7).load_state_dict(state)
    assert "batch_size was 4" in caplog.text
    with pytest.raises(ValueError, match="that now has 5 batches"):
        ResumableLoader(images(source), 4, seed=7).load_state_dict(state | {"batches": 5})


@pytest.mark.parametrize(("batch_size", "world_size", "batches"), [(2, 1, 6), (2, 2, 3), (1, 4, 3), (20, 1, 0)])
def test_position_is_stored_in_samples(source: Any, batch_size: int, world_size: int, batches: int) -> None:
    state = ResumableLoader(images(source), 4, seed=7).state_dict() | {"batches": 3}
    other = ResumableLoader(images(source), batch_size, seed=7, world_size=world_size)
    other.load_state_dict(state)
    assert other.state_dict()["batches"] == batches


@pytest.fixture
def mixed(make: Any) -> ShardSource:
    """Twelve samples, of which s0001 and s0008 are corrupt and s0005 has no caption."""
    members = make.members(0, 12)
    members["s0001.png"] = members["s0001.png"][:200]
    members["s0008.png"] = b"oops"
    del members["s0005.txt"], members["s0005.json"]
    return ShardSource([make.tar("mixed.tar", members)])


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_samples_are_skipped_counted_and_listed(
    mixed: Any, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    loader = ResumableLoader(images(mixed), 3, seed=0, num_workers=workers)
    batches = list(loader) + list(loader)
    assert len(loader) == 4
    assert [len(batch["key"]) for batch in batches] == [3] * 8
    bad = {"s0001", "s0008", "s0005"}
    assert not bad & {key for batch in batches for key in batch["key"]}
    assert loader.skipped.keys() == bad
    assert "no caption" in loader.skipped["s0005"]
    for key in bad:
        named = [r for r in caplog.records if f"skipped {key}" in r.getMessage()]
        assert len(named) == 1
        assert named[0].levelno == logging.WARNING
    assert "3 samples or parts of files have been skipped" in caplog.text


def test_ordered_iteration_skips_unusable_samples(mixed: Any, caplog: pytest.LogCaptureFixture) -> None:
    batches = list(iterate_batches(images(mixed), 4))
    assert [len(batch["key"]) for batch in batches] == [4, 4, 1]
    assert "skipped 3 of 12 samples" in caplog.text
    without = [i["key"] for i in images(mixed, needs_captions=False)]
    assert len(without) == 10
    assert {i["key"]: i["caption"] for i in images(mixed, needs_captions=False)}["s0005"] == ""


@pytest.mark.parametrize("workers", [0, 2])
def test_no_usable_sample_raises(make: Any, workers: int) -> None:
    path = make.tar("bad.tar", {f"{i}.png": b"oops" for i in range(9)})
    loader = ResumableLoader(images(open_source(path)), 2, seed=0, num_workers=workers)
    with pytest.raises(EmptyDataError, match=r"^none of .* samples .*no caption"):
        next(iter(loader))


def test_wrong_options_raise(source: Any, make: Any) -> None:
    data = images(source)
    for options, message in (
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"batch_size": 24}, "needs at least 24 samples, got 23"),
        ({"batch_size": 12, "world_size": 2}, "needs at least 24 samples, got 23"),
        ({"batch_size": 1, "rank": 1}, "rank must be in"),
        ({"batch_size": 1, "world_size": 24}, "cannot be shared by 24 ranks"),
        ({"batch_size": 1, "num_workers": -1}, "num_workers"),
    ):
        with pytest.raises(ValueError, match=message):
            ResumableLoader(data, **{"seed": 0} | options)  # type: ignore[arg-type]
    empty = ShardSource([make.tar("empty.tar", {"a.txt": b"x"})])
    with pytest.raises(EmptyDataError, match="empty"):
        ResumableLoader(images(empty), 1, seed=0)
    for options, message in (
        ({"transform": "prio"}, "Did you mean 'prior'"),
        ({"caption": "last"}, "caption must be one of"),
        ({"variants": 0}, "variants"),
        ({"size": 0}, "size"),
    ):
        with pytest.raises(ValueError, match=message):
            images(source, **options)


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (0, 3), (2, 1)])
def test_lanes_without_usable_samples_use_those_of_others(make: Any, workers: int, world_size: int) -> None:
    bare = {name: data for name, data in make.members(0, 10).items() if name.endswith(".png")}
    data = images(ShardSource([make.tar("a.tar", bare), make.tar("b.tar", make.members(10, 20))]))
    loaders = [
        ResumableLoader(data, 2, seed=0, num_workers=workers, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == 10 // world_size
        assert all(int(key[1:]) >= 10 for batch in batches for key in batch["key"])
    skipped = {key for loader in loaders for key in loader.skipped}
    assert skipped == {f"s{i:04d}" for i in range(10)}


def test_bad_captions_are_skipped_counted_and_listed(make: Any) -> None:
    members = make.members(0, 6)
    members["s0001.json"] = b'{"caption": "half \\ud83d"}'
    members["s0002.json"] = b'{"captions": ["half \\ud83d", "whole"]}'
    members |= {"s0003.json": b"{", "s0003.txt": b"caf\xe9"}
    loader = ResumableLoader(images(open_source(make.tar("a.tar", members))), 2, seed=0, collate=Collate(encode))
    captions = {key: caption for batch in loader for key, caption in zip(batch["key"], batch["caption"], strict=True)}
    assert captions.keys() == {"s0000", "s0002", "s0004", "s0005"}
    assert captions["s0002"] == "whole"
    assert loader.skipped == dict.fromkeys(["s0001", "s0002 (one of its captions)", "s0003"], INVALID_CAPTION)
