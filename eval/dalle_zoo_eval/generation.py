"""Generates images from prompts with a model, and stores their codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalle_zoo.files import atomic_write, read_json
from dalle_zoo.images import to_uint8
from dalle_zoo.model_folder import CHECKSUMS
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.sampling import derive_seed
from dalle_zoo.values import as_integer
from dalle_zoo.version import __version__
from dalle_zoo_eval.image_sources import EVERY, ImageBatch, ImageSource
from dalle_zoo_eval.moments import in_batches
from dalle_zoo_eval.provenance import digest
from dalle_zoo_eval.rules import SamplingRule

# B prompts, N candidates of a prompt, h w code grid, H W pixels

BATCH = 64
"""Default number of images generated at once."""


class GeneratedImages:
    """Generates N candidates per prompt, of which the model's ranker chooses one.

    Images are scaled to the size of the protocol (bicubic), so that a blur of 8 pixels has the same strength on both
    sides. Codes are stored in chunks: an interrupted run, or a run with more extractors, samples nothing twice.

    Args:
        pipe: The model.
        captions: Caption of each sample.
        sampling: Candidates, seeds and sampling options.
        seed: Seed of the noise. Defaults to 0.
        group: Name of the group, on which the noise depends if ``sampling.seeds`` is ``chunk``. Defaults to ``all``.
        size: Side of the images, pixels. Defaults to the side of the generated images.
        batch_size: Number of images generated at once, which affects memory and time but not the images. Defaults to
            `BATCH`.
        every: Whether all candidates are evaluated and stored instead of only the chosen ones. Defaults to False.
        cache: Folder of the codes. Defaults to None, which stores none.
        primes: Image of each caption, whose top rows are given to every candidate. Defaults to none.
        prime_rows: Number of given rows of codes. Defaults to 0.

    Raises:
        ValueError: There are several candidates but no ranker to choose among them, the model is not in a folder, or a
            number is out of range.
    """

    def __init__(
        self,
        pipe: DallePipeline,
        captions: Sequence[str],
        sampling: SamplingRule,
        *,
        seed: int = 0,
        group: str = "all",
        size: int | None = None,
        batch_size: int = BATCH,
        every: bool = False,
        cache: Path | None = None,
        primes: ImageSource | None = None,
        prime_rows: int = 0,
    ) -> None:
        batch_size, seed = as_integer("batch_size", batch_size, least=1), as_integer("seed", seed, least=0)
        self.ranked = sampling.candidates == 1 or pipe.ranker is not None
        if not self.ranked and not every:
            raise ValueError("choosing among candidates needs a ranker, and this model has none")
        self.options = sampling.options
        self.pipe, self.captions, self.sampling, self.seed, self.group = pipe, list(captions), sampling, seed, group
        self.size, self.batch_size, self.every = size, batch_size, every
        self.primes, self.prime_rows = primes, prime_rows
        self.folder = None
        if cache is not None:
            fixed = self._fixed() | {"versions": [__version__, torch.__version__.partition("+")[0]]}
            fixed["device"] = pipe.device.type
            self.folder = cache / f"codes-{digest(fixed)[:16]}"

    def _fixed(self) -> dict[str, Any]:
        return {
            "kind": "generated", "model": model_sha256(self.pipe), "samples": len(self.captions),
            "captions": digest(self.captions), "sampling": asdict(self.sampling), "seed": self.seed,
            "group": self.group if self.sampling.seeds == "chunk" else None, "every": self.every,
            **({"primes": self.primes.identity, "prime_rows": self.prime_rows} if self.primes is not None else {}),
        }  # fmt: skip

    @property
    def identity(self) -> dict[str, Any]:
        """Digests of weights and captions, sampling rule, and size."""
        return self._fixed() | {"size": self.size}

    @property
    def counts(self) -> list[int]:
        """Numbers of candidates to evaluate; only the first candidate if there is no ranker."""
        return list(self.sampling.counts) if self.ranked else [1]

    def __len__(self) -> int:
        return len(self.captions)

    @torch.inference_mode()
    def load(self, indices: Sequence[int]) -> ImageBatch:
        """Generates all candidates or reads their stored codes, and decodes those to evaluate."""
        tensors = self._codes(indices)
        images: dict[int, list[Tensor]] = {n: [] for n in self.counts}
        chosen = {n: tensors[f"chosen/{n}"].tolist() for n in self.counts}
        if self.every:
            # All candidates of a prompt are decoded together, as they were for the ranker.
            decoded = [self._decoded(codes) for codes in tensors["codes"].long()]
            images[EVERY] = [self._scaled(image) for some in decoded for image in some]
            for n in self.counts:
                images[n] = [self._scaled(some[c]) for some, c in zip(decoded, chosen[n], strict=True)]
        else:
            for n in self.counts:
                images[n] = [self._scaled(image) for image in self._decoded(tensors[f"codes/{n}"].long())]
        captions = [self.captions[i] for i in indices]
        return ImageBatch(images=images, chosen=chosen, captions=captions, others=[])

    def _codes(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Returns the codes of some samples, from the stored chunk if there is one; stores a complete chunk."""
        start = indices[0] - indices[0] % self.sampling.chunk
        chunk = range(start, min(start + self.sampling.chunk, len(self)))
        path = None if self.folder is None else self.folder / f"{start:06d}.safetensors"
        if path is not None and path.is_file():
            return {name: tensor[[i - start for i in indices]] for name, tensor in self._read(path).items()}
        tensors = self._generate(indices)
        if path is not None and list(indices) == list(chunk):
            with atomic_write(path) as aside:
                save_file(tensors, aside)
        return tensors

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): delete it and run again") from None

    def _generate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Samples codes; returns those of the candidates to evaluate, and the indices of the chosen ones."""
        captions = [self.captions[i] for i in indices]
        seeds = self._seeds(indices, range(self.sampling.candidates))
        codes = self._sample(captions, seeds, self._primed(indices))
        chosen: dict[int, list[int]] = {n: [] for n in self.counts}
        for number, caption in enumerate(captions):
            scores = self._scores(codes[number], caption)
            for n in self.counts:
                chosen[n].append(int(scores[:n].argmax()))
        tensors = {f"chosen/{n}": torch.tensor(best) for n, best in chosen.items()}
        if self.every:
            return tensors | {"codes": codes.to(torch.int32).contiguous()}
        rows = torch.arange(len(codes))
        picked = {f"codes/{n}": codes[rows, torch.tensor(best)] for n, best in chosen.items()}
        return tensors | {name: some.to(torch.int32).contiguous() for name, some in picked.items()}

    def _seeds(self, indices: Sequence[int], candidates: Sequence[int]) -> Tensor:
        """Returns the seeds of candidates, (B, N)."""
        if self.sampling.seeds == "prompt":
            return torch.tensor([[derive_seed(self.seed, "eval", i, c) for c in candidates] for i in indices])
        rows = []
        for i in indices:
            start = i - i % self.sampling.chunk
            base = derive_seed(self.seed, self.group, start)
            rows.append([derive_seed(base, i - start, c) for c in candidates])
        return torch.tensor(rows)

    def _scores(self, codes: Tensor, caption: str) -> Tensor:
        """Returns the ranker's score of every candidate, (N,)."""
        ranker = self.pipe.ranker
        if ranker is None or len(codes) == 1:
            return torch.zeros(len(codes))
        images = self._decoded(codes)
        parts = in_batches(images, self.batch_size)
        scored = [ranker.scores(p.to(self.pipe.device).float() / 255, [caption] * len(p)).cpu() for p in parts]
        return torch.cat(scored)

    def _decoded(self, codes: Tensor) -> Tensor:
        return to_uint8(self.pipe.decode(codes, self.batch_size))

    def _scaled(self, image: Tensor) -> Tensor:
        if self.size is None or image.shape[1:] == (self.size, self.size):
            return image
        pil = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(pil)).permute(2, 0, 1).contiguous()

    def _primed(self, indices: Sequence[int]) -> Tensor | None:
        """Returns the given codes of some samples, (B, h, w); None if nothing is given."""
        if self.primes is None:
            return None
        images = self.primes.load(indices).images[1]
        return torch.stack([self.pipe.kept_codes(i.float() / 255, prime_rows=self.prime_rows) for i in images])

    def _sample(self, captions: list[str], seeds: Tensor, given: Tensor | None = None) -> Tensor:
        """Samples codes, (B, N, h, w)."""
        text = self.pipe.encode_text(captions)
        return self.pipe.sample(text, seeds, self.options, given=given, batch_size=self.batch_size)


def model_sha256(pipe: DallePipeline) -> dict[str, str]:
    """Returns the sha256 of every file of a model by name; loading the model has checked them.

    Raises:
        ValueError: The model is not in a folder.
    """
    if pipe.folder is None:
        raise ValueError("the model must be in a folder to be evaluated: call save_pretrained first")
    return {str(name): str(digest) for name, digest in read_json(pipe.folder / CHECKSUMS).items()}
