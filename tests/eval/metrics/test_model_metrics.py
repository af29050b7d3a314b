"""Metrics of model parts and of concepts, compared with closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from dalle_zoo_eval.extractors.model_parts import PriorExtractor, open_prior
from dalle_zoo_eval.generation import model_sha256
from dalle_zoo_eval.metrics import METRICS
from dalle_zoo_eval.metrics.bits_per_token import bits_per_token
from dalle_zoo_eval.metrics.codebook_use import codebook_use
from dalle_zoo_eval.metrics.concept_accuracy import concept_accuracy
from torch import Tensor

from dalle_zoo.pipeline import DallePipeline


def psnr(images: Tensor, references: Tensor) -> float:
    metric = METRICS["psnr"]()
    metric.update(images=images, reference_images=references)
    return float(metric.compute())


def test_psnr_of_a_known_error() -> None:
    references = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    images = references.clone()
    images[0] += 25
    images[1] += 5
    expected = [-20 * math.log10(error / 255) for error in (25, 5)]
    assert psnr(images, references) == pytest.approx(sum(expected) / 2, abs=1e-4)  # the mean of the images' own
    assert psnr(references, references) == math.inf


def test_codebook_use_counts_codes() -> None:
    got = codebook_use(torch.tensor([[[0, 1], [2, 3]]] * 5), codebook_size=8)
    assert got == {"used": 0.5, "perplexity": pytest.approx(4)}
    skewed = codebook_use(torch.tensor([0, 0, 0, 1]), codebook_size=torch.tensor([2, 2]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert skewed == {"used": 1, "perplexity": pytest.approx(math.exp(entropy))}


@pytest.fixture
def pipe(model: Path) -> DallePipeline:
    return DallePipeline.from_pretrained(model)


def bits(pipe: DallePipeline, images: Tensor, captions: list[str], others: list[str]) -> dict[str, float]:
    extractor = open_prior(pipe, model_sha256(pipe))
    assert isinstance(extractor, PriorExtractor)
    return bits_per_token(**extractor.pairs(images, captions, others))


IMAGES = torch.randint(256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_untrained_prior_needs_log2_k_bits(pipe: DallePipeline) -> None:
    found = bits(pipe, IMAGES, ["a cat"] * 5, ["a dog"] * 5)
    assert found == pytest.approx(dict.fromkeys(("right", "shuffled", "none"), 3.0))


def test_bits_do_not_depend_on_batches(pipe: DallePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head with probability 1/2 for code 0 needs 1 bit for it and log2(14) bits for each other code."""
    with torch.no_grad():
        pipe.prior.image_head.bias[0] = math.log(7)
    with torch.inference_mode():
        codes = pipe.image_tokenizer.encode(IMAGES.float() / 255)
    zeros = float((codes == 0).double().mean())
    expected = zeros * 1 + (1 - zeros) * math.log2(14)
    for batch in (1, 2, 5):
        monkeypatch.setattr("dalle_zoo_eval.extractors.model_parts.BATCH", batch)
        assert bits(pipe, IMAGES, ["a cat"] * 5, ["a dog"] * 5)["right"] == pytest.approx(expected, abs=1e-5)


def test_prior_extractor_without_captions_raises(pipe: DallePipeline) -> None:
    with pytest.raises(TypeError, match="the prior needs captions"):
        open_prior(pipe, model_sha256(pipe))(IMAGES)


def test_remark_lists_groups_where_captions_cost_bits() -> None:
    remark = METRICS.spec("bits_per_token").remark
    assert remark is not None
    helps, costs = {"right": 1.0, "shuffled": 2.5, "none": 2.25}, {"right": 1.0, "shuffled": 2.5, "none": 0.9}
    assert remark({"train": helps}) == ""
    assert remark({"train": helps, "a": costs, "b": costs}).startswith("On a and b the right captions cost bits")


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_retrieval_finds_partner_among_all(batch: int) -> None:
    def shares(text: Tensor) -> dict[str, float]:
        metric, images = METRICS["retrieval"](), torch.eye(4)
        for start in range(0, 4, batch):
            some = slice(start, start + batch)
            metric.update(features=images[some], text_features=text[some])
        return {name: float(value) for name, value in metric.compute().items()}

    assert set(shares(torch.eye(4)).values()) == {1.0}
    half = shares(torch.eye(4)[[0, 1, 3, 2]])
    assert half["image_to_text_top1"] == half["text_to_image_top1"] == 0.5


# Directions at 0, 10, 40 and 90 degrees have obvious neighbors.
ANGLES = torch.tensor([0.0, 10.0, 40.0, 90.0]).deg2rad()
GALLERY = torch.stack([ANGLES.cos(), ANGLES.sin()], 1) * torch.tensor([[1.0], [9.0], [2.0], [0.1]])
KEYS, CONCEPTS = ["a_x", "a_y", "b_x", "b_y"], ["a", "a", "b", "b"]


@pytest.mark.parametrize(("k", "expected"), [(1, 0.75), (2, 0.75), (3, 1.0)])
def test_concept_accuracy_excludes_own_image(k: int, expected: float) -> None:
    """Nearest to 40 degrees are 10 and 0, both of another concept, and only then 90."""
    got = concept_accuracy(GALLERY, KEYS, CONCEPTS, GALLERY, KEYS, CONCEPTS, ks=(k,))
    assert got == {f"top{k}": expected}


def test_concept_accuracy_of_queries_outside_the_gallery() -> None:
    near_a = torch.tensor([[1.0, 0.01]])

    def got(key: str, concept: str, k: int) -> float:
        return concept_accuracy(near_a, [key], [concept], GALLERY, KEYS, CONCEPTS, ks=(k,))[f"top{k}"]

    assert got("a_x", "a", 1) == 1
    assert got("b_x", "b", 1) == 0
    assert got("c_x", "c", 3) == 0


def test_concept_accuracy_with_wrong_input_raises() -> None:
    with pytest.raises(ValueError, match=r"1\.\.3"):
        concept_accuracy(GALLERY, KEYS, CONCEPTS, GALLERY, KEYS, CONCEPTS, ks=(4,))
    with pytest.raises(ValueError, match="one per query"):
        concept_accuracy(GALLERY, KEYS[:2], CONCEPTS, GALLERY, KEYS, CONCEPTS, ks=(1,))
    with pytest.raises(ValueError, match="1 keys name no concept, such as 'a_x'"):
        concept_accuracy(GALLERY, KEYS, CONCEPTS, GALLERY, KEYS, ["", "a", "b", "b"], ks=(1,))
    with pytest.raises(ValueError, match="1 keys are in more than one group, such as 'a_x'"):
        concept_accuracy(GALLERY, KEYS, CONCEPTS, GALLERY, ["a_x", "a_x", "b_x", "b_y"], CONCEPTS, ks=(1,))
