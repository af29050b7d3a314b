"""Regions that a pipeline keeps, negative prompts, likelihoods, and the settings of ranked images."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dalle_zoo import DallePipeline
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior
from dalle_zoo.regions import cells_to_sample, following, shift_image
from dalle_zoo.sampling import SAMPLE, SamplingOptions, sample_codes, token_log_likelihood
from dalle_zoo.tokenizers import ByteTokenizer

HEIGHT, WIDTH = 12, 16  # pixels: 3 x 4 codes of 4 pixels
SUMS = 1e-5
"""Sums of a few logarithms in another order."""


class Brightness(nn.Module):
    """A ranker that prefers bright images."""

    def scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3)) + torch.tensor([float(len(caption)) for caption in captions])


@pytest.fixture
def pipe(random_prior: Callable[..., Prior]) -> DallePipeline:
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=12, width=4, num_groups=3, decoder_stem=4, codebook_size=7))
    nn.init.normal_(dvae.decoder.input.weight)  # stands for training: codes that look different
    return DallePipeline(dvae, random_prior(text_vocab=256, text_length=6), ByteTokenizer(), Brightness())  # type: ignore[arg-type]


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8))


def white(*cells: tuple[int, int]) -> Image.Image:
    """A mask with one white pixel in each of these cells."""
    mask = Image.new("L", (WIDTH, HEIGHT))
    for row, column in cells:
        mask.putpixel((4 * column + 1, 4 * row + 2), 255)
    return mask


# ------------------------------------------------------------ kept cells


@pytest.mark.parametrize(
    ("cells", "options"),
    [
        ([(0, 0)], {}),
        ([(1, 1), (1, 2)], {"window": 3, "batch_size": 2}),
        ([(2, 3)], {"guidance_scale": 2.0}),
        ([(0, 3), (2, 0)], {"rerank": 2}),
    ],
)
def test_cells_that_the_mask_does_not_touch_are_kept(
    pipe: DallePipeline, photo: Image.Image, cells: list[tuple[int, int]], options: dict[str, Any]
) -> None:
    original, mask = pipe.encode_image(photo), white(*cells)
    touched = cells_to_sample(mask, (HEIGHT, WIDTH), (3, 4))
    assert touched.nonzero().tolist() == sorted(map(list, cells))
    common: dict[str, Any] = {"num_images_per_prompt": 4, "seed": 3, "output_type": "latent", **options}
    out = pipe(["ab", "c"], image=photo, mask=mask, **common)
    assert torch.equal(out.images[:, ~touched], original[~touched].expand(len(out.images), -1))
    assert len(out.images[:, touched].unique(dim=0)) > 1
    given = torch.where(touched, SAMPLE, original)
    assert torch.equal(pipe(["ab", "c"], given=given, **common).images, out.images)
    assert all(torch.equal(settings.given_codes(), given) for settings in out.settings)


def test_an_image_is_continued_beyond_its_frame(pipe: DallePipeline, photo: Image.Image) -> None:
    moved, mask = shift_image(photo, -4, 4)
    out = pipe("ab", num_images_per_prompt=4, seed=3, image=moved, mask=mask, output_type="latent")
    assert torch.equal(out.images[:, 1:, :3], pipe.encode_image(moved)[1:, :3].expand(4, -1, -1))
    assert len(out.images[:, 0].unique(dim=0)) > 1


def test_candidates_are_ranked_by_the_kept_cells_that_follow(pipe: DallePipeline, photo: Image.Image) -> None:
    options: dict[str, Any] = {
        "num_images_per_prompt": 6, "seed": 3, "image": photo, "mask": white((1, 1), (1, 2)), "output_type": "latent",
    }  # fmt: skip
    everything, best = pipe(["ab", "c"], **options), pipe(["ab", "c"], rerank=2, **options)
    text = pipe.encode_text(["ab", "c"]).repeat_interleave(6, 0)
    after = torch.arange(12).view(3, 4) > 6  # the cells after the last sampled one
    assert following(everything.settings[0].given_codes()).equal(after)
    values = token_log_likelihood(pipe.prior, text, everything.images)[:, after].sum(1)
    for p in range(2):
        order = values[6 * p : 6 * p + 6].argsort(descending=True, stable=True)[:2]
        at = slice(2 * p, 2 * p + 2)
        torch.testing.assert_close(best.scores[at], values[6 * p + order], atol=SUMS, rtol=0)
        assert torch.equal(best.seeds[at], everything.seeds[6 * p + order])
        assert torch.equal(best.images[at], everything.images[6 * p + order])


def test_without_kept_cells_that_follow_the_ranker_decides(pipe: DallePipeline, photo: Image.Image) -> None:
    out = pipe("ab", num_images_per_prompt=4, rerank=4, seed=3, image=photo, mask=white((2, 3)), output_type="pt")
    torch.testing.assert_close(out.scores, out.images.mean((1, 2, 3)) + 2, atol=SUMS, rtol=0)
    with pytest.raises(ValueError, match="rerank needs a ranker"):
        DallePipeline(pipe.image_tokenizer, pipe.prior, pipe.tokenizer)("ab", num_images_per_prompt=2, rerank=1)


def test_given_codes_are_one_grid(pipe: DallePipeline) -> None:
    with pytest.raises(ValueError, match=r"given must have shape \(h, w\), the same for all prompts, got \(1, 3, 4\)"):
        pipe("ab", given=torch.zeros(1, 3, 4, dtype=torch.long))


# ------------------------------------------------------------ settings


@pytest.mark.parametrize("mask", [None, white((0, 1))], ids=["ranker", "likelihood"])
def test_settings_of_ranked_images_give_them_again(
    pipe: DallePipeline, photo: Image.Image, mask: Image.Image | None
) -> None:
    region = {} if mask is None else {"image": photo, "mask": mask}
    out = pipe(["ab", "c"], num_images_per_prompt=5, rerank=2, seed=3, temperature=0.8, **region)
    assert [(s.prompt, s.seed) for s in out.settings] == [
        (prompt, seed) for prompt, seed in zip(["ab", "ab", "c", "c"], out.seeds.tolist(), strict=True)
    ]
    assert [s.score for s in out.settings] == out.scores.tolist()
    assert out.settings[0].score >= out.settings[1].score  # type: ignore[operator]
    for image, settings in zip(out.images, out.settings, strict=True):
        again = pipe(settings.prompt, seed=settings.seed, temperature=0.8, given=settings.given_codes())
        assert np.array_equal(np.asarray(again.images[0]), np.asarray(image))
    unranked = pipe("ab", num_images_per_prompt=2, seed=3)
    assert [(s.seed, s.score) for s in unranked.settings] == [(seed, None) for seed in unranked.seeds.tolist()]


# ------------------------------------------------------------ negative prompts


def test_an_empty_negative_prompt_is_the_usual_guidance(pipe: DallePipeline) -> None:
    def codes(**options: Any) -> Tensor:
        images: Tensor = pipe(
            ["ab", "c"], num_images_per_prompt=3, seed=3, guidance_scale=4.0, output_type="latent", **options
        ).images
        return images

    assert torch.equal(codes(negative_prompt=""), codes())
    assert torch.equal(codes(negative_prompt=["", ""]), codes())
    other = codes(negative_prompt="zz")
    assert not torch.equal(other, codes())
    assert torch.equal(codes(negative_prompt=["", "zz"]), torch.cat([codes()[:3], other[3:]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "negative_prompt acts through guidance: set guidance_scale"),
        (
            {"negative_prompt": ["a", "b"], "guidance_scale": 2.0},
            "negative_prompt must be one text, or one for each of 3",
        ),
    ],
)
def test_negative_prompts_that_cannot_act(pipe: DallePipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(["a", "b", "c"], **{"negative_prompt": "x", **options})


# ------------------------------------------------------------ both directions


def test_scores_are_those_of_the_ranker(pipe: DallePipeline, photo: Image.Image) -> None:
    pixels = torch.rand(2, 3, HEIGHT, WIDTH)
    expected = pixels.mean((1, 2, 3)) + torch.tensor([1.0, 3.0])
    torch.testing.assert_close(pipe.score(pixels, ["a", "abc"]), expected, atol=SUMS, rtol=0)
    large = photo.resize((10 * WIDTH, 10 * HEIGHT))
    assert pipe.score([large, photo], ["a", "a"]).shape == (2,)
    with pytest.raises(ValueError, match="expected one text per image, got 2 images and 1 texts"):
        pipe.score(pixels, "ab")
    with pytest.raises(ValueError, match=r"image must have pixels in \[0, 1\], got 0..255"):
        pipe.score(255 * pixels.round(), ["a", "b"])
    without = DallePipeline(pipe.image_tokenizer, pipe.prior, pipe.tokenizer)
    with pytest.raises(ValueError, match="has no ranker: log_likelihood scores images by the prior"):
        without.score(pixels, ["a", "b"])


def test_likelihoods_are_those_of_the_prior(pipe: DallePipeline, photo: Image.Image) -> None:
    other = Image.new("RGB", (30, 20), "red")
    values = pipe.log_likelihood([photo, other], ["ab", "c"])
    for value, image, text in zip(values, (photo, other), ("ab", "c"), strict=True):
        codes = pipe.encode_image(image)[None]
        logits = pipe.prior.image_logits(pipe.encode_text([text]), codes)[0].log_softmax(-1).detach()
        expected = sum(float(logits[place, code]) for place, code in enumerate(codes.flatten().tolist()))
        assert abs(float(value) - expected) < SUMS
    with pytest.raises(ValueError, match="expected one text per image, got 1 images and 2 texts"):
        pipe.log_likelihood([photo], ["a", "b"])


def test_captions_are_ranked_by_likelihood(pipe: DallePipeline, photo: Image.Image) -> None:
    captions = ["ab", "c", "", "dd"]
    ranked = pipe.rank_captions(photo, captions)
    expected = dict(zip(captions, pipe.log_likelihood([photo] * 4, captions).tolist(), strict=True))
    assert [caption for caption, _ in ranked] == sorted(captions, key=lambda caption: -expected[caption])
    assert dict(ranked) == pytest.approx(expected, abs=SUMS)
    for wrong in ([], None, ["a", 1]):
        with pytest.raises(TypeError, match="captions must be a string or a non-empty list of strings"):
            pipe.rank_captions(photo, wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------ what a call says


def test_a_prompt_that_is_truncated_says_so(pipe: DallePipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        long = pipe("a long prompt", seed=1, output_type="latent")
    assert any("captions truncated to 6 tokens: 1 so far, 1 in this batch, the first 'a long prompt' with 13" in m
               for m in caplog.messages)  # fmt: skip
    assert torch.equal(long.images, pipe("a long", seed=1, output_type="latent").images)


def test_a_progress_bar_is_shown_on_a_terminal(
    pipe: DallePipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    common: dict[str, Any] = {"seed": 1, "output_type": "latent"}
    plain = pipe("ab", **common).images
    assert capsys.readouterr().err == ""
    shown = pipe("ab", progress_bar=True, callback=lambda progress: calls.append(progress.done), **common).images
    assert torch.equal(shown, plain)
    assert calls == list(range(1, 13))
    assert "12/12" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    pipe("ab", **common)
    assert "sampling" in capsys.readouterr().err
    pipe("ab", progress_bar=False, **common)
    assert capsys.readouterr().err == ""


def test_a_sample_of_a_call_is_that_of_the_decode_loop(pipe: DallePipeline) -> None:
    negative = pipe.encode_text(["zz"])
    out = pipe("ab", num_images_per_prompt=2, seed=1, guidance_scale=3.0, negative_prompt="zz", output_type="latent")
    options = SamplingOptions(guidance_scale=3.0)
    again = sample_codes(pipe.prior, pipe.encode_text(["ab"]), out.seeds[None], options, negative=negative)
    assert torch.equal(again[0], out.images)
