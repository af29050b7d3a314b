"""CLIP folders: features are those of transformers in every layout, and nothing in a folder is believed unchecked."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo.model_folder import ModelFolderError
from dalle_zoo.models.ranker import Preprocessing, Ranker, RankerConfig
from dalle_zoo.ranker_folder import load_ranker, read_preprocessing, save_ranker
from dalle_zoo.tokenizers import ByteTokenizer

SIZE = 16
CAPTIONS = ["a red apple", "", "a much longer caption than fits into twenty positions", "Ä"]
FEATURE_NOISE = 1e-4
"""Largest difference from the features of transformers; both are float32."""
PIL_NOISE = 1.1 / 255 / 0.26
"""One level of 255, over the smallest std: PIL and torchvision round a few pixels differently."""
SECONDS = 3.0
"""Many times what a refusal takes."""


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    torch.manual_seed(0)
    config = RankerConfig(
        image_size=SIZE, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2, text_width=8, text_layers=1,
        text_heads=2, embed_dim=12, text_length=20, text_vocab=256,
    )  # fmt: skip
    ranker = Ranker.create(config, ByteTokenizer()).eval()
    for parameter in ranker.parameters():  # large, so that a difference of pixels shows in the features
        torch.nn.init.normal_(parameter, std=0.3)
    return ranker


@pytest.fixture(scope="module")
def saved(ranker: Ranker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranker") / "saved"
    save_ranker(ranker, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "ranker"))


def bytes_of(height: int, width: int) -> np.ndarray:
    """A smooth image with some noise."""
    rows, columns = np.linspace(0, 5, height)[:, None, None], np.linspace(0, 3, width)[None, :, None]
    waves = np.sin(rows + columns * np.array([1, 2, 3])) * 100 + 128
    return np.clip(waves + np.random.default_rng(0).normal(0, 9, waves.shape), 0, 255).astype(np.uint8)


def pixels(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ------------------------------------------------------------ layouts


def test_a_saved_ranker_comes_back(ranker: Ranker, saved: Path) -> None:
    again = load_ranker(saved)
    images = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    assert again.preprocessing == ranker.preprocessing
    assert not again.training
    assert torch.equal(again.scores(images, CAPTIONS), ranker.scores(images, CAPTIONS))


def test_transformers_opens_a_saved_ranker(ranker: Ranker, saved: Path) -> None:
    from transformers import CLIPModel, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(saved), local_files_only=True)
    model = CLIPModel.from_pretrained(str(saved), local_files_only=True).eval()
    captions, image = ["a red apple", "Ä"], bytes_of(SIZE, SIZE)
    encoded = tokenizer(captions, padding=True, return_tensors="pt")
    processor = CLIPImageProcessorPil.from_pretrained(str(saved), local_files_only=True)
    values = processor(Image.fromarray(image), return_tensors="pt").pixel_values
    out = model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, pixel_values=values)
    scores = ranker.scores(pixels(image).expand(2, -1, -1, -1), captions)
    assert torch.allclose(out.logits_per_image[0], scores, atol=FEATURE_NOISE)


PREPROCESSINGS: dict[str, dict[str, Any]] = {
    "openai": {},
    "half": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "one number": {"image_mean": 0.4, "image_std": 0.3},
    "no normalization": {"do_normalize": False},
    "no rescaling": {"do_rescale": False},
    "only resizing": {"do_rescale": False, "do_normalize": False},
    "another factor": {"rescale_factor": 1 / 127.5},
    "no resizing": {"do_resize": False},
    "smaller than the crop": {"size": {"shortest_edge": 11}},
    "larger than the crop": {"size": {"shortest_edge": 21}},
    "both sides": {"size": {"height": 18, "width": 25}},
    "no crop": {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False},
    "bilinear": {"resample": 2},
    "of transformers before 4.24": {"size": SIZE, "crop_size": SIZE, "feature_extractor_type": "CLIPFeatureExtractor"},
    "nulls": {"image_mean": None, "image_std": None, "do_normalize": None, "resample": None, "do_resize": None},
}  # fmt: skip


@pytest.mark.parametrize("nested", [False, True], ids=["of 4", "of 5"])
@pytest.mark.parametrize("name", PREPROCESSINGS)
def test_preprocessing_is_that_of_transformers(name: str, nested: bool, folder: Path) -> None:
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor

    values = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}, **PREPROCESSINGS[name]}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3} if nested else values))
    if nested:
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    ours, image = load_ranker(folder), bytes_of(27, 41)
    processor = CLIPImageProcessor.from_pretrained(str(folder), local_files_only=True)
    expected = processor([Image.fromarray(image)], return_tensors="pt").pixel_values.float()
    assert torch.allclose(ours.preprocessing(pixels(image)), expected, atol=FEATURE_NOISE)
    features = F.normalize(ours.model.get_image_features(pixel_values=expected).pooler_output, dim=-1)
    assert torch.allclose(ours.image_features(pixels(image)), features, atol=FEATURE_NOISE)


@pytest.mark.parametrize("size", [(40, 56), (9, 12), (SIZE, SIZE)])
def test_without_a_file_it_is_openais(size: tuple[int, int], tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    expected = processor(Image.fromarray(bytes_of(*size)), return_tensors="pt").pixel_values
    got = read_preprocessing(tmp_path, SIZE)(pixels(bytes_of(*size)))
    assert (got - expected).abs().max() < PIL_NOISE


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": {"longest_edge": 16}}, "size must be a number, or an object with height and width"),
        ({"size": {"shortest_edge": "16"}}, "size must be a positive number, got '16'"),
        ({"size": [16]}, "size must be positive numbers"),
        ({"crop_size": None}, "crop_size must be positive numbers, got 'None'"),
        ({"image_mean": None}, "image_mean must be a finite number, or one for each of the 3 channels, got 'None'"),
        ({"crop_size": {"height": 8, "width": 8}}, "makes images of 8x8"),
        ({"crop_size": 0}, "crop_size must be positive numbers"),
        ({"image_mean": [0.5]}, "image_mean must be a finite number, or one for each of the 3 channels"),
        ({"image_mean": "0.5"}, "image_mean must be a finite number"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std must be positive"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be of the type float"),
        ({"resample": 1}, r"resample must be 2 \(bilinear\) or 3 \(bicubic\), got '1'"),
        ({"do_pad": True}, "do_pad must be false: this step is not supported"),
        ({"do_resize": 1}, "do_resize must be of the type bool"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type must be one of CLIPFeatureExtractor"),
    ],
)
def test_other_preprocessing_is_refused_by_name(values: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder / "preprocessor_config.json", **values)
    with pytest.raises(ModelFolderError, match=rf"preprocessor_config\.json:? .*{message}"):
        read_preprocessing(folder, SIZE)


def test_images_that_nothing_brings_to_the_size_of_the_network_are_refused() -> None:
    with pytest.raises(ValueError, match="images have 16x24 pixels after the preprocessing"):
        Preprocessing(size=SIZE, resize=SIZE, crop=None)(torch.zeros(1, 3, 32, 48))


def test_shards_and_half_precision(ranker: Ranker, saved: Path, folder: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(saved / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    edit(folder / "config.json", dtype="float16")
    state = load_ranker(folder).model.state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in tensors.items())
    assert state.keys() == ranker.model.state_dict().keys()


def test_a_folder_of_the_legacy_kind(ranker: Ranker, saved: Path, folder: Path) -> None:
    """OpenAI's configs say that the end is id 2, state sizes a second time, and the weights hold positions."""
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | {"eos_token_id": 2}
    edit(folder / "config.json", text_config=text | {"num_hidden_layers": 7}, text_config_dict=text)
    (folder / "preprocessor_config.json").unlink()
    positions = {f"{tower}_model.embeddings.position_ids": torch.arange(5)[None] for tower in ("text", "vision")}
    tensors = load_file(saved / "model.safetensors") | positions
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    legacy = load_ranker(folder)
    assert torch.equal(legacy.text_features(CAPTIONS), ranker.text_features(CAPTIONS))
    assert legacy.preprocessing.mean[0] == pytest.approx(0.48145466)


