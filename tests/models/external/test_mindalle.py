"""minDALL-E's prior and its captions equal the original, in one pass and step by step."""

from __future__ import annotations

import json
import logging
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import CharBPETokenizer, Tokenizer
from torch import Tensor

from dalle_zoo.models.external.mindalle import MinDALLE, MinDALLEConfig
from dalle_zoo.sampling import SamplingOptions, decode_logits, sample_codes
from dalle_zoo.tokenizers import ByteTokenizer, HFTokenizer

GOLDEN = runpy.run_path(str(Path(__file__).parents[2] / "golden/mindalle.py"))
OUTPUTS = load_file(GOLDEN["FILE"])
TOKENIZED = json.loads(GOLDEN["TOKENIZER"].read_text())
TWIN = {"atol": 1e-4, "rtol": 0.0}
"""Float32 rounding over three layers, which sum up in another order; logits are of size 1."""

SMALL = MinDALLEConfig(
    text_length=12, text_vocab=300, image_height=4, image_width=4, codebook_size=48, width=48, num_layers=3,
    num_heads=3, padding_id=1,
)  # fmt: skip
"""The architecture of the golden file."""
OUTSIDE = {
    "text_embedding": "tok_emb_txt", "text_position": "pos_emb_txt", "text_head": "head_txt",
    "image_embedding": "tok_emb_img", "image_position": "pos_emb_img", "image_head": "head_img", "final_norm": "ln_f",
}  # fmt: skip
INSIDE = {
    "attention_norm": ["ln1"], "attention.qkv": ["attn.query", "attn.key", "attn.value"],
    "attention.output": ["attn.proj"], "mlp_norm": ["ln2"], "mlp.hidden": ["mlp.0"], "mlp.output": ["mlp.2"],
}  # fmt: skip


def twin() -> MinDALLE:
    """The native network with the weights of the golden file."""
    external = GOLDEN["weights"](GOLDEN["layout"](GOLDEN["STAGE2"]))
    net = MinDALLE(SMALL).eval()
    native = {}
    for name in net.state_dict():
        module, _, kind = name.rpartition(".")
        if module in OUTSIDE:
            native[name] = external[f"{OUTSIDE[module]}.{kind}"]
        else:
            _, index, part = module.split(".", 2)
            native[name] = torch.cat(
                [external[f"blocks.{index}.{external_name}.{kind}"] for external_name in INSIDE[part]]
            )
    net.load_state_dict(native)
    return net


@pytest.fixture(scope="module")
def prior() -> MinDALLE:
    return twin()


def golden(name: str) -> Tensor:
    return OUTPUTS[f"published.{name}"]


def tokenizer(vocabulary: dict[str, int]) -> HFTokenizer:
    pairs = [tuple(pair.split(" ")) for pair in TOKENIZED["merges"]]
    built = CharBPETokenizer(vocabulary, pairs, unk_token="[UNK]", lowercase=True)
    built.add_special_tokens(["[PAD]"])
    return HFTokenizer(Tokenizer.from_str(built.to_str()))


# ------------------------------------------------------------ network


@torch.no_grad()
def test_one_pass_equals_the_original(prior: MinDALLE) -> None:
    codes = golden("codes").view(2, 4, 4)
    torch.testing.assert_close(prior.image_logits(golden("text"), codes), golden("image_logits"), **TWIN)
    torch.testing.assert_close(prior.text_logits(golden("text")), golden("text_logits"), **TWIN)
    assert golden("image_logits").std() > 0.5, "logits that a tolerance can tell apart"


def test_cached_decoding_equals_that_of_the_original(prior: MinDALLE) -> None:
    steps = torch.stack(list(decode_logits(prior, golden("text"), golden("codes").view(2, 1, 4, 4))), 2)[:, 0]
    torch.testing.assert_close(steps, golden("step_logits"), **TWIN)


def test_the_most_likely_codes_are_those_of_the_original(prior: MinDALLE) -> None:
    codes = sample_codes(prior, golden("text"), torch.tensor([[1], [2]]), SamplingOptions(top_k=1))
    assert torch.equal(codes.view(2, 16), golden("greedy"))
    assert len(golden("greedy").unique()) > 5


