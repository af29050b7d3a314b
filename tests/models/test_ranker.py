"""The ranker: scores do not depend on how they are asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from dalle_zoo.models.ranker import END, Ranker, RankerConfig, retrieval_accuracy
from dalle_zoo.tokenizers import ByteTokenizer

CAPTIONS = ["a red apple", "", "a much longer caption than fits into twenty positions", "Ä"]
FLOAT_NOISE = 1e-5


def tiny_config(**changes: int) -> RankerConfig:
    sizes = {
        "image_size": 16, "patch_size": 8, "vision_width": 16, "vision_layers": 1,
        "vision_heads": 2, "text_width": 8, "text_layers": 1, "text_heads": 2, "embed_dim": 12,
        "text_length": 20, "text_vocab": 256,
    }  # fmt: skip
    return RankerConfig(**(sizes | changes))


@pytest.fixture
def ranker() -> Ranker:
    torch.manual_seed(0)
    return Ranker.create(tiny_config(), ByteTokenizer()).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_features_are_unit_vectors(ranker: Ranker, images: torch.Tensor) -> None:
    for features in (ranker.image_features(images), ranker.text_features(CAPTIONS)):
        assert features.shape == (4, 12)
        assert torch.allclose(features.norm(dim=1), torch.ones(4))


def test_features_of_a_caption_are_taken_at_its_end_token(ranker: Ranker) -> None:
    together = ranker.text_features(CAPTIONS)
    alone = torch.cat([ranker.text_features([caption]) for caption in CAPTIONS])
    assert torch.allclose(together, alone, atol=FLOAT_NOISE)
    assert len({tuple(row) for row in together.tolist()}) == len(CAPTIONS)


def test_ids_have_start_and_end_tokens_and_a_limit(ranker: Ranker) -> None:
    ids = ranker.encode_text(CAPTIONS)
    assert ids.shape == (4, 20)
    assert ids[0].tolist() == [256, *b"a red apple", *[257] * 8]
    assert (ids[:, 0] == 256).all()
    assert ids[2, -1] == 257  # a truncated caption still ends


def test_the_text_of_the_end_token_in_a_caption_is_not_special(ranker: Ranker) -> None:
    assert ranker.encode_text([END + "x"])[0].tolist() == [256, *f"{END}x".encode(), 257]


def test_scores_equal_those_of_transformers(ranker: Ranker, images: torch.Tensor) -> None:
    out = ranker.model(input_ids=ranker.encode_text(CAPTIONS), pixel_values=(images - 0.5) / 0.5)
    expected = out.logits_per_image
    assert torch.allclose(ranker.scores(images, CAPTIONS), expected.diagonal(), atol=1e-4)
    repeated = ranker.scores(images, [CAPTIONS[0]] * 4)
    assert torch.allclose(repeated, expected[:, 0], atol=1e-4)
    assert ranker.rank(images, CAPTIONS[0]).tolist() == expected[:, 0].argsort(descending=True).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_width": 15}, "vision_heads"),
        ({"patch_size": 5}, "multiple of patch_size"),
        ({"text_layers": 0}, "text_layers must be an integer of at least 1"),
        ({"text_length": 2}, "text_length"),
    ],
)
def test_invalid_configs_raise(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_invalid_arguments_raise(ranker: Ranker, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="set text_vocab to 256"):
        Ranker.create(tiny_config(text_vocab=300), ByteTokenizer())
    with pytest.raises(ValueError, match="one per image"):
        ranker.scores(images, ["one"])
    with pytest.raises(TypeError, match="pass"):
        ranker.text_features("one")
    with pytest.raises(ValueError, match="floats of shape"):
        ranker.image_features((images * 255).byte())


def test_importing_the_ranker_does_not_import_transformers() -> None:
    code = "import sys, dalle_zoo.models.ranker; print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_retrieval_is_the_share_of_pairs_among_the_nearest() -> None:
    """Images 0 and 1 are swapped, 2 is right; of the captions likewise."""
    image = torch.eye(3)
    text = torch.eye(3)[[1, 0, 2]]
    got = retrieval_accuracy(image, text, ks=(1, 3))
    assert got["image_to_text_top1"] == pytest.approx(1 / 3)
    assert got["text_to_image_top1"] == pytest.approx(1 / 3)
    assert got["image_to_text_top3"] == 1


def test_retrieval_of_a_collapsed_network_is_0() -> None:
    same = torch.ones(4, 2)
    assert retrieval_accuracy(same, same, ks=(1,))["image_to_text_top1"] == 0
