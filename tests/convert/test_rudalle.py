"""ruDALL-E's priors: inferred options and their origin, complete models after conversion, errors."""

from __future__ import annotations

import json
import math
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dalle_zoo import DallePipeline
from dalle_zoo.convert import FAMILIES, Source, WeightFileError, convert, find
from dalle_zoo.convert.lazy import check_fit
from dalle_zoo.files import read_json
from dalle_zoo.models.external.rudalle import RuDALLE, RuDALLEConfig
from dalle_zoo.sampling import SAMPLE

TESTS = Path(__file__).parents[1]
GOLDEN = runpy.run_path(str(TESTS / "golden/rudalle.py"))
VQGAN = runpy.run_path(str(TESTS / "convert/test_vqgan.py"))
State = dict[str, Tensor]


def save(state: State, folder: Path, name: str = "pytorch_model_v3.bin", **stated: Any) -> Path:
    """A file in the published format, and a configuration with the number of heads."""
    torch.save(state, folder / name)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4} | stated))
    return folder


# ------------------------------------------------------------ complete models


@pytest.mark.parametrize(("version", "wavelet", "pixels"), [("v3", False, 48), ("v2", True, 96)])
def test_prompt_to_images(version: str, wavelet: bool, pixels: int, tmp_path: Path) -> None:
    (tmp_path / "malevich").mkdir()
    (tmp_path / "utils").mkdir()
    save(GOLDEN["small_state"](version), tmp_path / "malevich")
    VQGAN["rudalle_wavelet" if wavelet else "taming"](*([] if wavelet else [VQGAN["GUMBEL"]]), tmp_path / "utils")
    shutil.copy(GOLDEN["VOCABULARY"], tmp_path / "utils/bpe.model")
    record = convert(find([tmp_path / "malevich", tmp_path / "utils"]), tmp_path / "ours")
    assert record["family"] == "rudalle"
    assert record["image_tokenizer"]["family"] == "vqgan"
    assert record["missing"] == []
    pipe = DallePipeline.from_pretrained(tmp_path / "ours")
    options: dict[str, Any] = {"top_k": 20, "top_p": 0.9, "temperature": 0.8, "guidance_scale": 1.5, "seed": 1}
    first, second = pipe("Рыжий котик", num_images_per_prompt=2, **options).images
    assert first.size == (pixels, pixels)
    assert first.tobytes() != second.tobytes()
    primed = pipe("кот", image=Image.new("RGB", (99, 99), "red"), prime_rows=5, output_type="latent", seed=2).images
    given = pipe.kept_codes(Image.new("RGB", (99, 99), "red"), prime_rows=5)[None]
    assert torch.equal(primed[:, :5], given[:, :5])
    assert (given[:, 5:] == SAMPLE).all()


def test_missing_components_are_reported(tmp_path: Path) -> None:
    record = convert(find(save(GOLDEN["small_state"]("v3"), tmp_path)), tmp_path / "ours")
    assert record["missing"] == ["dvae", "tokenizer"]
    assert record["inferred"] == {
        "type": "rudalle", "version": "v3", "text_length": 6, "text_vocab": 200, "image_height": 12, "image_width": 12,
        "codebook_size": 48, "width": 32, "num_layers": 4, "num_heads": 4,
    }  # fmt: skip
    assert record["notes"] == {"num_heads": "config.json", "version": "from its masks"}
    assert record["unused"] == {"masks": 3}
    assert read_json(tmp_path / "ours/prior/config.json") == record["inferred"]


@pytest.mark.parametrize("prefix", ["module.", "dalle."])
def test_wrapped_weights_in_half_precision(prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{name}": tensor.half() for name, tensor in GOLDEN["small_state"]("v2").items()}
    torch.save({"state_dict": state}, tmp_path / "fine-tuned.pt")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    record = convert(find(tmp_path), tmp_path / "ours")
    assert record["inferred"]["version"] == "v2"
    stored = load_file(tmp_path / "ours/prior/model.safetensors")
    assert torch.equal(stored["head.weight"], state[f"{prefix}to_logits.1.weight"])
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


# ------------------------------------------------------------ inferred options


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("malevich", RuDALLEConfig()), ("kandinsky", RuDALLEConfig(width=3840, num_layers=64, num_heads=60))],
)
def test_published_sizes(kind: str, expected: RuDALLEConfig, tmp_path: Path, empty_safetensors: Any) -> None:
    source = find(empty_safetensors(GOLDEN["layout"](kind), tmp_path / "model.safetensors"))
    assert source.family == "rudalle"
    assert RuDALLEConfig(**source.config) == expected
    assert source.notes == {"num_heads": "that of the published model of this width"}
    with torch.device("meta"):
        check_fit(FAMILIES[source.family](source.family).translate(source, expected), RuDALLE(expected).state_dict())


def without_masks(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith("_mask")}


def test_a_stated_version_is_used_if_masks_are_missing(tmp_path: Path) -> None:
    state = without_masks(GOLDEN["small_state"]("v2"))
    with pytest.raises(WeightFileError, match=r"lacks the masks .* that determine the version"):
        find(save(state, tmp_path))
    record = convert(find(save(state, tmp_path, hf_version="v2")), tmp_path / "ours")
    assert record["inferred"]["version"] == "v2"
    assert record["notes"]["version"] == "config.json"
    assert record["unused"] == {}


