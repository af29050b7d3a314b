"""The ranker: a CLIP folder like any other, and scores that do not depend on how they are asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_zoo.models.ranker import (
    END,
    Preprocessing,
    Ranker,
    RankerConfig,
    retrieval_accuracy,
)
from dalle_zoo.tokenizers import ByteTokenizer

CAPTIONS = ["a red apple", "", "a much longer caption than fits into twenty positions", "Ä"]
FLOAT_NOISE = 1e-5
# PIL works in bytes with its own filter tables; one level of 255, over the smallest std of 0.26.
PIL_NOISE = 2.1 / 255 / 0.26


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


def test_a_caption_cannot_contain_the_end_token(ranker: Ranker) -> None:
    assert ranker.encode_text([END + "x"])[0].tolist() == [256, *f"{END}x".encode(), 257]


def test_scores_equal_those_of_transformers(ranker: Ranker, images: torch.Tensor) -> None:
    out = ranker.model(input_ids=ranker.encode_text(CAPTIONS), pixel_values=(images - 0.5) / 0.5)
    expected = out.logits_per_image
    assert torch.allclose(ranker.scores(images, CAPTIONS), expected.diagonal(), atol=1e-4)
    repeated = ranker.scores(images, [CAPTIONS[0]] * 4)
    assert torch.allclose(repeated, expected[:, 0], atol=1e-4)
    assert ranker.rank(images, CAPTIONS[0]).tolist() == expected[:, 0].argsort(descending=True).tolist()


def test_a_saved_ranker_loads_equal(ranker: Ranker, images: torch.Tensor, tmp_path: Path) -> None:
    ranker.save(tmp_path / "ranker")
    again = Ranker.from_folder(tmp_path / "ranker")
    assert again.preprocessing == ranker.preprocessing
    assert not again.training
    assert torch.equal(again.scores(images, CAPTIONS), ranker.scores(images, CAPTIONS))


def test_transformers_opens_a_saved_ranker(ranker: Ranker, tmp_path: Path) -> None:
    from transformers import CLIPModel, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    ranker.save(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tmp_path), local_files_only=True)
    model = CLIPModel.from_pretrained(str(tmp_path), local_files_only=True).eval()
    captions = ["a red apple", "Ä"]
    encoded = tokenizer(captions, padding=True, return_tensors="pt")
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil.from_pretrained(str(tmp_path), local_files_only=True)
    pixels = processor(Image.fromarray(image), return_tensors="pt").pixel_values
    out = model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, pixel_values=pixels)
    native = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    scores = ranker.scores(native.expand(2, -1, -1, -1), captions)
    assert torch.allclose(out.logits_per_image[0], scores, atol=1e-4)


@pytest.mark.parametrize("size", [(40, 56), (9, 12), (16, 16)])
def test_external_preprocessing_is_that_of_transformers(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    preprocessing = Preprocessing.from_file(Path("nowhere"), 16)  # OpenAI's
    smooth = np.linspace(0, 255, size[0] * size[1] * 3).reshape(*size, 3).astype(np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    expected = processor(Image.fromarray(smooth), return_tensors="pt").pixel_values
    got = preprocessing(torch.from_numpy(smooth).permute(2, 0, 1)[None].float() / 255)
    assert (got - expected).abs().max() < PIL_NOISE


def test_a_legacy_external_folder_loads(tmp_path: Path, images: torch.Tensor) -> None:
    """OpenAI's own configs say that the end is id 2; it is the highest id."""
    torch.manual_seed(0)
    ranker = Ranker.create(tiny_config(), ByteTokenizer()).eval()
    ranker.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").unlink()
    legacy = Ranker.from_folder(tmp_path)
    assert torch.equal(legacy.text_features(CAPTIONS), ranker.text_features(CAPTIONS))
    assert legacy.preprocessing.mean[0] == pytest.approx(0.48145466)
    assert legacy.scores(images, CAPTIONS).shape == (4,)


def test_invalid_folders_raise(ranker: Ranker, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Ranker.from_folder(tmp_path)
    ranker.save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        Ranker.from_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pickle \(pytorch_model\.bin\)"):
        Ranker.from_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        Ranker.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert'"):
        Ranker.from_folder(tmp_path)


def test_missing_weights_raise(ranker: Ranker, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ranker.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: visual_projection\.weight"):
        Ranker.from_folder(tmp_path)


def test_a_tokenizer_of_another_model_raises(ranker: Ranker, tmp_path: Path) -> None:
    ranker.save(tmp_path)
    ByteTokenizer().save(tmp_path)
    with pytest.raises(ValueError, match="do not belong together"):
        Ranker.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_width": 15}, "vision_heads"),
        ({"patch_size": 5}, "multiple of patch_size"),
        ({"text_layers": 0}, "text_layers must be at least 1"),
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
