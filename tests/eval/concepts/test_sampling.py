"""Chunks that several processes sample: each once, and never one that another has claimed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from dalle_zoo_eval.claims import Claims
from dalle_zoo_eval.concepts.protocol import ConceptProtocol
from dalle_zoo_eval.concepts.sampling import Chunk, plan, sample
from dalle_zoo_eval.concepts.splits import load_samples
from dalle_zoo_eval.measuring import Share

from dalle_zoo.pipeline import DallePipeline


@pytest.fixture
def pipe(model: Path) -> DallePipeline:
    return DallePipeline.from_pretrained(model)


@pytest.fixture
def chunks(pipe: DallePipeline, protocol: ConceptProtocol, tmp_path: Path) -> list[Chunk]:
    asked = load_samples(protocol, 16)[1].asked
    return plan(pipe, asked, protocol, tmp_path / "cache", {"prior/model.safetensors": "ab", "ranker/x": "cd"})


def test_a_chunk_is_named_by_what_fixes_its_codes(
    pipe: DallePipeline, protocol: ConceptProtocol, chunks: list[Chunk], tmp_path: Path
) -> None:
    asked, cache = load_samples(protocol, 16)[1].asked, tmp_path / "cache"
    names = {chunk.path.name for chunk in chunks}
    assert len(names) == 3

    def others(protocol: ConceptProtocol, **weights: str) -> set[str]:
        digests = {f"{part}/model.safetensors": sha256 for part, sha256 in weights.items()}
        return {chunk.path.name for chunk in plan(pipe, asked, protocol, cache, digests)}

    assert others(protocol, prior="ab", ranker="other") == names  # which samples nothing
    assert not others(protocol, prior="other") & names
    assert not others(protocol.changed(temperature=0.5), prior="ab") & names
    assert not others(protocol.changed(seed=3), prior="ab") & names


def test_what_another_has_claimed_is_passed_by_and_waited_for(pipe: DallePipeline, chunks: list[Chunk]) -> None:
    chunks[1].path.parent.mkdir()
    with Claims() as other:
        assert other.take(chunks[1].claim, wait=False)
        sample(pipe, chunks, Share(rank=1, world=2))  # begins with that chunk alone
        assert not chunks[1].path.exists()

        first = threading.Thread(target=sample, args=(pipe, chunks, Share(rank=0, world=2)))
        first.start()
        first.join(0.2)
        assert first.is_alive()
        assert not chunks[1].path.exists()
        chunks[1].path.write_bytes(b"theirs")
        other.release(chunks[1].claim)
    first.join(60)
    assert not first.is_alive()
    assert chunks[1].path.read_bytes() == b"theirs"
    assert chunks[0].codes().shape == (2, 3, 4, 4)
    assert {path.suffix for path in chunks[0].path.parent.iterdir()} == {".safetensors"}


def test_a_claim_whose_owner_has_ended_is_taken_over(pipe: DallePipeline, chunks: list[Chunk]) -> None:
    with Claims() as other:
        chunks[0].path.parent.mkdir()
        other.take(chunks[0].claim, wait=False)
    chunks[0].claim.touch()  # as a killed process leaves it
    sample(pipe, chunks, Share())
    assert all(chunk.path.is_file() and not chunk.claim.exists() for chunk in chunks)