@pytest.mark.parametrize(("stated", "version"), [({}, "v3"), ({"hf_version": "v2"}, "v2")])
def test_the_version_of_a_grid_on_which_both_are_equal(stated: dict[str, str], version: str, tmp_path: Path) -> None:
    state = GOLDEN["small_state"]("v3")
    for kind in ("row", "col"):
        state[f"image_{kind}_embeddings.weight"] = state[f"image_{kind}_embeddings.weight"][:3]
    for kind, steps in (("row", {0, 1, 2, 3}), ("col", {0, 3, 6}), ("conv", set(range(9)))):
        mask = torch.ones(15, 15).tril()
        offsets = torch.arange(9)[:, None] - torch.arange(9)
        mask[6:, 6:] = torch.isin(offsets, torch.tensor(sorted(steps)))
        state[f"transformer.{kind}_mask"] = mask
    record = convert(find(save(state, tmp_path, **stated)), tmp_path / "ours")
    assert record["inferred"]["version"] == version
    assert record["notes"]["version"].startswith("stated" if stated else "assumed")


# ------------------------------------------------------------ errors


def flip(state: State, name: str) -> None:
    state[f"transformer.{name}"][100, 90] ^= True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: flip(s, "row_mask"),
            r"its row_mask differs from that of ruDALL-E on TextImageLayout\(text=6, height=12",
        ),
        (lambda s: flip(s, "col_mask"), "its col_mask differs from that of ruDALL-E"),
        (lambda s: flip(s, "conv_mask"), "its conv_mask is neither that of v2 nor that of v3"),
        (lambda s: s.update({"transformer.row_mask": torch.ones(9, 9)}), "its row_mask differs from that"),
        (lambda s: s.pop("transformer.col_mask"), "it has only the masks row, conv, expected row, col and conv"),
        (lambda s: s.pop("transformer.layers.2.mlp.dense_h_to_4h.bias"), "missing layers.2.mlp.hidden.bias"),
        (lambda s: s.update({"transformer.layers.1.extra.weight": torch.ones(2)}), "unexpected layers.1.extra.weight"),
        (lambda s: s["to_logits.1.bias"].fill_(math.nan), "head.bias has values that are not finite"),
        (lambda s: s.pop("text_embeddings.weight"), "has no matrix text_embeddings.weight"),
        (lambda s: s.update({"to_logits.1.weight": torch.ones(9, 32)}), r"head.weight has shape \(9, 32\)"),
        (lambda s: s.update({"text_pos_embeddings.weight": torch.ones(1, 32)}), "text_length must be at least 2"),
    ],
)
def test_tensors_that_do_not_fit_raise(change: Any, message: str, tmp_path: Path) -> None:
    state = GOLDEN["small_state"]("v3")
    change(state)
    with pytest.raises(WeightFileError, match=message):
        convert(find(save(state, tmp_path)), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"num_attention_heads": "4"}, "config.json states num_attention_heads as '4', expected int"),
        ({"num_attention_heads": 5}, "width 32 is not a multiple of num_heads 5"),
        ({"image_tokens_per_dim": 32}, "config.json does not describe this network: image_tokens_per_dim is 32"),
        ({"hf_version": "v4"}, "unknown version 'v4'"),
        ({"hf_version": "v2"}, "a configuration states version v2, but it has the masks of v3"),
    ],
)
def test_a_configuration_that_does_not_fit_raises(stated: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match=message):
        convert(find(save(GOLDEN["small_state"]("v3"), tmp_path, **stated)), tmp_path / "ours")


def test_an_unknown_number_of_heads_raises(tmp_path: Path) -> None:
    path = save(GOLDEN["small_state"]("v3"), tmp_path) / "pytorch_model_v3.bin"
    with pytest.raises(WeightFileError, match=r'no published model has its width 32.*{"num_attention_heads": 16}'):
        find(path)


def test_several_priors_raise(tmp_path: Path) -> None:
    for version in ("v2", "v3"):
        save(GOLDEN["small_state"](version), tmp_path, f"pytorch_model_{version}.bin")
    with pytest.raises(WeightFileError, match=r"several priors of ruDALL-E \(pytorch_model_v2.bin, pytorch_model_v3"):
        find(tmp_path)
    chosen: Source = find(tmp_path, only=["*_v2.bin", "config.json"])
    assert convert(chosen, tmp_path / "ours")["inferred"]["version"] == "v2"


def test_a_vocabulary_of_another_size_raises(tmp_path: Path) -> None:
    lines = GOLDEN["VOCABULARY"].read_text().splitlines()
    characters, merges = map(int, lines[0].split())
    shorter = [f"{characters} {merges - 1}", *lines[1:-2], lines[-1]]
    (tmp_path / "bpe.model").write_text("\n".join(shorter))
    with pytest.raises(WeightFileError, match=r"bpe.model does not belong to the prior: the prior has 200 .* 199"):
        convert(find(save(GOLDEN["small_state"]("v3"), tmp_path)), tmp_path / "ours")
