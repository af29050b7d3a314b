"""Codes of all candidates, chunk by chunk in files that are there atomically.

A chunk is named by the digest of all that fixes its codes. So a killed run goes on from what it finds, another run
with the same weights, seed and captions uses it again, and any number of processes give the same codes. Who samples a
chunk has claimed it, so that no other does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from dalle_zoo.files import atomic_write
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.sampling import derive_seed
from dalle_zoo.version import __version__
from dalle_zoo_eval.claims import Claims
from dalle_zoo_eval.concepts.protocol import ConceptProtocol
from dalle_zoo_eval.concepts.splits import Split
from dalle_zoo_eval.measuring import Share
from dalle_zoo_eval.provenance import digest

# B captions, N candidates of a caption, h w code grid


@dataclass(frozen=True)
class Chunk:
    """Captions that are sampled and stored together."""

    captions: Sequence[str]
    call: Mapping[str, Any]
    """Arguments of the pipeline."""
    path: Path
    """File of the codes."""

    @property
    def claim(self) -> Path:
        """File of the claim on it."""
        return self.path.with_suffix(".claim")

    def sample(self, pipe: DallePipeline) -> None:
        """Samples and stores the codes."""
        flat = pipe(self.captions, output_type="latent", **self.call).images.cpu()
        codes = flat.reshape(len(self.captions), -1, *flat.shape[1:]).to(torch.int32).contiguous()
        with atomic_write(self.path) as aside:
            save_file({"codes": codes}, aside)

    def codes(self) -> Tensor:
        """Codes that are there, int64 (B, N, h, w)."""
        try:
            return load_file(self.path)["codes"].long()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path} cannot be read ({error}): delete it and run again") from None


def plan(
    pipe: DallePipeline, split: Split, protocol: ConceptProtocol, cache: Path, weights: Mapping[str, str]
) -> list[Chunk]:
    """Chunks of a split.

    Args:
        pipe: The model.
        split: Whose captions are sampled from.
        protocol: Candidates, sampling, seed and size of a chunk.
        cache: Folder of the chunks.
        weights: sha256 of the model's files of weights.
    """
    fixed = {
        "weights": {name: sha256 for name, sha256 in weights.items() if not name.startswith("ranker/")},
        "config": asdict(pipe.prior.config),
        "versions": {"dalle-zoo": __version__, "torch": torch.__version__.partition("+")[0]},
    }
    chunks = []
    for start in range(0, len(split.captions), protocol.chunk):
        captions = split.captions[start : start + protocol.chunk]
        seed = derive_seed(protocol.seed, split.name, start)
        call = {"num_images_per_prompt": protocol.candidates, "seed": seed, **protocol.sampling()}
        name = digest({**fixed, "text": pipe.encode_text(captions).tolist(), "call": call})
        chunks.append(Chunk(captions, call, cache / f"{name[:32]}.safetensors"))
    return chunks


def sample(pipe: DallePipeline, chunks: Sequence[Chunk], share: Share) -> None:
    """Samples the chunks that are missing.

    Args:
        pipe: The model.
        chunks: All chunks.
        share: Which of them this process begins with. Process 0 goes on with what is missing and nobody has claimed,
            from the end, where the other processes come to last, and at last waits for what others have.
    """
    with Claims() as claims:
        _sample(pipe, chunks[share.rank :: share.world], claims, wait=False)
        if share.rank == 0:
            _sample(pipe, chunks[::-1], claims, wait=False)
            _sample(pipe, chunks, claims, wait=True)


def _sample(pipe: DallePipeline, chunks: Sequence[Chunk], claims: Claims, *, wait: bool) -> None:
    wanted = [chunk for chunk in chunks if not chunk.path.is_file()]
    for chunk in tqdm(wanted, desc="sample", unit="chunk", disable=not wanted):
        chunk.path.parent.mkdir(parents=True, exist_ok=True)
        if not chunk.path.is_file() and claims.take(chunk.claim, wait=wait):
            if not chunk.path.is_file():  # while we waited
                chunk.sample(pipe)
            claims.release(chunk.claim)
