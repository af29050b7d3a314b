"""What is measured: images of a benchmark or of a folder, or images that a model generates from captions.

A subject is a row of numbered samples. What sample i shows depends on i alone, so any number of processes may share
the work, and a killed run may go on, without a change in the images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_zoo.files import read_json
from dalle_zoo.images import to_uint8
from dalle_zoo.model_folder import CHECKSUMS
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.sampling import SamplingOptions, derive_seed, sample_codes
from dalle_zoo_eval.benchmarks.base import Item
from dalle_zoo_eval.benchmarks.images import load_image
from dalle_zoo_eval.metrics import in_batches
from dalle_zoo_eval.protocol import Crop
from dalle_zoo_eval.provenance import digest

# B samples, N candidates of a sample, H W pixels

BATCH = 64
"""Images that are generated at once unless more or fewer are asked for."""
READERS = 4
"""Threads that decode images; the decoders of Pillow and torch leave the interpreter while they work."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The images of some samples."""

    images: dict[int, list[Tensor]]
    """For every number of candidates n, the image chosen among the first n: uint8 (3, H, W) each. A subject that
    samples nothing has 1 alone."""
    chosen: dict[int, list[int]]
    """Likewise the number of the chosen candidate."""
    captions: list[str]
    """Caption of every sample, empty where there is none."""


class ImageSource(Protocol):
    """A row of samples with their images."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that fixes the images, as plain data."""

    @property
    def counts(self) -> list[int]:
        """Numbers of candidates that are measured, smallest first; 1 where nothing is sampled."""

    def __len__(self) -> int: ...

    def show(self, indices: Sequence[int]) -> Shown:
        """The images of some samples."""

    def image(self, index: int, candidate: int) -> Tensor:
        """One image of a sample again, uint8 (3, H, W)."""


class ImageFiles:
    """Images of files.

    Args:
        items: The samples, in order; each needs an image.
        crop: As in `load_image`.
        size: Side in pixels, or None to leave them as they are.
        source: sha256 of what the items were read from.
    """

    def __init__(self, items: Sequence[Item], crop: Crop, size: int | None, *, source: str) -> None:
        without = [item.key for item in items if item.image is None]
        if without:
            raise ValueError(f"{len(without)} samples have no image, such as {without[0]!r}: it cannot be measured")
        self.items, self.crop, self.size, self.source = tuple(items), crop, size, source
        self.captions = [(item.captions or ("",))[0] for item in items]

    @property
    def identity(self) -> dict[str, Any]:
        """Source, order, crop and size."""
        order = digest([[i.key, c] for i, c in zip(self.items, self.captions, strict=True)])
        return {
            "kind": "images", "source": self.source, "crop": self.crop, "size": self.size,
            "samples": len(self.items), "order": order,
        }  # fmt: skip

    @property
    def counts(self) -> list[int]:
        """One image a sample."""
        return [1]

    def __len__(self) -> int:
        return len(self.items)

    def show(self, indices: Sequence[int]) -> Shown:
        """Decodes the files, several at a time."""
        with ThreadPoolExecutor(READERS) as threads:
            images = list(threads.map(lambda i: load_image(self.items[i], self.crop, self.size), indices))
        captions = [self.captions[i] for i in indices]
        return Shown(images={1: images}, chosen={1: [0] * len(images)}, captions=captions)

    def image(self, index: int, candidate: int) -> Tensor:
        """The image of a sample; there is but one."""
        del candidate
        return load_image(self.items[index], self.crop, self.size)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What fixes the generated images besides the model and the captions."""

    candidates: int = 1
    """Images N generated from prompts; above 1 the model's ranker chooses."""
    curve: tuple[int, ...] = ()
    """Further numbers of candidates that are measured: the best among the first n, each at most N."""
    seed: int = 0
    """Seed of the noise."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    top_p: float | None = None
    """Sample among the most likely tokens that reach this probability."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 is none."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if not 1 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be a finite number of at least 1, which is none, got {self.guidance}")
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {self.candidates}")
        outside = [n for n in self.curve if not 1 <= n <= self.candidates]
        if outside:
            raise ValueError(f"curve must lie in 1..candidates ({self.candidates}), got {outside[0]}")
        SamplingOptions(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)  # which checks its own

    @property
    def counts(self) -> list[int]:
        """All numbers of candidates that are measured, smallest first."""
        return sorted({*self.curve, self.candidates})


