"""ruDALL-E's prior and its captions equal the released code, in both versions."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dalle_zoo.convert import convert, find
from dalle_zoo.convert.youtokentome import read_vocabulary
from dalle_zoo.models.external.rudalle import RuDALLE, RuDALLEConfig
from dalle_zoo.networks import load_prior
from dalle_zoo.sampling import SamplingOptions, decode_logits, sample_codes

GOLDEN = runpy.run_path(str(Path(__file__).parents[2] / "golden/rudalle.py"))
TWIN = {"atol": 1e-4, "rtol": 1e-4}
"""The original also computes in float32, but divides its scores and multiplies them again."""
VOCAB, LENGTH = 200, 6


@pytest.fixture(scope="module", params=["v2", "v3"])
def twins(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RuDALLE, dict[str, Tensor]]:
    """The small converted network, and the outputs of the original."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.save(GOLDEN["small_state"](request.param), folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"num_attention_heads": 4}')
    convert(find(folder), folder / "ours")
    prior = load_prior(folder / "ours/prior")
    assert isinstance(prior, RuDALLE)
    assert prior.config.version == request.param
    golden = load_file(GOLDEN["FILES"][request.param])
    golden["text"] = padded(golden["text"])
    return prior, golden


def padded(ids: Tensor) -> Tensor:
    """The original's text, in which 0 is padding, with one padding token per position."""
    return ids.where(ids != 0, VOCAB + torch.arange(ids.shape[-1]))


@torch.no_grad()
def test_logits_in_one_pass_equal_the_original(twins: tuple[RuDALLE, dict[str, Tensor]]) -> None:
    prior, golden = twins
    codes = golden["codes"].view(2, 12, 12)
    joint = prior(golden["text"], codes)
    length = LENGTH + 144 - (prior.config.version == "v3")  # the original's input includes the last code
    torch.testing.assert_close(joint[..., :: GOLDEN["STRIDE"]], golden["joint"][:, :length], **TWIN)
    image = prior.image_logits(golden["text"], codes)
    torch.testing.assert_close(image, golden["steps"], **TWIN)
    assert torch.equal(image, joint[:, -144:, VOCAB + LENGTH :])


def test_logits_step_by_step_equal_the_original(twins: tuple[RuDALLE, dict[str, Tensor]]) -> None:
    prior, golden = twins
    codes = golden["codes"].view(2, 1, 12, 12)
    steps = torch.stack([step[:, 0] for step in decode_logits(prior, golden["text"], codes)], 1)
    torch.testing.assert_close(steps, golden["steps"], **TWIN)


def test_the_most_likely_codes_equal_the_original(twins: tuple[RuDALLE, dict[str, Tensor]]) -> None:
    prior, golden = twins
    sampled = sample_codes(prior, golden["text"], torch.zeros(2, 1, dtype=torch.int64), SamplingOptions(temperature=0))
    assert torch.equal(sampled.view(2, 144), golden["likely"])


def test_versions_differ_in_every_code() -> None:
    """Otherwise the tests above could not distinguish the versions."""
    v2, v3 = (load_file(GOLDEN["FILES"][version])["steps"] for version in ("v2", "v3"))
    assert (v2 - v3).abs().amax((0, 2)).min() > 1e-2


# ------------------------------------------------------------ config


def test_the_published_schedule() -> None:
    masks = RuDALLEConfig().masks
    assert [index for index, name in enumerate(masks) if name == "column"] == [1, 5, 9, 13, 17, 21]
    assert masks[-1] == "conv_clamped(kernel=11)"
    assert masks.count("row") == 17
    assert RuDALLEConfig(version="v2").masks[-1] == "conv_torus(kernel=11)"


def test_a_column_layer_can_replace_the_convolutional_one() -> None:
    assert RuDALLEConfig(num_layers=6).masks == ["row", "column", "row", "row", "row", "column"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v4"}, "unknown version 'v4'"),
        ({"width": 30, "num_heads": 4}, "width 30 is not a multiple of num_heads 4"),
        ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
        ({"text_length": 1}, "text_length must be at least 2, for start and end, got 1"),
    ],
)
def test_invalid_configs_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RuDALLEConfig(**options)


def test_sizes_of_the_published_models() -> None:
    sizes = {"malevich": (RuDALLEConfig(), 1_310_410_880)}
    sizes["kandinsky"] = (RuDALLEConfig(width=3840, num_layers=64, num_heads=60), 11_519_306_624)
    for config, expected in sizes.values():
        with torch.device("meta"):
            assert sum(p.numel() for p in RuDALLE(config).parameters()) == expected


def test_half_precision_stays_finite() -> None:
    prior = RuDALLE(RuDALLEConfig(version="v3", text_length=3, text_vocab=9, image_height=2, image_width=2,
                                  codebook_size=5, width=16, num_layers=2, num_heads=2)).half()  # fmt: skip
    prior.layers[0].attention.output.weight.data.fill_(6e4)
    text, codes = torch.tensor([[2, 5, 3]]), torch.tensor([[[0, 1], [2, 3]]])
    assert prior.image_logits(text, codes).isfinite().all()


# ------------------------------------------------------------ captions


def test_captions_have_the_ids_of_the_original() -> None:
    length = GOLDEN["CAPTION_LENGTH"]
    with torch.device("meta"):
        prior = RuDALLE(RuDALLEConfig(text_length=length, text_vocab=VOCAB, width=16, num_layers=1, num_heads=1))
    tokenizer = read_vocabulary(GOLDEN["VOCABULARY"])
    prior.check_tokenizer(tokenizer)
    rows = json.loads(GOLDEN["CAPTIONS"].read_text(encoding="utf-8"))
    captions, ids = zip(*rows, strict=True)
    expected = torch.where(torch.tensor(ids) == 0, VOCAB + torch.arange(length), torch.tensor(ids))
    came = prior.encode_captions(tokenizer, captions)
    wrong = [caption for caption, row in zip(captions, came.ne(expected).any(1), strict=True) if row]
    assert not wrong
    truncated = (expected[:, -1] < VOCAB) & (expected[:, -1] != 3)
    assert 20 < int(truncated.sum()) < len(rows) - 200, "some are truncated, and then have no end"


def test_invalid_captions_raise(twins: tuple[RuDALLE, dict[str, Tensor]]) -> None:
    captions: Any = ["кот", None]
    with pytest.raises(TypeError, match="a caption must be a str, got NoneType: None"):
        twins[0].encode_captions(read_vocabulary(GOLDEN["VOCABULARY"]), captions)


def test_the_empty_caption(twins: tuple[RuDALLE, dict[str, Tensor]]) -> None:
    tokenizer = read_vocabulary(GOLDEN["VOCABULARY"])
    assert torch.equal(twins[0].null_text(), twins[0].encode_captions(tokenizer, [""])[0])
