"""Every metric against values known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from dalle_zoo_eval.metrics import (
    bits_per_token,
    codebook_use,
    concept_accuracy,
    psnr,
    retrieval,
    shuffle_concepts,
)
from torch import Tensor

from dalle_zoo.models.prior import Prior, PriorConfig


def test_psnr_of_a_known_error() -> None:
    references = torch.rand(2, 3, 4, 4) * 0.5
    images = references + torch.tensor([0.1, 0.01])[:, None, None, None]
    assert psnr(images, references).tolist() == pytest.approx([20, 40], abs=1e-3)
    assert psnr(references, references).tolist() == [math.inf, math.inf]


def test_psnr_refuses_unlike_shapes() -> None:
    with pytest.raises(ValueError, match="one shape"):
        psnr(torch.rand(1, 3, 4, 4), torch.rand(2, 3, 4, 4))


def test_codebook_use_counts_codes() -> None:
    got = codebook_use(torch.tensor([[[0, 1], [2, 3]]] * 5), codebook_size=8)
    assert got == {"used": 0.5, "perplexity": pytest.approx(4)}
    skewed = codebook_use(torch.tensor([0, 0, 0, 1]), codebook_size=2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert skewed == {"used": 1, "perplexity": pytest.approx(math.exp(entropy))}


@pytest.fixture
def prior() -> Prior:
    torch.manual_seed(0)
    config = PriorConfig(
        text_length=3, text_vocab=5, image_height=2, image_width=2, codebook_size=8, width=8,
        num_layers=1, num_heads=1, masks="full",
    )  # fmt: skip
    return Prior(config).eval()


def test_a_uniform_prior_needs_log2_k_bits(prior: Prior) -> None:
    text, codes = torch.randint(0, 5, (5, 3)), torch.randint(0, 8, (5, 2, 2))
    assert bits_per_token(prior, text, codes) == pytest.approx(3, abs=1e-5)


def test_bits_are_those_of_the_head_and_not_of_the_batches(prior: Prior) -> None:
    """A head that gives code 0 half of the mass: 1 bit for it, log2(14) for each of the others."""
    with torch.no_grad():
        prior.image_head.bias[0] = math.log(7)
    text, codes = torch.randint(0, 5, (5, 3)), torch.zeros(5, 2, 2, dtype=torch.long)
    codes[4] = 1
    expected = (4 * 1 + math.log2(14)) / 5
    for batch_size in (1, 2, 5):
        assert bits_per_token(prior, text, codes, batch_size) == pytest.approx(expected, abs=1e-5)


def test_bits_need_images(prior: Prior) -> None:
    with pytest.raises(ValueError, match="equally many"):
        bits_per_token(prior, torch.zeros(1, 3).long(), torch.zeros(2, 2, 2).long())


@pytest.mark.parametrize("seed", range(5))
def test_shuffling_maps_no_concept_to_itself(seed: int) -> None:
    concepts = list("aaabbcccdeffff")
    permutation = shuffle_concepts(concepts, seed).tolist()
    assert sorted(permutation) == list(range(len(concepts)))
    assert all(concepts[i] != concepts[j] for i, j in enumerate(permutation))
    assert permutation == shuffle_concepts(concepts, seed).tolist()


def test_shuffling_depends_on_the_seed_and_needs_variety() -> None:
    concepts = [str(i) for i in range(50)]
    assert not torch.equal(shuffle_concepts(concepts, 0), shuffle_concepts(concepts, 1))
    with pytest.raises(ValueError, match="2 of 3 samples"):
        shuffle_concepts(["a", "a", "b"], 0)


class Lookup:
    """Stands for a ranker whose features are given."""

    def image_features(self, images: Tensor) -> Tensor:
        return torch.eye(4)[images[:, 0, 0, 0].long()]

    def text_features(self, captions: Sequence[str]) -> Tensor:
        return torch.eye(4)[[int(caption) for caption in captions]]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_retrieval_through_a_ranker(batch_size: int) -> None:
    images = torch.arange(4.0)[:, None, None, None].expand(-1, 3, 2, 2)
    right = retrieval(Lookup(), images, ["0", "1", "2", "3"], batch_size)  # type: ignore[arg-type]
    assert set(right.values()) == {1.0}
    half = retrieval(Lookup(), images, ["0", "1", "3", "2"], batch_size)  # type: ignore[arg-type]
    assert half["image_to_text_top1"] == half["text_to_image_top1"] == 0.5


# Directions at 0, 10, 40 and 90 degrees: neighbors can be told by eye.
ANGLES = torch.tensor([0.0, 10.0, 40.0, 90.0]).deg2rad()
GALLERY = torch.stack([ANGLES.cos(), ANGLES.sin()], 1) * torch.tensor([[1.0], [9.0], [2.0], [0.1]])
KEYS, CONCEPTS = ["a_x", "a_y", "b_x", "b_y"], ["a", "a", "b", "b"]


@pytest.mark.parametrize(("k", "expected"), [(1, 0.75), (2, 0.75), (3, 1.0)])
def test_concept_accuracy_leaves_the_own_image_out(k: int, expected: float) -> None:
    """Nearest to 40 degrees are 10 and 0, both of another concept, and only then 90."""
    got = concept_accuracy(GALLERY, KEYS, CONCEPTS, GALLERY, KEYS, CONCEPTS, k)
    assert got == expected


def test_concept_accuracy_of_queries_that_are_no_gallery_image() -> None:
    known = (GALLERY, KEYS, CONCEPTS)
    near_a = torch.tensor([[1.0, 0.01]])
    assert concept_accuracy(near_a, ["a_x"], ["a"], *known, k=1) == 1
    assert concept_accuracy(near_a, ["b_x"], ["b"], *known, k=1) == 0
    assert concept_accuracy(near_a, ["c_x"], ["c"], *known, k=3) == 0


def test_concept_accuracy_refuses_what_does_not_fit() -> None:
    known = (GALLERY, KEYS, CONCEPTS)
    with pytest.raises(ValueError, match=r"1\.\.3"):
        concept_accuracy(GALLERY, KEYS, CONCEPTS, *known, k=4)
    with pytest.raises(ValueError, match="one a query"):
        concept_accuracy(GALLERY, KEYS[:2], CONCEPTS, *known, k=1)
