"""Generates images from prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_zoo.call import BATCH_SIZE, Call, OutputType, check_callback, check_ids
from dalle_zoo.hub import Access
from dalle_zoo.image_settings import ImageSettings
from dalle_zoo.images import to_pil
from dalle_zoo.loading import load_component
from dalle_zoo.output import PipelineOutput
from dalle_zoo.progress_bar import progress_bar as with_progress_bar
from dalle_zoo.regions import ranks_by_likelihood
from dalle_zoo.sampling import SAMPLE, Callback, Progress, SamplingOptions, sample_codes
from dalle_zoo.scoring import ScoringModel
from dalle_zoo.tokenizers.words import note_unknown
from dalle_zoo.values import as_integer, check_type, suggests_arguments

# P prompts, N candidates of a prompt, B = P * N images, T text positions, h w code grid

log = logging.getLogger(__name__)


class DallePipeline(ScoringModel):
    """Generates images from prompts with a trained prior, its tokenizers, and a ranker that selects the best images.

    `from_pretrained` loads a pipeline; the constructor takes its components, see `PretrainedModel`.

    Example:
        >>> pipe = DallePipeline.from_pretrained("composition")
        >>> output = pipe("a 3d emoji of a red apple", num_images_per_prompt=2, rerank=1, seed=0)
        >>> [image.size for image in output.images]
        [(64, 64)]
        >>> pipe.score(output.images, ["a red apple"]).shape, pipe.log_likelihood(output.images, ["a red apple"]).shape
        (torch.Size([1]), torch.Size([1]))
        >>> ranked = pipe.rank_captions(output.images[0], ["a red apple", "a blue heart"])
        >>> ranked[0][1] >= ranked[1][1]  # log-likelihoods
        True
        >>> text, seeds = pipe.encode_text("a red apple"), torch.tensor([[0, 1]])
        >>> codes = pipe.sample(text, seeds, SamplingOptions(temperature=0.7))
        >>> pipe.decode(codes[0]).shape
        torch.Size([2, 3, 64, 64])
        >>> kept = pipe.kept_codes(output.images[0], prime_rows=4)
        >>> kept.shape == codes.shape[2:]
        True
    """

    def sample(
        self,
        text: Tensor,
        seeds: Tensor,
        options: SamplingOptions | None = None,
        *,
        given: Tensor | None = None,
        negative: Tensor | None = None,
        window: int | None = None,
        batch_size: int = BATCH_SIZE,
        callback: Callback | None = None,
    ) -> Tensor:
        """Samples the codes of N images per prompt; `decode` turns them into images.

        An image depends only on its text, its seed and the options: not on the batch size or on the other images.

        Args:
            text: Text ids from `encode_text`, int64 (P, T).
            seeds: One seed per image, int64 (P, N), for example from `derive_seed`.
            options: Temperature, filters and guidance. Defaults to plain sampling.
            given: Codes that the images of each prompt keep, int64 (P, h, w), or (h, w) for all prompts, with
                `SAMPLE` where to sample, for example from `kept_codes`. Defaults to none.
            negative: Text ids of negative prompts, int64 (P, T), which guidance leads away from. Defaults to the empty
                caption.
            window: Number of tokens that each pass guesses and checks, see `__call__`. Defaults to one token per pass.
            batch_size: Number of images generated at once; affects memory and time only. Defaults to 64.
            callback: Called after every pass with a `Progress`, whose codes are those of all batches. An exception
                that it raises ends the generation.

        Returns:
            Codes on the CPU, int64 (P, N, h, w).

        Raises:
            TypeError: Ids, seeds or codes are no int64 tensor, or a number is no integer.
            ValueError: A shape or a value does not fit the model.
        """
        batch_size = as_integer("batch_size", batch_size, least=1)
        window = None if window is None else as_integer("window", window, least=1)
        for name, ids in {"text": text, "seeds": seeds, "given": given, "negative": negative}.items():
            if ids is not None or name in ("text", "seeds"):
                check_ids(name, ids)
        check_type("options", options, (SamplingOptions, type(None)), "SamplingOptions")
        check_callback(callback)
        if seeds.ndim != 2 or len(seeds) != len(text):
            raise ValueError(f"seeds must have shape ({len(text)}, N), one row per prompt, got {tuple(seeds.shape)}")
        prompts, count = seeds.shape
        if given is not None and given.ndim == 2:
            given = given.expand(prompts, -1, -1)
        per_batch = max(batch_size // max(count, 1), 1)  # complete prompts while they fit, else parts of one prompt
        jobs = [
            (slice(p, min(p + per_batch, prompts)), slice(n, min(n + batch_size, count)))
            for p in range(0, prompts, per_batch)
            for n in range(0, count, batch_size)
        ]
        c = self.prior.config
        codes = torch.full((prompts, count, c.image_height, c.image_width), SAMPLE)
        for number, (p, n) in enumerate(jobs):
            sampled = sample_codes(
                self.prior,
                text[p].to(self.device),
                seeds[p, n].to(self.device),
                options,
                given=given[p].to(self.device) if given is not None else None,
                negative=negative[p].to(self.device) if negative is not None else None,
                window=window,
                callback=None if callback is None else _of_batch(callback, codes, (p, n), number, len(jobs)),
            )
            codes[p, n] = sampled.cpu()
        return codes

    @suggests_arguments
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        rerank: int | None = None,
        seed: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image: Image.Image | Tensor | None = None,
        mask: Image.Image | Tensor | None = None,
        prime_rows: int | None = None,
        given: Tensor | None = None,
        window: int | None = None,
        batch_size: int = BATCH_SIZE,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback: Callback | None = None,
        progress_bar: bool | None = None,
    ) -> Any:
        """Generates images.

        Logs a line per prompt that is empty or has words that the model never or hardly saw, where it knows its words,
        one if a prompt is longer than the model's text and was truncated, and one if all of an image is kept.

        Args:
            prompt: A prompt or a list of prompts.
            num_images_per_prompt: Number N of images to generate per prompt; at most 100,000 images in all. Defaults
                to 1.
            rerank: Number of images to keep per prompt, ranked, best first: by CLIP-style score or, if a mask keeps
                cells after sampled ones, by the log-likelihood of those cells, which sampling in raster order cannot
                see. Defaults to all of them, unranked.
            seed: Seed for sampling, or one seed per image. The same seed gives the same images for any batch size. A
                single seed is that of the first image, so a returned seed generates its image again.
            generator: Source of randomness instead of a seed: one generator for the call, or a list with one generator
                per image. Without seed and generator, the global generator is used, so `torch.manual_seed` applies.
            temperature: Divides the logits; 0 takes the most likely token. Defaults to the model's, see `sampling`;
                1 is that of the paper.
            top_k: Sample among the k most likely image tokens. Defaults to all tokens.
            top_p: Sample among the most likely image tokens whose probability reaches p. Defaults to all tokens.
            guidance_scale: Scale of classifier-free guidance; 1 is none. Defaults to the model's, see `sampling`.
            negative_prompt: Text that guidance leads away from, in place of the empty caption: one for all prompts or
                one for each. Defaults to none.
            image: Image of which a part is kept. Defaults to none.
            mask: Which part is generated again: white pixels, and every cell of the code grid that they touch; all
                other codes are kept. `shift_image` makes both for out-painting. Defaults to none.
            prime_rows: Without a mask, number of rows of the code grid to keep from the top (section 3.3; the paper
                keeps 15 of 32). Defaults to half of them.
            given: Codes to keep, int64 (h, w), with `SAMPLE` where to sample, instead of an image. Defaults to none.
            window: Number of tokens that each pass guesses and checks: the same images in fewer passes, which is
                faster for at most 4 images at once. Not every prior supports it. Defaults to one token per pass.
            batch_size: Number of images generated at once; affects memory and time only. Defaults to 64.
            output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W), or "latent" (codes, (B, h, w)). Defaults to
                "pil".
            return_dict: Whether to return a `PipelineOutput` instead of a tuple with the images. Defaults to True.
            callback: Called after every token, or every window, with a `Progress`: tokens sampled, tokens in total,
                and the codes so far, which `preview` decodes. An exception that it raises ends the generation. It is
                not diffusers' ``callback_on_step_end``: there are no timesteps, and it cannot change the sampling.
            progress_bar: Whether to show a progress bar on standard error. Defaults to whether it is a terminal.

        Returns:
            `PipelineOutput`, images of the first prompt first.

        Raises:
            TypeError: An argument is of another type, such as a prompt that is not a string or a list of strings.
            ValueError: An argument is out of range, or the model lacks what it needs.
        """
        options = self.sampling.options(
            temperature=temperature, top_k=top_k, top_p=top_p, guidance_scale=guidance_scale
        )
        call = Call(
            prompt, num_images_per_prompt, rerank=rerank, seed=seed, generator=generator, image=image, mask=mask,
            prime_rows=prime_rows, given=given, negative_prompt=negative_prompt, window=window, batch_size=batch_size,
            output_type=output_type, callback=callback, options=options,
        )  # fmt: skip
        if image is not None:
            given = self.kept_codes(image, mask=mask, prime_rows=call.prime_rows)
            if (given != SAMPLE).all():
                log.warning("the whole image is kept, so nothing is generated again: mark a part of the mask in white")
        if call.rerank is not None and not ranks_by_likelihood(given) and self.ranker is None:
            raise ValueError("rerank needs a ranker, and this model has none: omit rerank")
        seeds, text = call.seeds(), self.encode_text(call.prompts)
        note_unknown(call.prompts, self.tokenizer.words)
        with with_progress_bar(callback, shown=progress_bar) as report:
            codes = self.sample(
                text,
                seeds,
                options,
                given=given,
                negative=None if call.negative_prompt is None else self.encode_text(call.negative_prompt),
                window=call.window,
                batch_size=call.batch_size,
                callback=report,
            )
        scores, pixels = None, None
        if call.rerank is not None:
            chosen = self.select(call.prompts, text, codes, call.rerank, given, call.batch_size)
            scores, pixels = chosen.scores, chosen.images
            codes, seeds = codes.take_along_dim(chosen.best[..., None, None], 1), seeds.take_along_dim(chosen.best, 1)
        images = self._output(codes, pixels, output_type, call.batch_size)
        if not return_dict:
            return (images,)
        flat_scores = None if scores is None else scores.flatten()
        settings = self._settings(call, options, given, seeds, scores)
        return PipelineOutput(images, flat_scores, seeds.flatten(), settings)

    def common_settings(self, options: SamplingOptions, given: Tensor | None = None) -> dict[str, Any]:
        """Fields of `ImageSettings` that all images of a prompt share: the model and the options.

        Args:
            options: Temperature, filters and guidance.
            given: Codes that were kept, int64 (h, w), with `SAMPLE` elsewhere. Defaults to none.
        """
        return {
            **asdict(options),
            "model": self.location,
            "model_digest": self.digest,
            "given": None if given is None else tuple(map(tuple, given.tolist())),
            "dtype": str(self.prior_dtype).removeprefix("torch."),
            "quantize": self.quantized,
        }

    def _settings(
        self, call: Call, options: SamplingOptions, given: Tensor | None, seeds: Tensor, scores: Tensor | None
    ) -> list[ImageSettings]:
        """Returns the settings of every image, in the order of the images."""
        common = self.common_settings(options, given)
        negative: Sequence[str | None] = call.negative_prompt or [None] * len(call.prompts)
        rows = [[None] * seeds.shape[1]] * len(seeds) if scores is None else scores.tolist()
        return [
            ImageSettings(prompt=prompt, negative_prompt=other, seed=seed, score=score, **common)
            for prompt, other, row, some in zip(call.prompts, negative, seeds.tolist(), rows, strict=True)
            for seed, score in zip(row, some, strict=True)
        ]

    def _output(self, codes: Tensor, pixels: Tensor | None, output_type: OutputType, batch_size: int) -> Any:
        """Converts codes (P, N, h, w), or their pixels (P, N, 3, H, W) if ranking has decoded them, to the output."""
        if output_type == "latent":
            return codes.flatten(0, 1)
        images = self.decode(codes.flatten(0, 1), batch_size) if pixels is None else pixels.flatten(0, 1)
        if output_type == "pt":
            return images
        if output_type == "np":
            return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        return to_pil(images)

    def __repr__(self) -> str:
        height, width = self.image_size
        return f"DallePipeline({self.folder or 'not saved'}, {height}x{width} pixels, on {self.device})"


def _of_batch(callback: Callback, codes: Tensor, place: tuple[slice, slice], number: int, batches: int) -> Callback:
    """A callback of one batch that reports the tokens and the codes of all batches."""

    def report(progress: Progress) -> None:
        def read() -> Tensor:
            current = codes.clone()
            current[place] = progress.codes.cpu()
            return current

        callback(Progress(number * progress.total + progress.done, batches * progress.total, read))

    return report


@suggests_arguments
def load_model(
    location: str | Path | Sequence[str | Path],
    component: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    files: Sequence[str] = (),
) -> Any:
    """Loads a complete pipeline, or one component of it.

    Args:
        location: Name of a bundled model, a folder, or ``organization/name`` on the Hub, of which only the component
            is downloaded. Also weights of other code bases, as for `DallePipeline.from_pretrained`.
        component: "dvae", "prior", "ranker" or "tokenizer". Defaults to the pipeline.
        device: Device of the networks. Defaults to the CPU.
        dtype: Precision of a prior. Defaults to float32.
        revision: Branch, tag or commit of a model on the Hub. Defaults to the newest commit of the main branch.
        token: Access token of a user who may read the model. Defaults to the stored token.
        cache_dir: Directory of downloads. Defaults to the Hub's own cache.
        local_files_only: Whether to use only cached files. Defaults to False.
        files: Patterns of file names, as for `DallePipeline.from_pretrained`.

    Raises:
        UnknownNameError: There is no such component or model; the message suggests the most similar name.

    Example:
        >>> load_model("composition", "prior").config.image_height
        16
    """
    access = Access(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if component is None:
        return DallePipeline.from_pretrained(location, device=device, dtype=dtype, files=files, **asdict(access))
    return load_component(location, component, access, device=device, dtype=dtype, files=files)