class GeneratedImages:
    """Images that a model generates, one row of candidates a caption.

    Candidate c of caption i is sampled from noise of (seed, i, c) alone. The chosen images are scaled to the size of
    the protocol (bicubic), so that a blur of 8 pixels is as strong on both sides.

    Args:
        pipe: The model.
        captions: One caption per sample.
        sampling: What fixes the images.
        size: Side of the images that are shown, pixels; as they are sampled if None.
        batch_size: Images generated at once; memory and time, not the images.
    """

    def __init__(
        self,
        pipe: DallePipeline,
        captions: Sequence[str],
        sampling: Sampling,
        *,
        size: int | None = None,
        batch_size: int = BATCH,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if max(sampling.counts) > 1 and pipe.ranker is None:
            raise ValueError("more than one candidate needs a ranker to choose, and this model has none")
        self.pipe, self.captions, self.sampling = pipe, list(captions), sampling
        self.size, self.batch_size = size, batch_size

    @property
    def identity(self) -> dict[str, Any]:
        """Weights, captions and sampling."""
        return {
            "kind": "sampled", "model": model_sha256(self.pipe), "samples": len(self.captions),
            "captions": digest(self.captions), "sampling": asdict(self.sampling), "size": self.size,
        }  # fmt: skip

    @property
    def counts(self) -> list[int]:
        """Those of the sampling."""
        return self.sampling.counts

    def __len__(self) -> int:
        return len(self.captions)

    @torch.inference_mode()
    def show(self, indices: Sequence[int]) -> Shown:
        """Generates all candidates, and lets the ranker choose among the first n of them for every n."""
        captions = [self.captions[i] for i in indices]
        codes = self._sample(captions, self._seeds(indices, range(self.sampling.candidates)))
        counts = self.sampling.counts
        by_count: dict[int, list[Tensor]] = {n: [] for n in counts}
        chosen: dict[int, list[int]] = {n: [] for n in counts}
        for number, caption in enumerate(captions):
            images = to_uint8(self.pipe.decode(codes[number], self.batch_size))
            scores = self._scores(images, caption)
            for n in counts:
                best = int(scores[:n].argmax())
                chosen[n].append(best)
                by_count[n].append(self._scaled(images[best]))
        return Shown(images=by_count, chosen=chosen, captions=captions)

    @torch.inference_mode()
    def image(self, index: int, candidate: int) -> Tensor:
        """Samples one candidate of a caption again."""
        codes = self._sample([self.captions[index]], self._seeds([index], [candidate]))
        return self._scaled(to_uint8(self.pipe.decode(codes[0]))[0])

    def _seeds(self, indices: Sequence[int], candidates: Sequence[int]) -> Tensor:
        seed = self.sampling.seed
        return torch.tensor([[derive_seed(seed, "eval", i, c) for c in candidates] for i in indices])

    def _scores(self, images: Tensor, caption: str) -> Tensor:
        """The ranker's score of every candidate, (N,)."""
        ranker = self.pipe.ranker
        if ranker is None or len(images) == 1:
            return torch.zeros(len(images))
        parts = in_batches(images, self.batch_size)
        scored = [ranker.scores(p.to(self.pipe.device).float() / 255, [caption] * len(p)).cpu() for p in parts]
        return torch.cat(scored)

    def _scaled(self, image: Tensor) -> Tensor:
        if self.size is None or image.shape[1:] == (self.size, self.size):
            return image
        pil = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(pil)).permute(2, 0, 1).contiguous()

    def _sample(self, captions: list[str], seeds: Tensor) -> Tensor:
        """Codes (B, N, h, w): complete captions together while they fit, else parts of one."""
        s, pipe = self.sampling, self.pipe
        text = pipe.encode_text(captions)
        options = SamplingOptions(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, guidance_scale=s.guidance)
        together = max(self.batch_size // seeds.shape[1], 1)
        rows = []
        for start in range(0, len(captions), together):
            some = slice(start, start + together)
            parts = [
                sample_codes(pipe.prior, text[some], part.t().to(pipe.device), options).cpu()
                for part in in_batches(seeds[some].t(), self.batch_size)
            ]
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows)


def model_sha256(pipe: DallePipeline) -> dict[str, str]:
    """Digest of every file of a model: weights, configurations, tokenizer. Loading has checked them."""
    if pipe.folder is None:
        raise ValueError("the model must lie in a folder to be measured: save_pretrained it first")
    return {str(name): str(digest) for name, digest in read_json(pipe.folder / CHECKSUMS).items()}
