"""Contract of all extractors, and tests of those for images and captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dalle_zoo_eval.extractors import EXTRACTORS, Extractor, ExtractorFileError, TextExtractor, load_extractor
from dalle_zoo_eval.extractors.base import exact_float32
from dalle_zoo_eval.extractors.mobilenet import WEIGHTS_FILE, MobileNet
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dalle_zoo.files import sha256_file
from dalle_zoo.models.ranker import Ranker, RankerConfig
from dalle_zoo.ranker_folder import save_ranker
from dalle_zoo.registry import UnknownNameError
from dalle_zoo.tokenizers import ByteTokenizer

# For unit vectors: transformers resizes with Pillow, which differs from torch by single levels.
PREPROCESSING = 2e-2


@pytest.fixture
def images() -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 3, 24, 20), dtype=torch.uint8, generator=random)


@pytest.fixture
def locations(model: Path, tmp_path: Path) -> dict[str, Path]:
    """Locations of the networks that need no other package."""
    save_file(MobileNet().state_dict(), tmp_path / WEIGHTS_FILE)
    return {"mobilenet": tmp_path, "ranker": model, "clip": model / "ranker", "pixels": tmp_path}


@pytest.fixture(params=["mobilenet", "ranker", "clip", "pixels"])
def network(request: pytest.FixtureRequest, locations: dict[str, Path]) -> Extractor:
    return load_extractor(request.param, locations[request.param])


def test_docstring_table_lists_all_extractors() -> None:
    import dalle_zoo_eval.extractors as package

    assert package.__doc__
    networks = {
        "inception-2015",
        "dmgan",
        "clip",
        "clip-l14-336",
        "pickscore",
        "dinov2",
        "ranker",
        "mobilenet",
        "pixels",
    }
    assert set(EXTRACTORS) == {
        *networks,
        "image_tokenizer",
        "prior",
        "sprites",
        "sprites-clip",
        "sprites-ranker",
        "sprites-mobilenet",
    }
    assert [spec.name for spec in EXTRACTORS.specs() if spec.fid] == ["inception-2015", "dmgan"]
    assert all(f"`{name}`" in str(package.__doc__) for name in EXTRACTORS)
    with pytest.raises(UnknownNameError, match="Did you mean 'inception-2015'"):
        load_extractor("inception", "nowhere")


def test_features_do_not_depend_on_the_batch(network: Extractor, images: Tensor) -> None:
    together = network(images)["features"]
    apart = torch.cat([network(image[None])["features"] for image in images])
    assert together.dtype == torch.float32
    assert len(together) == 5
    assert torch.allclose(together, apart, atol=1e-5)
    assert not together.requires_grad


def test_global_settings_do_not_change_features(network: Extractor, images: Tensor) -> None:
    plain = network(images)["features"]
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(network(images)["features"], plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


def test_record_is_plain_and_complete(network: Extractor) -> None:
    assert network.record["name"] == network.name
    assert len(str(network.record["sha256"])) == 64
    more = {"mobilenet": "title", "pixels": "title"}.get(network.name, "files_sha256")
    assert {"name", "sha256", "pixels", "resize", more} == set(network.record)
    if more == "files_sha256":
        assert {"config.json", "tokenizer.json", "preprocessor_config.json"} <= set(network.record["files_sha256"])


def test_wrong_images_raise(network: Extractor, images: Tensor) -> None:
    for wrong in (images.float() / 255, images[0], images[:, :1]):
        with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\)"):
            network(wrong)


@pytest.mark.parametrize("name", ["mobilenet", "ranker", "clip"])
def test_unexpected_digest_raises(name: str, locations: dict[str, Path]) -> None:
    digest = str(load_extractor(name, locations[name]).record["sha256"])
    assert load_extractor(name, locations[name], expected_sha256=digest).record["sha256"] == digest
    with pytest.raises(ExtractorFileError, match=f"has sha256 {digest}, expected 000"):
        load_extractor(name, locations[name], expected_sha256="0" * 64)


@pytest.mark.parametrize("name", ["mobilenet", "ranker", "clip"])
def test_missing_file_raises_with_download_hint(name: str, tmp_path: Path) -> None:
    expected = "mobilenet_v1_025_224" if name == "mobilenet" else "model.safetensors"
    with pytest.raises(ExtractorFileError, match=rf"{expected}.* is missing|is missing: expected {expected}"):
        load_extractor(name, tmp_path)


def test_ranker_is_found_in_model_or_ranker_folder(model: Path) -> None:
    of_model, own = load_extractor("ranker", model), load_extractor("ranker", model / "ranker")
    assert of_model.record == own.record
    assert of_model.record["sha256"] == sha256_file(model / "ranker" / "model.safetensors")


def test_clip_equals_transformers(model: Path, images: Tensor) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.clip.modeling_clip import CLIPModel
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    folder, captions = str(model / "ranker"), ["a cat", "two dogs", "a cat", "a much longer caption", "x"]
    net = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    pil_images = [Image.fromarray(np.asarray(image.permute(1, 2, 0))) for image in images]
    ids = tokenizer(captions, padding=True, truncation=True, max_length=12, return_tensors="pt").input_ids
    with torch.inference_mode():
        seen = net.get_image_features(**processor(pil_images, return_tensors="pt")).pooler_output
        read = net.get_text_features(input_ids=ids).pooler_output
    network = load_extractor("clip", folder)
    assert isinstance(network, TextExtractor)
    assert torch.allclose(network(images)["features"], torch.nn.functional.normalize(seen), atol=PREPROCESSING)
    text = network.text_features(captions)
    assert torch.allclose(text, torch.nn.functional.normalize(read), atol=1e-5)
    assert torch.equal(text[0], text[2])


def test_clip_of_cmmd_scales_images_without_crop(model: Path, tmp_path: Path, images: Tensor) -> None:
    """The code of CMMD scales the complete image; the folder says to crop it."""
    torch.manual_seed(0)
    small = RankerConfig(
        image_size=336, patch_size=14, vision_width=8, vision_layers=1, vision_heads=1, text_width=8, text_layers=1,
        text_heads=1, embed_dim=8, text_length=12, text_vocab=256,
    )  # fmt: skip
    ranker = Ranker.create(small, ByteTokenizer())
    save_ranker(ranker, tmp_path / "clip")
    found = load_extractor("clip-l14-336", tmp_path / "clip")(images)["features"]
    scaled = torch.nn.functional.interpolate(images, (336, 336), mode="bicubic", antialias=True).float() / 255
    assert torch.allclose(found, ranker.eval().image_features(scaled), atol=1e-5)
    assert not torch.allclose(found, load_extractor("clip", tmp_path / "clip")(images)["features"], atol=1e-3)
    with pytest.raises(ExtractorFileError, match="takes images of 16 pixels in patches of 8, expected 336"):
        load_extractor("clip-l14-336", model / "ranker")


def test_mobilenet_is_no_text_extractor(locations: dict[str, Path]) -> None:
    assert not isinstance(load_extractor("mobilenet", locations["mobilenet"]), TextExtractor)


def test_unrelated_folder_raises(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((model / "ranker" / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ExtractorFileError, match="cannot be opened as a CLIP folder"):
        load_extractor("clip", tmp_path)


def test_exact_float32_restores_settings() -> None:
    before = torch.backends.cudnn.allow_tf32
    with exact_float32(torch.device("cpu")):
        assert not torch.backends.cudnn.allow_tf32
        assert torch.is_inference_mode_enabled()
    assert torch.backends.cudnn.allow_tf32 == before
    assert not torch.is_inference_mode_enabled()
