"""Choice of captions: depends only on the seed and the captions."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.datasets import (
    CaptionList,
    DatasetError,
    EvalDataset,
    choose_captions,
    load_exclusions,
    save_captions,
)

from dalle_zoo.registry import UnknownNameError

PINNED = "1cd97e63"
"""Prefix of the digest of the list of the toy dataset for seed 0; another value would break every published list."""


def choose(benchmark: EvalDataset, **changes: Any) -> CaptionList:
    return choose_captions(benchmark, **({"count": None, "rule": "one", "seed": 0} | changes))


def test_rule_one_chooses_one_caption_per_item(toy: EvalDataset) -> None:
    chosen = choose(toy)
    captions = {item.key: item.captions for item in toy.items}
    assert sorted(key for key, _ in chosen.entries) == sorted(captions)
    assert all(caption in captions[key] for key, caption in chosen.entries)
    assert len({captions[key].index(caption) for key, caption in chosen.entries}) > 2
    assert [key for key, _ in chosen.entries] != sorted(captions)
    assert (chosen.seed, chosen.source) == (0, toy.sha256())


def test_rule_unique_takes_each_caption_once(toy: EvalDataset) -> None:
    chosen = choose(toy, rule="unique")
    assert len(chosen.entries) == 1 + 20 * 4
    assert len({caption for _, caption in chosen.entries}) == 1 + 20 * 4
    assert ("00", "a thing") in chosen.entries
    assert chosen.entries != tuple(sorted(chosen.entries))


def test_list_has_pinned_digest(toy: EvalDataset) -> None:
    assert choose(toy).sha256.startswith(PINNED)
    assert choose(toy).sha256 == choose(toy).sha256
    assert choose(toy, seed=1).sha256 != choose(toy).sha256


def test_list_does_not_depend_on_order_of_items(toy: EvalDataset) -> None:
    assert choose(replace(toy, items=toy.items[::-1])).entries == choose(toy).entries


@pytest.mark.parametrize("rule", ["one", "unique"])
def test_shorter_list_is_prefix_of_longer_list(toy: EvalDataset, rule: str) -> None:
    assert choose(toy, rule=rule, count=7).entries == choose(toy, rule=rule).entries[:7]


def test_exclusions_do_not_change_other_captions(toy: EvalDataset) -> None:
    exclude = frozenset({"03", "11"})
    remaining = tuple(entry for entry in choose(toy).entries if entry[0] not in exclude)
    assert choose(toy, exclude=exclude).entries == remaining
    unique = choose(toy, rule="unique", exclude=frozenset({"00"})).entries
    assert ("01", "a thing") in unique
    assert not any(caption.startswith("thing 0,") for _, caption in unique)


def test_exclusions_of_another_dataset_raise(toy: EvalDataset, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DatasetError, match="none of the 2 excluded keys, such as 'x', is in the dataset toy:all"):
        choose(toy, exclude=frozenset({"x", "y"}))
    with caplog.at_level(logging.WARNING):
        assert len(choose(toy, exclude=frozenset({"x", "03"})).entries) == 19
    assert "1 of 2 excluded keys, such as 'x', are not in the dataset toy:all" in caplog.text


def test_too_few_captions_raise(toy: EvalDataset) -> None:
    assert len(choose(toy, count=20).entries) == 20
    with pytest.raises(DatasetError, match=r"has 19 captions by the rule 'one', of 20 items, 1 keys .* expected 20"):
        choose(toy, count=20, exclude=frozenset({"03"}))
    with pytest.raises(DatasetError, match="count must be at least 1"):
        choose(toy, count=0)
    without = replace(toy, items=tuple(replace(item, captions=()) for item in toy.items))
    with pytest.raises(DatasetError, match=r"has 0 captions .* expected any"):
        choose(without)
    with pytest.raises(UnknownNameError, match=r"unknown rule of caption choice 'uniq'\. Did you mean 'unique'"):
        choose(toy, rule="uniq")


def test_saved_list_has_digest_and_one_entry_per_line(toy: EvalDataset, tmp_path: Path) -> None:
    item = replace(toy.items[0], captions=("«ein Ding»\u2028 🐦",))
    chosen = choose(replace(toy, items=(item, *toy.items[1:])), seed=5)
    save_captions(chosen, tmp_path / "new/list.jsonl")
    head, *entries = (json.loads(line) for line in (tmp_path / "new/list.jsonl").read_bytes().splitlines())
    assert head == {"captions": 20, "seed": 5, "source": chosen.source, "sha256": chosen.sha256}
    assert [tuple(entry) for entry in entries] == list(chosen.entries)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["list.jsonl"]


def test_exclusion_lists_are_read(tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    path.write_text("# overlaps\na/b\n\n  c#1 \n#d\n")
    assert load_exclusions(path) == {"a/b", "c#1"}
    path.write_text("# a search that found nothing\n")
    assert load_exclusions(path) == frozenset()
    path.write_text("\n")
    with pytest.raises(DatasetError, match="holds no key"):
        load_exclusions(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match="cannot be read"):
        load_exclusions(path)
    with pytest.raises(DatasetError, match="cannot be read"):
        load_exclusions(tmp_path / "none.txt")
