"""Protocols of kind ``concepts``: files of one's own, what a caller changes, and what is wrong with a wrong one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from dalle_zoo_eval.concepts.protocol import ConceptProtocol, find_concept_protocol
from dalle_zoo_eval.protocol import ProtocolError, find_protocol, list_protocols


def test_a_protocol_survives_a_result_file(protocol: ConceptProtocol) -> None:
    assert ConceptProtocol.from_dict(json.loads(json.dumps(asdict(protocol)))) == protocol


def test_the_kinds_are_not_mistaken_for_each_other(toy: Path) -> None:
    assert {*list_protocols("benchmark"), *list_protocols("concepts")} == set(list_protocols())
    with pytest.raises(ProtocolError, match=r"toy.yaml is a protocol of kind 'concepts', which has no benchmark"):
        find_protocol(toy)
    with pytest.raises(ProtocolError, match="is a protocol of kind 'benchmark', expected 'concepts'"):
        find_concept_protocol("cub")
    toy.write_text(toy.read_text().replace("kind: concepts", "kind: concept"))
    with pytest.raises(ProtocolError, match=r"unknown kind 'concept'. Did you mean 'concepts'"):
        find_concept_protocol(toy)


def test_what_a_caller_gives_stands_above_the_file(protocol: ConceptProtocol) -> None:
    assert protocol.changed(seed=None, train_captions=None) == protocol
    assert protocol.changed(seed=0, candidates=3, train_captions=4).overridden == ()  # what the file says anyway
    changed = protocol.changed(seed=5, val_captions=3, temperature=0.5)
    assert changed.overridden == (
        "seed: 5 instead of 0", "temperature: 0.5 instead of 1.0", "captions of val-styles: 3 instead of all",
        "captions of val-concepts: 3 instead of all",
    )  # fmt: skip
    assert (changed.seed, changed.temperature, changed.candidates) == (5, 0.5, 3)
    assert [rule.captions for rule in changed.splits.values()] == [4, 3, 3]
    assert [rule.captions for rule in protocol.changed(train_captions=2).splits.values()] == [2, None, None]
    with pytest.raises(ProtocolError, match="candidates must be an integer of at least 1, got 0"):
        protocol.changed(candidates=0)
    without = ConceptProtocol(name="a", title="A", splits={"seen": protocol.splits["train"]})
    with pytest.raises(ProtocolError, match="has no split 'train'"):
        without.changed(train_captions=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": 3}, "unknown field 'sample'. Did you mean 'samples'"),
        ({"samples": 1}, "samples must be an integer of at least 2, got 1"),
        ({"splits": {}}, "splits is empty"),
        ({"splits": ["train"]}, "splits must be a mapping"),
        ({"splits": {"train": {"captions": 3}}}, "splits.train: source missing"),
        ({"splits": {"train": {"source": 3}}}, "source must be a location"),
        ({"splits": {"train": {"source": "a", "captions": 1}}}, "captions must be an integer of at least 2"),
        ({"targets": [{"measure": "bits", "split": "train", "required": 1}]}, "unknown measure 'bits'"),
        ({"targets": [{"measure": "bits saved", "split": "trian", "required": 1}]}, "Did you mean 'train'"),
        ({"targets": [{"measure": "bits saved", "split": "train", "required": "1"}]}, "required must be a number"),
        ({"targets": [{"measure": "bits saved", "split": "train"}]}, "targets: required missing"),
        ({"networks": {"clip": {"sha256": "ab" * 32}}}, "unknown networks 'clip'"),
        ({"networks": {"mobilenet": {"sha256": "ab"}}}, "sha256 must be 64 digits"),
        ({"ks": []}, "ks is empty"),
        ({"ks": [5, 1]}, r"ks must rise, each number once, got \[5, 1\]"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"guidance": None}, "guidance must be a number, got None"),
        ({"guidance": 0.5}, "guidance must be at least 1, which is none, got 0.5"),
        ({"title": ""}, "title must be one line of text"),
        ({"chunk": 0}, "chunk must be an integer of at least 1"),
    ],
)
def test_a_wrong_field_is_named(toy: Path, changes: dict[str, Any], message: str) -> None:
    toy.write_text(yaml.safe_dump(yaml.safe_load(toy.read_text()) | changes))
    with pytest.raises(ProtocolError, match=message) as caught:
        find_concept_protocol(toy)
    assert str(toy) in str(caught.value)
