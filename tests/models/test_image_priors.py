"""The contract of every registered prior that sampling and the pipeline rely on."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_zoo.files import read_json, write_json
from dalle_zoo.model_folder import ModelFolderError
from dalle_zoo.models.image_prior import PRIORS, ImagePrior
from dalle_zoo.networks import load_prior, save_network
from dalle_zoo.sampling import SAMPLE, SamplingOptions, decode_logits, sample_codes

SIZES = {"text_length": 5, "text_vocab": 11, "image_height": 3, "image_width": 4, "codebook_size": 9}

DALLE_PYTORCH = {"num_layers": 4, "masks": "full, row_same, column, conv_quadrant(kernel=3)"}
UNUSUAL = {"reversible": True, "tied_embeddings": True, "sandwich_norm": True, "divide_by_max": True}
OTHERS = {"norm": "rms", "masks": "full", "text_length": 36, "sparse_layers": (1, 3), "gmlp_layers": (0, 2)}
OLD = {"positions": "axial", "padding": "masked", "shift_tokens": False, "layer_scale": False}
DALLE_MINI = {
    "encoder_layers": 2, "encoder_heads": 2, "encoder_hidden": 20, "decoder_layers": 3, "decoder_heads": 4,
    "decoder_hidden": 24,
}  # fmt: skip

TINY: dict[str, dict[str, Any]] = {
    "prior": {**SIZES, "width": 16, "num_layers": 3, "num_heads": 2, "masks": "row, column, conv(kernel=3)"},
    "mindalle": {**SIZES, "width": 16, "num_layers": 3, "num_heads": 2, "padding_id": 1},
    "rudalle v2": {**SIZES, "version": "v2", "width": 16, "num_layers": 4, "num_heads": 2},
    "rudalle v3": {**SIZES, "version": "v3", "width": 16, "num_layers": 4, "num_heads": 2},
    "dalle_mini": {**SIZES, "width": 16, "image_rows": 12, "start_token": 10, **DALLE_MINI},
    "dalle_pytorch": {**SIZES, "width": 18, "num_heads": 3, "head_size": 8, **DALLE_PYTORCH, "shared_mlp": (0, 1) * 2},
    "dalle_pytorch reversible": {**SIZES, "width": 20, "num_heads": 2, "head_size": 12, **DALLE_PYTORCH, **UNUSUAL},
    "dalle_pytorch others": {**SIZES, "width": 16, "num_heads": 2, "head_size": 4, **DALLE_PYTORCH, **OTHERS},
    "dalle_pytorch masked": {**SIZES, "width": 16, "num_heads": 2, "head_size": 4, **DALLE_PYTORCH, **OLD},
}
"""A small config of every type; of some, several."""

IDS = ("padding_id", "start_token")
"""Fields that are no sizes."""
SECONDS = 20.0
"""Many times what all refusals of one prior take."""

every_prior = pytest.mark.parametrize("name", TINY)


def tiny(name: str) -> ImagePrior:
    """A small prior whose every weight counts, gains and biases too."""
    torch.manual_seed(0)
    cls = PRIORS[name.partition(" ")[0]]
    prior = cls(cls.config_class(**TINY[name])).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return prior


def captions(prior: ImagePrior, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, prior.config.text_vocab, (count, prior.config.text_length), generator=generator)
    return ids.sort(1, descending=True).values


def codes_of(prior: ImagePrior, *shape: int) -> Tensor:
    c = prior.config
    generator = torch.Generator().manual_seed(1)
    return torch.randint(c.codebook_size, (*shape, c.image_height, c.image_width), generator=generator)


def test_every_prior_is_covered() -> None:
    assert {name.partition(" ")[0] for name in TINY} == set(PRIORS) - {"example_prior"}


@every_prior
@torch.no_grad()
def test_decoding_equals_one_pass(name: str) -> None:
    prior = tiny(name)
    text, codes = captions(prior), codes_of(prior, 3, 2)
    came = torch.stack(list(decode_logits(prior, text, codes)), 2)
    expected = prior.image_logits(text.repeat_interleave(2, 0), codes.flatten(0, 1)).unflatten(0, (3, 2))
    assert came.shape == (3, 2, prior.config.image_length, prior.config.codebook_size)
    torch.testing.assert_close(came, expected, atol=2e-5, rtol=1e-4)


@every_prior
@torch.no_grad()
def test_a_token_depends_on_the_caption_and_on_no_later_token(name: str) -> None:
    prior = tiny(name)
    text, codes = captions(prior, 2), codes_of(prior, 1)
    one, other = prior.image_logits(text, codes.expand(2, -1, -1))
    assert (one - other).abs().amax(-1).min() > 1e-4, "every token reads the caption"
    changed = codes.clone()
    changed.view(-1)[6] = (changed.view(-1)[6] + 1) % prior.config.codebook_size
    difference = (prior.image_logits(text[:1], changed) - one).abs().amax(-1)[0]
    assert difference[:7].max() < 1e-5
    assert difference[7:].max() > 1e-4


@every_prior
def test_an_image_depends_only_on_its_seed(name: str) -> None:
    prior, seeds = tiny(name), torch.arange(6).view(3, 2)
    text = captions(prior)
    options = SamplingOptions(top_k=5)
    sampled = sample_codes(prior, text, seeds, options)
    assert len(sampled.flatten(0, 1).flatten(1).unique(dim=0)) == 6
    assert torch.equal(sample_codes(prior, text[1:2], seeds[1:2, 1:], options)[0, 0], sampled[1, 1])
    given = sampled[1, 1:2].clone()
    given.view(-1)[5:] = SAMPLE
    assert torch.equal(sample_codes(prior, text[1:2], seeds[1:2, 1:], options, given=given)[0, 0], sampled[1, 1])


@every_prior
@torch.no_grad()
def test_guidance_acts_on_every_step_or_raises(name: str) -> None:
    prior = tiny(name)
    text, seeds = captions(prior), torch.arange(3).view(3, 1)
    if type(prior).null_text is ImagePrior.null_text:
        with pytest.raises(ValueError, match="has no empty caption for guidance: leave guidance_scale at 1"):
            sample_codes(prior, text, seeds, SamplingOptions(guidance_scale=2.0))
        return
    codes = sample_codes(prior, text, seeds, SamplingOptions(temperature=0, guidance_scale=3.0)).clone()
    conditional = prior.image_logits(text, codes[:, 0])
    empty = prior.image_logits(prior.null_text().expand(3, -1), codes[:, 0])
    assert (conditional - empty).abs().amax(-1).min() > 1e-4
    expected = (empty + 3 * (conditional - empty)).argmax(-1)
    assert torch.equal(codes.flatten(1), expected)


@every_prior
def test_windows_sample_the_same_codes_or_raise(name: str) -> None:
    prior = tiny(name)
    text, seeds = captions(prior), torch.arange(6).view(3, 2)
    if type(prior).window_decoding is ImagePrior.window_decoding:
        with pytest.raises(
            ValueError, match=f"{type(prior).__name__} can only sample one token per pass: omit window"
        ):
            sample_codes(prior, text, seeds, window=4)
        return
    assert torch.equal(sample_codes(prior, text, seeds, window=4), sample_codes(prior, text, seeds))


@every_prior
def test_a_saved_prior_loads_equal(name: str, tmp_path: Any) -> None:
    prior = tiny(name)
    save_network(prior, PRIORS.name_of(type(prior)), tmp_path)
    back = load_prior(tmp_path)
    assert type(back) is type(prior)
    assert back.config == prior.config
    text, codes = captions(prior, 1), codes_of(prior, 1)
    assert torch.equal(back.image_logits(text, codes), prior.image_logits(text, codes))


@pytest.mark.parametrize("name", ["prior", "mindalle", "rudalle v3", "dalle_mini", "dalle_pytorch others"])
def test_sizes_beyond_the_weights_are_refused_at_once(name: str, tmp_path: Any) -> None:
    prior = tiny(name)
    save_network(prior, PRIORS.name_of(type(prior)), tmp_path)
    values, start = read_json(tmp_path / "config.json"), time.monotonic()
    sizes = [field for field, value in values.items() if type(value) is int and field not in IDS]
    bombs = [{field: size} for field in sizes for size in (60_000, 10**15)]
    bombs += [{field: values[field] + [1] * 100_000} for field in values if isinstance(values[field], list)]
    bombs += [{"masks": "row" + ", row" * 100_000}] if "masks" in values else []
    for bomb in bombs:
        write_json(tmp_path / "config.json", {**values, **bomb})
        with pytest.raises(ModelFolderError):
            load_prior(tmp_path)
    assert time.monotonic() - start < SECONDS


def test_a_type_that_is_not_a_prior_raises(tmp_path: Any) -> None:
    write_json(tmp_path / "config.json", {"type": "dvae"})
    with pytest.raises(ModelFolderError, match=r'expected "type": "prior"'):
        load_prior(tmp_path)
