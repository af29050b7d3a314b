"""DALL-E mini's transformer: captions, padding, sharing between candidates, and invalid configurations."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from dalle_zoo.models.external.dalle_mini import DalleMini, DalleMiniConfig
from dalle_zoo.sampling import decode_logits, sample_codes
from dalle_zoo.tokenizers import ByteTokenizer

SMALL = DalleMiniConfig(
    text_length=8, text_vocab=260, begin_token=256, pad_token=257, end_token=258, image_height=3, image_width=4,
    codebook_size=9, image_rows=14, start_token=11, width=16, encoder_layers=2, encoder_heads=2, encoder_hidden=20,
    decoder_layers=3, decoder_heads=4, decoder_hidden=24,
)  # fmt: skip


def small(**changes: Any) -> DalleMini:
    """A network with random values in every weight."""
    torch.manual_seed(0)
    prior = DalleMini(replace(SMALL, **changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return prior


def test_captions_are_between_begin_and_end_tokens(caplog: pytest.LogCaptureFixture) -> None:
    prior = small()
    with caplog.at_level(logging.WARNING):
        text = prior.encode_captions(ByteTokenizer(), ["ab", "", "abcdefghij"])
    a, begin, pad, end = ord("a"), 256, 257, 258
    assert text.dtype == torch.int64
    assert text.tolist() == [
        [begin, a, a + 1, end, pad, pad, pad, pad],
        [begin, end, pad, pad, pad, pad, pad, pad],
        [begin, *range(a, a + 6), end],  # truncated, but not its end token
    ]
    assert "captions truncated to 6 tokens" in caplog.text
    assert torch.equal(prior.null_text(), text[1])


def test_tokenizers_may_have_fewer_tokens_than_the_embedding() -> None:
    prior = small()
    prior.check_tokenizer(ByteTokenizer())
    with pytest.raises(ValueError, match="has 256 tokens, but the text embedding of the prior has only 255 rows"):
        small(text_vocab=255, begin_token=0, pad_token=1, end_token=2).check_tokenizer(ByteTokenizer())


@torch.no_grad()
def test_no_position_attends_to_padding() -> None:
    """The embedding of the padding token may be anything: neither encoder nor decoder attends to it."""
    prior = small()
    text = prior.encode_captions(ByteTokenizer(), ["abc", ""])
    codes = torch.randint(9, (2, 3, 4))
    before = prior.image_logits(text, codes)
    prior.encoder.embedding.weight[257] = torch.randn(16)
    assert torch.equal(prior.image_logits(text, codes), before)
    prior.encoder.embedding.weight[258] = torch.randn(16)
    assert not torch.allclose(prior.image_logits(text, codes), before, atol=1e-2)


@torch.no_grad()
def test_sampling_begins_with_the_start_token() -> None:
    prior = small()
    text, codes = prior.null_text()[None], torch.zeros(1, 3, 4, dtype=torch.long)
    first = next(iter(decode_logits(prior, text, codes[:, None])))
    prior.decoder.embedding.weight[:9] = torch.randn(9, 16)
    assert torch.equal(next(iter(decode_logits(prior, text, codes[:, None]))), first), "no code was read"
    prior.decoder.embedding.weight[11] = torch.randn(16)
    assert not torch.allclose(next(iter(decode_logits(prior, text, codes[:, None]))), first, atol=1e-2)


def test_rows_after_the_codes_are_never_sampled() -> None:
    prior = small()
    with torch.no_grad():
        prior.image_head.weight[9:] *= 100  # rows after the codes
        assert prior.image_logits(prior.null_text()[None], torch.zeros(1, 3, 4, dtype=torch.long)).shape == (1, 12, 9)
    codes = sample_codes(prior, prior.null_text()[None], torch.arange(20)[None])
    assert int(codes.max()) < 9


@torch.no_grad()
def test_candidates_share_keys_and_values_of_their_caption() -> None:
    prior = small()
    read: list[tuple[int, ...]] = []
    prior.encoder.layers[0].register_forward_hook(lambda module, args, output: read.append(tuple(output.shape)))
    state = prior.decoding(prior.null_text().expand(2, -1), 5)
    state.step(0, None)
    assert read == [(2, 8, 16)]
    keys = {tuple(key.shape) for key, _, _ in state.captions}
    assert keys == {(2, 4, 8, 4)}, "one set of keys a prompt"
    assert {tuple(images.key.shape) for images in state.images} == {(10, 4, 12, 4)}
    places = [images.key.data_ptr() for images in state.images]
    state.step(1, torch.zeros(2, 5, dtype=torch.long))
    assert [images.key.data_ptr() for images in state.images] == places, "buffers stay where they are"


@torch.no_grad()
def test_half_precision_is_close_to_float32() -> None:
    prior = small()
    codes = torch.randint(9, (1, 3, 4), generator=torch.Generator().manual_seed(0))
    text = prior.encode_captions(ByteTokenizer(), ["abc"])
    expected = prior.image_logits(text, codes)
    prior.to(torch.bfloat16)
    steps = torch.stack(list(decode_logits(prior, text, codes[:, None])), 2)[:, 0]
    assert steps.dtype == torch.bfloat16
    torch.testing.assert_close(steps.float(), expected, atol=0.05 * float(expected.abs().max()), rtol=0)


def test_shapes_are_checked() -> None:
    prior = small()
    with pytest.raises(ValueError, match=r"text must have shape \(B, 8\), got \(1, 7\)"):
        prior.image_logits(torch.zeros(1, 7, dtype=torch.long), torch.zeros(1, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"codes must have shape \(B, 3, 4\), got \(1, 4, 3\)"):
        prior.image_logits(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 4, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 18}, "width 18 is not a multiple of decoder_heads 4"),
        ({"encoder_heads": 3}, "width 16 is not a multiple of encoder_heads 3"),
        ({"decoder_layers": 0}, "decoder_layers must be an integer of at least 1, got 0"),
        ({"text_length": 2}, "text_length must be at least 3"),
        ({"start_token": 8}, r"start_token must follow the codes and be in 9\.\.13 .*, got 8"),
        ({"start_token": 14}, "start_token must follow the codes"),
        ({"pad_token": 256}, "must be three ids"),
        ({"end_token": 260}, r"must be three ids in 0\.\.259"),
    ],
)
def test_configurations_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_a_configuration_round_trips_through_json() -> None:
    assert DalleMiniConfig(**json.loads(json.dumps(asdict(SMALL)))) == SMALL


MEGA = {
    "text_vocab": 50272, "image_rows": 16416, "start_token": 16415, "width": 2048, "encoder_layers": 24,
    "encoder_heads": 32, "encoder_hidden": 4096, "decoder_layers": 24, "decoder_heads": 32, "decoder_hidden": 4096,
}  # fmt: skip


@pytest.mark.parametrize(("changes", "count"), [({}, 437_962_720), (MEGA, 2_587_967_488)])
def test_published_sizes(changes: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        prior = DalleMini(DalleMiniConfig(**changes))
    assert sum(p.numel() for p in prior.parameters()) == count