def test_temperature_and_filters_equal_those_of_the_original() -> None:
    probabilities = SamplingOptions(**GOLDEN["SAMPLER"]).filter(golden("image_logits")[0]).softmax(-1)
    torch.testing.assert_close(probabilities, golden("probabilities"), atol=1e-6, rtol=1e-5)
    retained = (probabilities > 0).sum(-1)
    assert retained.min() < retained.max() <= 9, "both filters act"


def test_published_size() -> None:
    with torch.device("meta"):
        net = MinDALLE(MinDALLEConfig())
    assert sum(p.numel() for p in net.parameters()) == 1_291_081_728


@torch.no_grad()
def test_the_last_code_is_never_an_input(prior: MinDALLE) -> None:
    codes = golden("codes").view(2, 4, 4).clone()
    before = prior.image_logits(golden("text"), codes)
    codes[:, 3, 3] = (codes[:, 3, 3] + 1) % 48
    assert torch.equal(prior.image_logits(golden("text"), codes), before)
    codes[:, 3, 2] = (codes[:, 3, 2] + 1) % 48
    assert (prior.image_logits(golden("text"), codes) - before).abs().amax(-1)[:, -1].min() > 1e-3


@pytest.mark.parametrize(
    ("text", "codes", "message"),
    [
        ((2, 11), (2, 4, 4), r"text must have shape \(B, 12\)"),
        ((2, 12), (2, 16), r"codes must have shape \(B, 4, 4\)"),
    ],
)
def test_invalid_shapes_raise(prior: MinDALLE, text: tuple[int, ...], codes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prior.image_logits(torch.zeros(text, dtype=torch.long), torch.zeros(codes, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
        ({"num_heads": 5}, "width 48 is not a multiple of num_heads 5"),
        ({"padding_id": 300}, r"padding_id must be in 0\.\.299, got 300"),
    ],
)
def test_invalid_configs_raise(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MinDALLEConfig(**{**vars(SMALL), **change})


# ------------------------------------------------------------ captions


@pytest.mark.parametrize(("ids", "padding"), [("ids", 1), ("ids_appended", 299)])
def test_captions_have_the_ids_of_the_original(ids: str, padding: int) -> None:
    vocabulary = TOKENIZED["vocabulary"] if ids == "ids" else GOLDEN["without_padding"](TOKENIZED["vocabulary"])
    config = MinDALLEConfig(**{**vars(SMALL), "text_length": GOLDEN["LENGTH"], "padding_id": padding})
    opened, prior = tokenizer(vocabulary), MinDALLE(config)
    prior.check_tokenizer(opened)
    assert prior.encode_captions(opened, GOLDEN["CAPTIONS"]).tolist() == TOKENIZED[ids]
    assert torch.equal(prior.null_text(), prior.encode_captions(opened, [""])[0])
    lengths = [row.index(padding) if padding in row else len(row) for row in TOKENIZED[ids]]
    assert min(lengths) == 0
    assert max(lengths) == GOLDEN["LENGTH"]


def test_a_truncated_caption_is_logged(prior: MinDALLE, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prior.encode_captions(tokenizer(TOKENIZED["vocabulary"]), ["a cat " * 12])
    assert "captions truncated to 12 tokens" in caplog.text


def test_tokenizers_that_do_not_fit_raise(prior: MinDALLE) -> None:
    vocabulary = TOKENIZED["vocabulary"]
    with pytest.raises(ValueError, match="the prior has 300 text tokens, the text tokenizer 301"):
        prior.check_tokenizer(tokenizer({**vocabulary, "more": 300}))
    with pytest.raises(ValueError, match=r"\[PAD\] has the id 1 in the prior, but \[299\] in the text tokenizer"):
        prior.check_tokenizer(tokenizer(GOLDEN["without_padding"](vocabulary)))
    with pytest.raises(ValueError, match=r"\[PAD\] has the id 1 in the prior, but \[91, 80, "):
        prior.check_tokenizer(ByteTokenizer())


def test_an_unknown_padding_token_raises() -> None:
    prior = MinDALLE(MinDALLEConfig(**{**vars(SMALL), "padding_id": None}))
    for call in (
        prior.null_text,
        lambda: prior.check_tokenizer(tokenizer(TOKENIZED["vocabulary"])),
        lambda: prior.encode_captions(tokenizer(TOKENIZED["vocabulary"]), ["a cat"]),
    ):
        with pytest.raises(ValueError, match="converted without its vocabulary"):
            call()
