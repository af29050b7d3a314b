"""Prompt in, images out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dalle_zoo.files import new_folder, read_json, write_json
from dalle_zoo.hub import Access
from dalle_zoo.images import from_pil, to_pil, to_rgb
from dalle_zoo.model_folder import (
    COMPONENTS,
    CONVERSION,
    INDEX,
    RECORD,
    ModelFolderError,
    verify_checksums,
    write_checksums,
    write_index,
)
from dalle_zoo.models.image_prior import PRIORS, ImagePrior
from dalle_zoo.models.quantization import Bits, is_quantized
from dalle_zoo.models.quantization import quantize as quantize_weights
from dalle_zoo.models.ranker import Ranker
from dalle_zoo.models.tokenizer import IMAGE_TOKENIZERS, ImageTokenizer
from dalle_zoo.networks import load_image_tokenizer, load_prior, save_network
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo.sampling import Sampler, derive_seed, sample_codes
from dalle_zoo.sampling.jacobi import MAX_IMAGES
from dalle_zoo.tokenizers import TextTokenizer, load_text_tokenizer
from dalle_zoo.weights import SHARD_BYTES
from dalle_zoo.zoo import find_component, find_model

# P prompts, N candidates of a prompt, B = P * N images, h w code grid

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class PipelineOutput:
    """What a call returns."""

    images: Any
    """Images prompt by prompt: a list of PIL images, an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1], or
    codes (B, h, w), as asked."""
    scores: Tensor | None = None
    """The ranker's score of every returned image, (B,), best first within a prompt; None without reranking."""
    seeds: Tensor | None = None
    """Seed of every returned image, int64 (B,)."""


