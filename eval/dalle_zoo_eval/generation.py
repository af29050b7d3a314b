"""The images that a model generates from prompts, and the store of their codes."""

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
    """Images that a model generates, N candidates per prompt, of which its ranker chooses one.

    The chosen images are scaled to the size of the protocol (bicubic), so that a blur of 8 pixels is as strong on both
    sides. Codes are stored by chunk, so that a killed run, or one with further extractors, samples nothing twice.

    Args:
        pipe: The model.
        captions: One caption per sample.
        sampling: What fixes the images besides the model and the captions.
        seed: Seed of the noise.
        group: Name of the group, on which the noise depends with ``sampling.seeds="chunk"``.
        size: Side of the images, pixels; as they are generated if None.
        batch_size: Images generated at once; memory and time, not the images.
        every: Whether all candidates are measured, and so stored, and not only the chosen ones.
        cache: Folder of the codes; None stores none.
        primes: Image of each caption, whose top rows every candidate begins with. Defaults to none.
        prime_rows: Rows of codes that are given.
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
            raise ValueError("more than one candidate needs a ranker to choose, and this model has none")
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
        """Weights, captions, sampling and size."""
        return self._fixed() | {"size": self.size}

    @property
    def counts(self) -> list[int]:
        """Numbers of candidates that are measured; without a ranker to choose, the first candidate alone."""
        return list(self.sampling.counts) if self.ranked else [1]

    def __len__(self) -> int:
        return len(self.captions)

    @torch.inference_mode()
    def load(self, indices: Sequence[int]) -> ImageBatch:
        """Generates all candidates, or reads their codes, and decodes those that are measured."""
        tensors = self._codes(indices)
        images: dict[int, list[Tensor]] = {n: [] for n in self.counts}
        chosen = {n: tensors[f"chosen/{n}"].tolist() for n in self.counts}
        if self.every:
            # Complete prompts are decoded as they were for the ranker.
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
        """Codes of some samples, out of the stored chunk where there is one; a complete chunk is stored."""
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
        """Codes of the candidates that are measured, and the numbers of the chosen ones."""
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
        """Seeds of candidates, (B, N)."""
        if self.sampling.seeds == "prompt":
            return torch.tensor([[derive_seed(self.seed, "eval", i, c) for c in candidates] for i in indices])
        rows = []
        for i in indices:
            start = i - i % self.sampling.chunk
            base = derive_seed(self.seed, self.group, start)
            rows.append([derive_seed(base, i - start, c) for c in candidates])
        return torch.tensor(rows)

    def _scores(self, codes: Tensor, caption: str) -> Tensor:
        """The ranker's score of every candidate, (N,)."""
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
        """Codes that the images of some samples keep, (B, h, w); None where nothing is given."""
        if self.primes is None:
            return None
        images = self.primes.load(indices).images[1]
        return torch.stack([self.pipe.kept_codes(i.float() / 255, prime_rows=self.prime_rows) for i in images])

    def _sample(self, captions: list[str], seeds: Tensor, given: Tensor | None = None) -> Tensor:
        """Codes (B, N, h, w)."""
        text = self.pipe.encode_text(captions)
        return self.pipe.sample(text, seeds, self.options, given=given, batch_size=self.batch_size)


def model_sha256(pipe: DallePipeline) -> dict[str, str]:
    """Digest of every file of a model: weights, configurations, tokenizer. Loading has checked them."""
    if pipe.folder is None:
        raise ValueError("the model must be saved in a folder to be measured: save_pretrained it first")
    return {str(name): str(digest) for name, digest in read_json(pipe.folder / CHECKSUMS).items()}