def test_a_vocabulary_in_two_files(folder: Path) -> None:
    """What a slow tokenizer of transformers 4 writes."""
    from transformers import CLIPTokenizer

    letters = [chr(code) + end for end in ("", "</w>") for code in range(33, 127)]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number + 258 - len(tokens) for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="not a tokenizer of CLIP"):
        load_ranker(folder)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    expected = CLIPTokenizer(vocab=vocabulary, merges=[])(["A  red apple"]).input_ids
    assert load_ranker(folder).encode_text(["A  red apple"]).tolist() == expected


# ------------------------------------------------------------ what is refused


def test_scores_that_are_not_finite_rank_nothing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors") | {"logit_scale": torch.tensor(200.0)}  # finite; its exp is not
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the scores of the ranker are not finite, so images cannot be ranked"):
        load_ranker(folder).rank(torch.rand(2, 3, SIZE, SIZE), "a red apple")


def test_wrong_folders_say_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_ranker(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_ranker(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pickle \(pytorch_model\.bin\)"):
        load_ranker(folder)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelFolderError, match="pointer of Git LFS and not the file itself: run `git lfs pull`"):
        load_ranker(folder)
    edit(folder / "config.json", model_type="bert")
    with pytest.raises(ValueError, match="'bert'"):
        load_ranker(folder)


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    ByteTokenizer().save(folder)
    with pytest.raises(ValueError, match="do not belong together"):
        load_ranker(folder)


def test_an_index_cannot_name_a_pickle(folder: Path) -> None:
    """Transformers would open it with torch.load."""
    (folder / "model.safetensors").unlink()
    (folder / "evil.bin").write_bytes(pickle.dumps({"logit_scale": 1}))
    index = {"metadata": {}, "weight_map": {"logit_scale": "evil.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match=r"evil\.bin is not a readable safetensors file"):
        load_ranker(folder)


PROJECTION = "visual_projection.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(PROJECTION), f"missing {PROJECTION}"),
        (lambda t: t.update(evil=torch.zeros(3)), "unexpected evil"),
        (lambda t: t.update({PROJECTION: t[PROJECTION] * float("nan")}), f"not finite, in {PROJECTION}"),
        (lambda t: t.update(logit_scale=torch.tensor(float("inf"))), "not finite, in logit_scale"),
        (lambda t: t.update({PROJECTION: t[PROJECTION].int()}), f"{PROJECTION} is stored as I32"),
        (lambda t: t.update({PROJECTION: t[PROJECTION][:3].clone()}), f"{PROJECTION} has shape"),
    ],
)
def test_tensors_are_checked(change: Callable[[dict[str, Tensor]], object], message: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=message):
        load_ranker(folder)


@pytest.mark.parametrize("place", ["attn_implementation", "_attn_implementation", "auto_map", "quantization_config"])
def test_no_code_that_a_configuration_names_is_fetched(
    place: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the package kernels transformers would download and import it."""
    kernels: Any = type(sys)("kernels")
    kernels.__getattr__ = lambda name: pytest.fail(f"kernels.{name} is asked for")
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    config = json.loads((folder / "config.json").read_text())
    towers = {f"{tower}_config": config[f"{tower}_config"] | {place: "someone/kernel"} for tower in ("text", "vision")}
    edit(folder / "config.json", **towers, **{place: "someone/kernel"})
    ranker = load_ranker(folder)
    assert {part.config._attn_implementation for part in ranker.model.modules() if hasattr(part, "config")} == {"sdpa"}


@pytest.mark.parametrize(
    ("tower", "values", "message"),
    [
        ("text", {"num_hidden_layers": 60_000}, "has more parameters than the 46 tensors"),
        ("vision", {"num_hidden_layers": 10**9}, "num_hidden_layers has the number 1000000000, which exceeds every"),
        ("vision", {"image_size": 10**9}, "image_size has the number 1000000000"),
        ("text", {"max_position_embeddings": 60_000}, "position_embedding.weight has shape"),
        ("text", {"hidden_size": "8"}, "hidden_size has the wrong type, got '8'"),
        ("text", {"hidden_size": 0}, "hidden_size must be at least 1"),
        ("vision", {"image_size": [16, 16]}, "image_size has the wrong type"),
        ("vision", {"hidden_act": "gleu"}, "unknown hidden_act 'gleu'"),
        ("vision", {"num_attention_heads": 3}, "describes no CLIP: .*not a multiple of the number of attention heads"),
        ("vision", {"num_channels": 4}, "num_channels must be 3"),
    ],
)
def test_configurations_are_checked_first(tower: str, values: dict[str, Any], message: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", **{f"{tower}_config": config[f"{tower}_config"] | values})
    start = time.monotonic()
    with pytest.raises(ModelFolderError, match=message):
        load_ranker(folder)
    assert time.monotonic() - start < SECONDS
