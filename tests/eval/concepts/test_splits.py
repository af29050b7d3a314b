"""Samples: sampled by seed, and refused before any work where their figures could not be measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dalle_zoo_eval.concepts.protocol import ConceptProtocol
from dalle_zoo_eval.concepts.splits import load_samples


def test_samples_are_generated_by_seed_and_keep_their_parts_together(protocol: ConceptProtocol) -> None:
    split = load_samples(protocol, 16)[0].complete
    generated = split.sample(4, seed=0)
    assert generated.keys == split.sample(4, seed=0).keys != split.sample(4, seed=1).keys
    for key, caption, image in zip(generated.keys, generated.captions, generated.images, strict=True):
        place = split.keys.index(key)
        assert caption == split.captions[place]
        assert torch.equal(image, split.images[place])
    assert sorted(split.sample(None, seed=0).keys) == sorted(split.keys)


def test_captions_are_the_first_of_the_samples(protocol: ConceptProtocol) -> None:
    train, styles, _ = load_samples(replace(protocol, samples=5), 16)
    assert (len(train.complete.keys), len(train.samples.keys), len(train.asked.keys)) == (6, 5, 4)
    assert train.asked.keys == train.samples.keys[:4]
    assert styles.asked.keys == styles.samples.keys
    assert set(train.complete.concepts) == {"traina", "trainb", "trainc"}


def test_what_could_not_be_measured_is_refused(protocol: ConceptProtocol, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ks must be below the number of images, 18, got 18"):
        load_samples(replace(protocol, ks=(1, 18)), 16)
    twice = {"train": protocol.splits["train"], "again": protocol.splits["train"]}
    with pytest.raises(ValueError, match="6 keys stand in more than one split, such as 'traina_blob'"):
        load_samples(replace(protocol, splits=twice, targets=()), 16)
    for path in (tmp_path / "data/train").glob("train[bc]_*"):
        path.unlink()
    with pytest.raises(ValueError, match="split train: captions can't be shuffled across concepts"):
        load_samples(protocol, 16)
    for path in (tmp_path / "data/train").iterdir():
        path.rename(path.with_name(path.name.replace("_", "-")))
    with pytest.raises(ValueError, match="2 keys name no concept, such as 'traina-blob': expected <concept>_<style>"):
        load_samples(protocol, 16)
