"""Generates images from prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dalle_zoo.call import BATCH_SIZE, Call, OutputType, check_prime
from dalle_zoo.hub import Access
from dalle_zoo.images import from_pil, to_pil, to_rgb
from dalle_zoo.loading import PretrainedModel, load_component
from dalle_zoo.sampling import SAMPLE, Callback, Progress, SamplingOptions, sample_codes
from dalle_zoo.values import as_integer

# P prompts, N candidates of a prompt, B = P * N images, T text positions, h w code grid


@dataclass(frozen=True)
class PipelineOutput:
    """Result of a call of the pipeline."""

    images: Any
    """Images, those of the first prompt first: a list of PIL images, an array (B, H, W, 3) or a tensor (B, 3, H, W) in
    [0, 1], or codes (B, h, w), depending on ``output_type``."""
    scores: Tensor | None = None
    """The ranker's score of every returned image, (B,), best first within a prompt; None without reranking."""
    seeds: Tensor | None = None
    """Seed of every returned image, int64 (B,). `DallePipeline.sample` generates an image again from its seed."""


class DallePipeline(PretrainedModel):
    """Generates images from prompts with a trained prior, its tokenizers, and a ranker that selects the best images.

    `from_pretrained` loads a pipeline; the constructor takes its components, see `PretrainedModel`.

    Example:
        >>> pipe = DallePipeline.from_pretrained("emoji64")  # doctest: +SKIP
        >>> pipe("a 3d emoji of a red apple", num_images_per_prompt=16, rerank=4).images  # doctest: +SKIP
    """

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Encodes prompts to padded text ids, int64 (P, T), on the device of the model."""
        return self.prior.encode_captions(self.tokenizer, prompts).to(self.device)

    def prime_codes(self, image: Image.Image | Tensor, rows: int) -> Tensor:
        """Encodes the top rows of an image, which sampling then continues (section 3.3).

        Args:
            image: A PIL image, resized and cropped to the model's size, or pixels in [0, 1], (3, H, W).
            rows: Rows of the code grid to keep, 1 to the grid's height.

        Returns:
            Codes for `sample`, int64 (1, h, w): those of the image in the rows to keep, `SAMPLE` below.

        Raises:
            TypeError: The image is neither a PIL image nor a tensor of floating-point numbers.
            ValueError: The rows, the shape of the image or its pixels do not fit the model.
        """
        rows = as_integer(
            "prime_rows", rows, least=1, most=self.prior.config.image_height, meaning=" (rows of the code grid)"
        )
        pixels = self.image_size
        check_prime(image)
        if isinstance(image, Image.Image):
            image = from_pil(ImageOps.fit(to_rgb(image), (pixels[1], pixels[0]), Image.Resampling.LANCZOS))
        if image.shape != (3, *pixels):  # codes of another size would fill the wrong cells
            raise ValueError(f"prime must be a PIL image or have shape {(3, *pixels)}, got {tuple(image.shape)}")
        with torch.inference_mode():
            codes = self.image_tokenizer.encode(image[None].to(self.device))
        codes = codes.clone()
        codes[:, rows:] = SAMPLE
        return codes

    def sample(
        self,
        text: Tensor,
        seeds: Tensor,
        options: SamplingOptions | None = None,
        *,
        given: Tensor | None = None,
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
            given: Codes that the images of each prompt keep, int64 (P, h, w), or (1, h, w) for all prompts, with
                `SAMPLE` where to sample, for example from `prime_codes`. Defaults to none.
            window: Number of tokens that each pass guesses and checks, see `__call__`. Defaults to one token per pass.
            batch_size: Number of images generated at once; affects memory and time only. Defaults to 64.
            callback: Called after every pass with a `Progress`, whose codes are those of all batches. An exception
                that it raises ends the generation.

        Returns:
            Codes on the CPU, int64 (P, N, h, w).

        Raises:
            ValueError: A shape or a value does not fit the model.
        """
        batch_size = as_integer("batch_size", batch_size, least=1)
        if seeds.ndim != 2 or len(seeds) != len(text):
            raise ValueError(f"seeds must have shape ({len(text)}, N), one row per prompt, got {tuple(seeds.shape)}")
        prompts, count = seeds.shape
        if given is not None and len(given) == 1:
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
                window=window,
                callback=None if callback is None else _of_batch(callback, codes, (p, n), number, len(jobs)),
            )
            codes[p, n] = sampled.cpu()
        return codes

    def decode(self, codes: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
        """Decodes codes, int64 (B, h, w), to pixels in [0, 1] on the CPU, (B, 3, H, W)."""
        with torch.inference_mode():
            parts = [
                self.image_tokenizer.decode(codes[start : start + batch_size].to(self.device)).cpu()
                for start in range(0, len(codes), batch_size)
            ]
        return torch.cat(parts)

    def preview(self, codes: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
        """Decodes codes that are not complete, such as those of a `Progress`.

        Args:
            codes: Codes, int64 (B, h, w), with `SAMPLE` at the cells that are not sampled yet.
            batch_size: Number of images decoded at once. Defaults to 64.

        Returns:
            Pixels in [0, 1] on the CPU, (B, 3, H, W), gray at the cells that are not sampled yet.
        """
        images = self.decode(codes.clamp(min=0), batch_size)
        missing = (codes == SAMPLE).cpu().float()[:, None]
        missing = torch.nn.functional.interpolate(missing, images.shape[2:], mode="nearest")
        return torch.where(missing > 0, torch.tensor(0.5), images)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        rerank: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        prime: Image.Image | Tensor | None = None,
        prime_rows: int | None = None,
        window: int | None = None,
        batch_size: int = BATCH_SIZE,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback: Callback | None = None,
    ) -> Any:
        """Generates images.

        Args:
            prompt: A prompt or a list of prompts.
            num_images_per_prompt: Number N of images to generate per prompt. Defaults to 1.
            rerank: Number of images to keep per prompt, ranked by CLIP-style score, best first. Defaults to all of
                them, unranked.
            seed: Seed for sampling. The same seed gives the same images for any batch size.
            generator: Source of randomness instead of a seed: one generator for the call, or a list with one generator
                per image. Without seed and generator, the global generator is used, so `torch.manual_seed` applies.
            temperature: Divides the logits; 0 takes the most likely token. Defaults to 1.
            top_k: Sample among the k most likely image tokens. Defaults to all tokens.
            top_p: Sample among the most likely image tokens whose probability reaches p. Defaults to all tokens.
            guidance_scale: Scale of classifier-free guidance. Defaults to 1, no guidance.
            prime: Image whose top rows are kept. Defaults to none.
            prime_rows: Number of rows of the code grid to keep (the paper keeps 15 of 32). Defaults to half of them.
            window: Number of tokens that each pass guesses and checks: the same images in fewer passes, which is
                faster for at most 4 images at once. Not every prior supports it. Defaults to one token per pass.
            batch_size: Number of images generated at once; affects memory and time only. Defaults to 64.
            output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W), or "latent" (codes, (B, h, w)). Defaults to
                "pil".
            return_dict: Whether to return a `PipelineOutput` instead of a tuple with the images. Defaults to True.
            callback: Called after every token, or every window, with a `Progress`: tokens sampled, tokens in total,
                and the codes so far, which `preview` decodes. An exception that it raises ends the generation. It is
                not diffusers' ``callback_on_step_end``: there are no timesteps, and it cannot change the sampling.

        Returns:
            `PipelineOutput`, images of the first prompt first.

        Raises:
            TypeError: An argument is of another type, such as a prompt that is not a string or a list of strings.
            ValueError: An argument is out of range, or the model lacks what it needs.
        """
        call = Call(
            prompt, num_images_per_prompt, rerank, seed, generator, prime, prime_rows, window, batch_size, output_type
        )
        options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, guidance_scale=guidance_scale)
        if call.rerank is not None and self.ranker is None:
            raise ValueError("rerank needs a ranker, and this model has none: omit rerank")
        primed = self._primed(call)
        seeds = call.seeds()
        codes = self.sample(
            self.encode_text(call.prompts),
            seeds,
            options,
            given=primed,
            window=call.window,
            batch_size=call.batch_size,
            callback=callback,
        )
        scores = None
        if call.rerank is not None:
            codes, seeds, scores = self._rerank(call.prompts, codes, seeds, call.rerank, call.batch_size)
        images = self._output(codes.flatten(0, 1), output_type, call.batch_size)
        if not return_dict:
            return (images,)
        return PipelineOutput(images, None if scores is None else scores.flatten(), seeds.flatten())

    def _primed(self, call: Call) -> Tensor | None:
        """Codes that every image keeps, int64 (1, h, w); None without an image."""
        if call.prime is None:
            return None
        rows = call.prime_rows if call.prime_rows is not None else max(self.prior.config.image_height // 2, 1)
        return self.prime_codes(call.prime, rows)

    def _rerank(
        self, prompts: list[str], codes: Tensor, seeds: Tensor, keep: int, batch_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Best ``keep`` candidates of every prompt: codes (P, keep, h, w), seeds and scores (P, keep)."""
        assert self.ranker is not None
        best_codes, best_seeds, best_scores = [], [], []
        for number, caption in enumerate(prompts):
            with torch.inference_mode():
                images = self.decode(codes[number], batch_size).to(self.device)
                scores = self.ranker.scores(images, [caption] * len(images)).cpu()
            best = scores.argsort(descending=True, stable=True)[:keep]
            best_codes.append(codes[number, best])
            best_seeds.append(seeds[number, best])
            best_scores.append(scores[best])
        return torch.stack(best_codes), torch.stack(best_seeds), torch.stack(best_scores)

    def _output(self, codes: Tensor, output_type: OutputType, batch_size: int) -> Any:
        if output_type == "latent":
            return codes
        images = self.decode(codes, batch_size)
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
        >>> load_model("emoji64", "prior").config.image_height
        8
    """
    access = Access(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if component is None:
        return DallePipeline.from_pretrained(location, device=device, dtype=dtype, files=files, **asdict(access))
    return load_component(location, component, access, device=device, dtype=dtype, files=files)
