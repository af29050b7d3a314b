"""Counts of captions: the tokenizer trained on them is that of the captions, for any number of processes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from dalle_zoo.data import archives, counting, open_source
from dalle_zoo.data.counting import count_captions
from dalle_zoo.sharing import Share
from dalle_zoo.tokenizers import BPETokenizer
from dalle_zoo.tokenizers.bpe import _normalizer, _pre_tokenizer
from dalle_zoo.tokenizers.words import count_words

CAPTIONS = [
    "A cat's  tail!",
    "a CAT, two cats!!",
    "caf\u00e9 caf\u0065\u0301",
    "the cat sat on the mat",
    "\u732b \u732b\u732b",
] * 40


def test_counts_give_the_vocabulary_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Tokenizer(models.BPE())
    plain.normalizer, plain.pre_tokenizer = _normalizer(), _pre_tokenizer()
    alphabet = ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    plain.train_from_iterator(CAPTIONS, trainer)
    expected = json.loads(plain.to_str())["model"]
    monkeypatch.setattr("dalle_zoo.tokenizers.bpe._MOST_REPEATED", 7)
    found = json.loads(BPETokenizer.train(CAPTIONS, 290).files()["tokenizer.json"])
    assert found["model"] == expected
    assert found["pre_tokenizer"]["type"] == "ByteLevel"


@pytest.fixture
def source(make: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(counting, "SAMPLES_PER_PART", 4)
    members = make.members(0, 9)
    del members["s0003.txt"], members["s0003.json"]
    return open_source(make.tar("a.tar", members))


def test_parts_add_up(make: Any, source: Any, caplog: pytest.LogCaptureFixture) -> None:
    captions = [caption for sample in source.stream() for caption in sample.captions]
    counts = count_captions(source)
    assert (counts.captions, counts.sample) == (16, captions)
    assert counts.words == count_words(captions)
    assert "s0003: no caption" in caplog.text
    together = make.root / "counts"
    threads = [
        threading.Thread(target=count_captions, args=(source, together), kwargs={"share": Share(rank=r, world=3)})
        for r in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in sorted(together.iterdir())] == [
        "counting.json", "counts-00000.json", "counts-00001.json", "counts-00002.json",
    ]  # fmt: skip
    assert count_captions(source, together) == counts
    files = BPETokenizer.train(captions, 270).files()
    assert BPETokenizer.train_counts(counts.pieces, 270).files() == files


def test_words_of_parts_are_not_closed_if_there_are_too_many(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "MOST_WORDS", 9)  # thing, one, and the numbers 0 to 8 without 3
    assert count_captions(source).words is None


def test_other_counts_are_refused(make: Any, source: Any) -> None:
    folder = make.root / "counts"
    count_captions(source, folder)
    with pytest.raises(ValueError, match=r"holds the counts of other data \(source was .*listed was 9 and is 2 now"):
        count_captions(open_source(make.tar("b.tar", make.members(0, 2))), folder)
    with pytest.raises(ValueError, match=r"holds other files \(a.tar, b.tar, counts\)"):
        count_captions(source, make.root)


def test_images_are_not_read(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {len(sample.image) for sample in source.stream()}
    read: list[int] = []
    original = archives._Reader.read

    def spy(self: Any, size: int) -> bytes:
        read.append(size)
        return original(self, size)

    monkeypatch.setattr(archives._Reader, "read", spy)
    count_captions(source)
    assert read
    assert not sizes & set(read)


def test_a_part_that_is_there_is_not_counted_again(make: Any, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder: Path = make.root / "counts"
    counts = count_captions(source, folder)
    (folder / "counts-00001.json").unlink()
    started: list[int] = []
    original = counting._count_part
    monkeypatch.setattr(
        counting, "_count_part", lambda source, start: started.append(start) or original(source, start)
    )
    assert count_captions(source, folder) == counts
    assert started == [4]