class DallePipeline:
    """Text to images with a trained prior, its tokenizers, and a ranker that picks the best.

    Args:
        image_tokenizer: Images to codes and back.
        prior: Codes from captions.
        tokenizer: Captions to ids.
        ranker: Scores images against captions; needed only for ``rerank``.
        folder: Where the model lies; a ranker is then read from it when it is first needed.

    Example:
        >>> pipe = DallePipeline.from_pretrained("emoji64")  # doctest: +SKIP
        >>> pipe("a 3d emoji of a red apple", num_images_per_prompt=16, rerank=4).images  # doctest: +SKIP
    """

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        prior: ImagePrior,
        tokenizer: TextTokenizer,
        ranker: Ranker | None = None,
        folder: Path | None = None,
    ) -> None:
        self.image_tokenizer, self.prior, self.tokenizer = image_tokenizer.eval(), prior.eval(), tokenizer
        self.folder = folder
        self._ranker = ranker
        self._check_parts()

    def _check_parts(self) -> None:
        c, t = self.prior.config, self.image_tokenizer
        if c.codebook_size != t.codebook_size:
            raise ValueError(
                f"the prior has {c.codebook_size} image tokens, the image tokenizer {t.codebook_size} codes: "
                "they were not trained together"
            )
        if not t.decodes:
            raise ValueError(
                f"the image tokenizer ({type(t).__name__}) has no decoder, so no image can be generated: "
                "convert it again with its decoder, see docs/convert.md"
            )
        self.prior.check_tokenizer(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.prior.device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        c, factor = self.prior.config, self.image_tokenizer.factor
        return c.image_height * factor, c.image_width * factor

    @cached_property
    def ranker(self) -> Ranker | None:
        """The ranker, read when it is first needed because it imports transformers; None if there is none."""
        if self._ranker is not None:
            return self._ranker.to(self.device)
        if self.folder is None or not (self.folder / "ranker").is_dir():
            return None
        return Ranker.from_folder(self.folder / "ranker").to(self.device)

    # ------------------------------------------------------------ files

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Sequence[str | Path],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        files: Sequence[str] = (),
        verify: bool = True,
        quantize: Bits | None = None,
    ) -> DallePipeline:
        """Loads a model.

        Args:
            model: Name of a bundled model, a folder that `save_pretrained` or ``dalle-zoo export`` wrote, or
                ``organisation/name`` on the Hub. See `find_model` for which comes first. Weights of another code base
                (docs/convert.md) are converted when they are first loaded; where theirs lie in several places, all.
            device: Where to put the networks. Defaults to the CPU.
            dtype: Precision of the prior. Defaults to float32.
            revision: Of a model on the Hub: branch, tag or commit. Defaults to the newest of the main branch.
            token: Of a user who may read it. Defaults to the stored one.
            cache_dir: Where downloads lie. Defaults to the Hub's own cache.
            local_files_only: Whether only the cache is asked.
            files: Of another code base, patterns of the file names to look at ("*_mini.pt"). Defaults to all.
            verify: Whether every file is checked against its sha256.
            quantize: "int8" or "int4": precision of the matrices of the prior's layers, see `quantize`. Stored as they
                are by default.

        Raises:
            UnknownNameError: No such model; the message has the nearest name.
            HubError: The Hub does not have it, or cannot be reached; the message says which.
            FileError: A file is missing, damaged, or does not fit.
            WeightFileError: Weights of another code base are damaged, or not all that a pipeline needs.
        """
        access = Access(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        folder = find_model(model, access, files)
        if not (folder / INDEX).is_file():
            raise ModelFolderError(_incomplete(folder))
        if verify:
            verify_checksums(folder)
        prior = load_prior(folder / "prior", device, dtype)
        if quantize is not None:
            quantize_weights(prior, quantize)
        image_tokenizer = load_image_tokenizer(folder / "dvae", device)
        return cls(image_tokenizer, prior, load_text_tokenizer(folder / "tokenizer"), folder=folder)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> DallePipeline:
        """Moves the networks; ``dtype`` concerns the prior, whose logits are sampled in float32 all the same."""
        self.image_tokenizer.to(device=device)
        self.prior.to(device=device, dtype=dtype)
        if "ranker" in self.__dict__ and self.ranker is not None:
            self.ranker.to(device=device)
        return self

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        record: Mapping[str, str] | None = None,
        shard_bytes: int = SHARD_BYTES,
        overwrite: bool = False,
    ) -> Path:
        """Writes a folder that `from_pretrained` opens, written atomically.

        Args:
            folder: Where to; must be new or empty unless ``overwrite``.
            dtype: Precision of the stored weights of the prior. Stored as they are by default.
            record: What `list_models` says of it: ``description``, ``license`` and ``data``; as in the folder that
                the model came from if missing.
            shard_bytes: Above this size the weights of the prior lie in several files.
            overwrite: Whether an existing model is replaced; a folder of other files never is.
        """
        if is_quantized(self.prior):
            raise ValueError("weights that were rounded to fewer bits are not saved: save the model as it was loaded")
        ranker, known = self.ranker, self._record()  # before the folder may be replaced
        with new_folder(Path(folder), overwrite=overwrite, marker=INDEX) as new:
            for name in COMPONENTS[: 4 if ranker is not None else 3]:
                (new / name).mkdir()
            # In full precision whatever the prior's: a code is an argmax, and must be the one of training.
            tokenizer_type = IMAGE_TOKENIZERS.name_of(type(self.image_tokenizer))
            save_network(self.image_tokenizer, tokenizer_type, new / "dvae")
            prior_type = PRIORS.name_of(type(self.prior))
            save_network(self.prior, prior_type, new / "prior", dtype, shard_bytes=shard_bytes)
            self.tokenizer.save(new / "tokenizer")
            if ranker is not None:
                ranker.save(new / "ranker")
            write_index(new)
            write_json(new / RECORD, {**known, **(record or {}), "parameters": self.num_parameters()})
            write_checksums(new)
        return Path(folder)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        results: Sequence[str | Path] = (),
        record: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Publishes the model on the Hub as one commit, with a card rendered from its record and result files.

        Args:
            name: ``organisation/name``; made if it is not there.
            private: Whether it is for its owners alone.
            revision: Branch to commit to. Defaults to the main one.
            token: Of a user who may write. Defaults to the stored one.
            results: Result files of ``dalle-zoo eval`` for these weights.
            record: As for `save_pretrained`; a license and the data must be stated.
            dtype: Precision of the stored weights of the prior. Stored as they are by default.

        Returns:
            Address of the commit.

        Raises:
            HubError: The Hub refuses, or cannot be reached; what it held is as it was.
            ValueError: The record says too little, or a result belongs to other weights.
        """
        from tempfile import TemporaryDirectory

        from dalle_zoo.hub import upload
        from dalle_zoo.publish import prepare

        with TemporaryDirectory() as folder:
            saved = self.save_pretrained(Path(folder) / name.rpartition("/")[2], dtype=dtype, record=record)
            files = prepare(saved, name, results=results).files
            return upload(name, files, private=private, revision=revision, token=token)

    def _record(self) -> dict[str, Any]:
        path = self.folder / RECORD if self.folder is not None else None
        if path is not None and path.is_file():
            return read_json(path)
        return {"description": "", "license": "unknown", "data": "unknown"}

    def num_parameters(self) -> dict[str, int]:
        """Parameters of every network."""
        nets = {"dvae": self.image_tokenizer, "prior": self.prior, "ranker": self.ranker}
        return {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items() if net is not None}

    # ------------------------------------------------------------ images

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Captions to padded ids, int64 (P, T)."""
        return self.prior.encode_captions(self.tokenizer, prompts).to(self.device)

    def prime_codes(self, image: Image.Image | Tensor, rows: int) -> Tensor:
        """Codes of the top rows of an image, which sampling then continues (section 3.3).

        Args:
            image: A PIL image, resized and cropped to the model's size, or pixels in [0, 1], (3, H, W).
            rows: Rows of the code grid to keep, 1 to the grid's height.

        Returns:
            int64 (1, rows * w).
        """
        height = self.prior.config.image_height
        if not 1 <= rows <= height:
            raise ValueError(f"prime_rows must lie in 1..{height} (rows of the code grid), got {rows}")
        pixels = self.image_size
        if isinstance(image, Image.Image):
            image = from_pil(ImageOps.fit(to_rgb(image), (pixels[1], pixels[0]), Image.Resampling.LANCZOS))
        if image.shape != (3, *pixels):  # codes of another size would fill the wrong cells
            raise ValueError(f"prime must be a PIL image or have shape {(3, *pixels)}, got {tuple(image.shape)}")
        with torch.inference_mode():
            codes = self.image_tokenizer.encode(image[None].to(self.device))
        return codes[:, :rows].flatten(1)

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
        guidance: float = 1.0,
        prime: Image.Image | Tensor | None = None,
        prime_rows: int | None = None,
        window: int | None = None,
        batch_size: int = 64,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Generates images.

        Args:
            prompt: One caption or several.
            num_images_per_prompt: Candidates N of each caption.
            rerank: Keep so many of each caption's candidates, those that the ranker scores best, best first.
            seed: Seed of the call: the same seed gives the same images, whatever the batch size.
            generator: Instead of a seed: one generator for the call, or one per image in the order of the images.
                Without seed and generator the global one is sampled from, so `torch.manual_seed` holds.
            temperature: Divides the logits; 0 takes the most likely token.
            top_k: Sample among the k most likely image tokens.
            top_p: Sample among the most likely image tokens that together reach this probability.
            guidance: Classifier-free guidance; 1 is none.
            prime: Image whose top rows are kept.
            prime_rows: Rows of the code grid that are kept (the paper keeps 15 of 32). Defaults to half of the grid.
            window: Run so many tokens at once, the later ones guessed, until every guess is right: the same images
                in fewer passes, sooner for one or two at a time; at most 4. Not every type of prior can.
            batch_size: Images generated at once; changes memory and time, not the images.
            output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W), or "latent" (codes, (B, h, w)).
            return_dict: False returns a tuple with the images alone.
            callback: Called after every token, or every window, with (tokens done, tokens in all) of the complete
                call.

        Returns:
            `PipelineOutput`, images of the first prompt first.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = num_images_per_prompt
        self._check_call(prompts, count, rerank, output_type, batch_size, window)
        if prime is None and prime_rows is not None:
            raise ValueError("prime_rows needs prime, the image whose top rows are kept")
        sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        seeds = self._seeds(prompts, count, seed, generator)
        primed = None
        if prime is not None:
            rows = prime_rows if prime_rows is not None else max(self.prior.config.image_height // 2, 1)
            primed = self.prime_codes(prime, rows)
        codes = self._sample(self.encode_text(prompts), seeds, sampler, primed, guidance, window, batch_size, callback)
        scores = None
        if rerank is not None:
            codes, seeds, scores = self._rerank(prompts, codes, seeds, rerank, batch_size)
        images = self._output(codes.flatten(0, 1), output_type, batch_size)
        if not return_dict:
            return (images,)
        return PipelineOutput(images, None if scores is None else scores.flatten(), seeds.flatten())

    def _check_call(
        self,
        prompts: list[str],
        count: int,
        rerank: int | None,
        output_type: str,
        batch_size: int,
        window: int | None,
    ) -> None:
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise TypeError(f"prompt must be a string or a non-empty list of strings, got {prompts!r}")
        for name, value in (("num_images_per_prompt", count), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        at_once = min(batch_size, len(prompts) * count)
        if window is not None and at_once > MAX_IMAGES:
            raise ValueError(
                f"windows pay for at most {MAX_IMAGES} images at once, got {at_once}: leave window away, "
                f"which is faster, or set batch_size to 1..{MAX_IMAGES}"
            )
        if rerank is not None:
            if not 1 <= rerank <= count:
                raise ValueError(
                    f"rerank must lie in 1..num_images_per_prompt ({count}), got {rerank}: it is how many are kept"
                )
            if self.ranker is None:
                raise ValueError("rerank needs a ranker, and this model has none: leave rerank away")

    def _seeds(
        self,
        prompts: list[str],
        count: int,
        seed: int | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
    ) -> Tensor:
        """One seed per image, int64 (P, N)."""
        total = len(prompts) * count
        if seed is not None and generator is not None:
            raise ValueError("give seed or generator, not both")
        if isinstance(generator, Sequence):
            if len(generator) != total:
                raise ValueError(f"expected {total} generators, one per image, got {len(generator)}")
            flat = [_random_seed(g) for g in generator]
        else:
            base = seed if seed is not None else _random_seed(generator)
            flat = [derive_seed(base, p, i) for p in range(len(prompts)) for i in range(count)]
        return torch.tensor(flat, dtype=torch.long).view(len(prompts), count)

    def _sample(
        self,
        text: Tensor,
        seeds: Tensor,
        sampler: Sampler,
        prime: Tensor | None,
        guidance: float,
        window: int | None,
        batch_size: int,
        callback: Callable[[int, int], None] | None,
    ) -> Tensor:
        """Codes (P, N, h, w), in batches: complete prompts together while they fit, else parts of one prompt."""
        prompts, count = seeds.shape
        per_batch = max(batch_size // count, 1)
        jobs = [
            (slice(p, min(p + per_batch, prompts)), slice(n, min(n + batch_size, count)))
            for p in range(0, prompts, per_batch)
            for n in range(0, count, batch_size)
        ]
        c = self.prior.config
        codes = torch.empty(prompts, count, c.image_height, c.image_width, dtype=torch.long)
        for number, (p, n) in enumerate(jobs):
            done, total = number * c.image_length, len(jobs) * c.image_length
            progress = None if callback is None else _shifted(callback, done, total)
            rows = prime.expand(p.stop - p.start, -1) if prime is not None else None
            sampled = sample_codes(
                self.prior,
                text[p],
                seeds[p, n].to(self.device),
                sampler=sampler,
                prime=rows,
                guidance=guidance,
                window=window,
                progress=progress,
            )
            codes[p, n] = sampled.cpu()
        return codes

    def decode(self, codes: Tensor, batch_size: int = 64) -> Tensor:
        """Images of codes: int64 (B, h, w) to pixels in [0, 1] on the CPU, (B, 3, H, W)."""
        with torch.inference_mode():
            parts = [
                self.image_tokenizer.decode(codes[start : start + batch_size].to(self.device)).cpu()
                for start in range(0, len(codes), batch_size)
            ]
        return torch.cat(parts)

    def _rerank(
        self, prompts: list[str], codes: Tensor, seeds: Tensor, keep: int, batch_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
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


def _incomplete(folder: Path) -> str:
    """Says what a folder lacks that is no complete model."""
    if not (folder / CONVERSION).is_file():
        return f"{folder} has no {INDEX}: expected a folder from save_pretrained or `dalle-zoo export`"
    missing = [part for part in COMPONENTS[:3] if not (folder / part).is_dir()]
    return (
        f"the weights converted into {folder} lack {' and '.join(missing)}, and no image can be generated: give the "
        "place of their files as well, `dalle-zoo convert PLACE OTHER --out FOLDER` or from_pretrained([place, other])"
    )


def _random_seed(generator: torch.Generator | None) -> int:
    """A seed from the state of a generator (the global one if missing), which moves on as with any other sample."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _shifted(callback: Callable[[int, int], None], done: int, total: int) -> Callable[[int, int], None]:
    return lambda tokens, _: callback(done + tokens, total)


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
    """Loads a complete pipeline, or one network of it.

    Args:
        location: Bundled name, folder, or ``organisation/name`` on the Hub, of which only the component is downloaded.
            Also weights of other code bases, as for `DallePipeline.from_pretrained`.
        component: "dvae", "prior", "ranker" or "tokenizer". Defaults to the pipeline.
        device: Where to put networks. Defaults to the CPU.
        dtype: Precision of a prior. Defaults to float32.
        revision: Of a model on the Hub: branch, tag or commit. Defaults to the newest of the main branch.
        token: Of a user who may read it. Defaults to the stored one.
        cache_dir: Where downloads lie. Defaults to the Hub's own cache.
        local_files_only: Whether only the cache is asked.
        files: As for `DallePipeline.from_pretrained`.

    Example:
        >>> load_model("emoji64", "prior").config.image_height
        8
    """
    access = Access(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if component is None:
        return DallePipeline.from_pretrained(location, device=device, dtype=dtype, files=files, **asdict(access))
    if component not in COMPONENTS:
        raise UnknownNameError(suggest("component", component, COMPONENTS))
    folder = find_component(location, component, access, files)
    if component == "dvae":
        return load_image_tokenizer(folder, device)
    if component == "prior":
        return load_prior(folder, device, dtype)
    if component == "tokenizer":
        return load_text_tokenizer(folder)
    return Ranker.from_folder(folder).to(device)
