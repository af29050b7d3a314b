"""The protocol ``emoji64``: what the model in the box does on things seen and unseen.

Three splits: ``train``; ``val-styles``, known concepts in styles in which they were not seen; and
``val-concepts``, concepts never seen. Of each, the same number of samples is drawn by seed, so that
the columns compare.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from dalle_zoo.data import ImageTextDataset, open_source
from dalle_zoo.hub import sha256_file, write_json
from dalle_zoo.models.ranker import Ranker
from dalle_zoo.pictures import save_png, to_uint8
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.sampling import picture_seed
from dalle_zoo_eval.evaluator import MobileNet, load_evaluator
from dalle_zoo_eval.measures import frechet_distance
from dalle_zoo_eval.metrics import (
    bits_per_token,
    codebook_use,
    concept_accuracy,
    in_batches,
    psnr,
    retrieval,
    shuffle_concepts,
)
from dalle_zoo_eval.provenance import code_version, package_versions
from dalle_zoo_eval.sheets import comparison_sheet
from dalle_zoo_eval.statistics import Moments

log = logging.getLogger(__name__)

# B samples, N candidates of a caption, h w code grid, d features of the evaluator

NAME = "emoji64"
SPLITS = ("train", "val-styles", "val-concepts")
KS = (1, 5)
CHUNK = 8
"""Captions drawn and stored at a time. A killed run repeats at most one chunk; part of the seeds."""
SHEET = 24
"""Captions on a sheet."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What fixes the numbers besides the model; repeated in the result file."""

    seed: int = 0
    """Seed of the drawn samples, of the shuffled captions and of the sampling noise."""
    samples: int = 413
    """Samples of a split at most, drawn by seed: as many as val-styles has."""
    train_captions: int = 256
    """Captions of train that pictures are drawn from: the first of its samples."""
    val_captions: int = 413
    """Likewise for the other two splits."""
    candidates: int = 16
    """Pictures drawn from a caption."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int | None = None
    """Draw among the k most likely tokens."""
    top_p: float | None = None
    """Draw among the most likely tokens that reach this probability."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 is none."""

    def __post_init__(self) -> None:
        # Two samples are the least that can be shuffled.
        least = {"samples": 2, "train_captions": 2, "val_captions": 2, "candidates": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")

    def sampling(self) -> dict[str, Any]:
        """Arguments of the pipeline that change the pictures of a seed."""
        return {n: getattr(self, n) for n in ("temperature", "top_k", "top_p", "guidance")}


@dataclass(frozen=True)
class Split:
    """Samples of a split."""

    name: str
    keys: list[str]
    """``<code points>_<style>``."""
    captions: list[str]
    images: Tensor
    """uint8 (B, 3, H, W)."""

    @property
    def concepts(self) -> list[str]:
        """The code points of every sample: equal for the styles of one thing."""
        return [key.rpartition("_")[0] for key in self.keys]

    def take(self, indices: Sequence[int]) -> Split:
        """Some of the samples, in the order of the indices."""
        return Split(
            self.name,
            [self.keys[i] for i in indices],
            [self.captions[i] for i in indices],
            self.images[list(indices)],
        )

    def draw(self, count: int, seed: int) -> Split:
        """At most ``count`` samples in an order that the seed and the split's name fix."""
        order = torch.Generator().manual_seed(picture_seed(seed, "samples", self.name))
        return self.take(torch.randperm(len(self.keys), generator=order)[:count].tolist())


def load_split(name: str, image_size: int) -> Split:
    """All samples of a bundled split, with the first caption of each."""
    dataset = ImageTextDataset(open_source(f"{NAME}:{name}"), transform="center", size=image_size)
    items = list(dataset)
    return Split(
        name,
        [item["key"] for item in items],
        [item["caption"] for item in items],
        torch.stack([item["image"] for item in items]),
    )


@dataclass(frozen=True)
class Gallery:
    """Real pictures of all splits as the evaluator sees them."""

    evaluator: MobileNet
    keys: list[str]
    concepts: list[str]
    features: Tensor

    @classmethod
    def of(cls, evaluator: MobileNet, splits: Sequence[Split]) -> Gallery:
        """Features of all pictures of the splits."""
        return cls(
            evaluator,
            [key for split in splits for key in split.keys],
            [concept for split in splits for concept in split.concepts],
            torch.cat([evaluator.features(split.images) for split in splits]),
        )

    def accuracy(self, features: Tensor, keys: list[str], concepts: list[str]) -> dict[str, float]:
        """Concept accuracy for every k, as ``top1`` and so on."""
        known = (self.features, self.keys, self.concepts)
        return {f"top{k}": concept_accuracy(features, keys, concepts, *known, k=k) for k in KS}


@dataclass(frozen=True)
class Drawn:
    """Pictures drawn from the captions of a split."""

    best: Tensor | None
    """Which candidate the ranker scores highest, int64 (B,); None without a ranker."""
    shown: Tensor
    """That candidate, or the first one without a ranker: uint8 (B, 3, H, W)."""
    features: Tensor | None
    """Of all candidates, (B, N, d); None without an evaluator."""
    ranker_features: Tensor | None
    """Likewise as the ranker sees them; None without a ranker."""


def evaluate_emoji64(
    model: str,
    evaluator: str | None,
    out: Path,
    *,
    protocol: Protocol = Protocol(),
    device: str = "cpu",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Evaluates a model on the three splits and writes the result file and a sheet of each split.

    Drawn pictures are kept as codes in ``.cache`` beside the result file; a killed run goes on from
    them, and another run with the same weights, seed and captions uses them again.

    Args:
        model: Bundled name or folder.
        evaluator: Folder of `evaluator.WEIGHTS_FILE`; without it concept accuracy is left out.
        out: Result file, JSON.
        protocol: What fixes the numbers.
        device: Where the networks run.
        overwrite: Whether an existing result file and its sheets are replaced.

    Returns:
        What the result file holds.
    """
    sheet_files = {name: out.with_name(f"{out.stem}-{name}.png") for name in SPLITS}
    existing = [str(path) for path in (out, *sheet_files.values()) if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{', '.join(existing)}: already there; choose another --out or pass --overwrite")
    net, net_record = load_evaluator(evaluator) if evaluator is not None else (None, None)
    pipe = DallePipeline.from_pretrained(model, device=device)
    assert pipe.folder is not None
    splits = [load_split(name, pipe.image_tokenizer.image_size) for name in SPLITS]
    weights = {
        path.relative_to(pipe.folder).as_posix(): sha256_file(path)
        for path in sorted(pipe.folder.rglob("*.safetensors"))
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    gallery = Gallery.of(net.to(device), splits) if net is not None else None
    figures, sheets = {}, {}
    for split in splits:
        log.warning("%s: %s", NAME, split.name)
        figures[split.name], sheets[split.name] = evaluate_split(
            pipe, split, gallery, protocol, out.parent / ".cache", weights
        )
    result = {
        "protocol": {"name": NAME, **asdict(protocol), "chunk": CHUNK},
        "model": {"name": Path(model).name, "weights_sha256": weights},
        "evaluator": net_record,
        "splits": figures,
        "targets": targets(figures),
        "left_out": left_out(pipe, gallery),
        "code_version": code_version(),
        "versions": {
            "python": platform.python_version(),
            **package_versions(("torch", "transformers", "tokenizers")),
        },
        "device": str(pipe.device),
        "date": datetime.now(UTC).date().isoformat(),
    }
    # At the end, so that a killed run leaves nothing that the call which continues would have to replace.
    for name, sheet in sheets.items():
        save_png(sheet, sheet_files[name])
    write_json(out, result)
    return result


def evaluate_split(
    pipe: DallePipeline,
    split: Split,
    gallery: Gallery | None,
    protocol: Protocol,
    cache: Path,
    weights: dict[str, str],
) -> tuple[dict[str, Any], Any]:
    """All figures of one split, and its sheet: the drawn picture left, the real one right."""
    split = split.draw(protocol.samples, protocol.seed)
    limit = protocol.train_captions if split.name == "train" else protocol.val_captions
    asked = split.take(range(min(limit, len(split.keys))))
    codes, rebuilt = reconstruct(pipe, split.images)
    drawn = judge(pipe, asked, draw_codes(pipe, asked, protocol, cache, weights), gallery)
    figures: dict[str, Any] = {
        "samples": len(split.keys),
        "captions": len(asked.keys),
        "keys_sha256": _digest(split.keys),
        "captions_sha256": _digest(split.captions),
        "psnr": float(psnr(rebuilt.float() / 255, split.images.float() / 255).mean()),
        "codebook": codebook_use(codes, pipe.image_tokenizer.codebook_size),
        "bits": caption_bits(pipe, split, codes, protocol.seed),
    }
    if pipe.ranker is not None:
        figures["retrieval"] = retrieval(pipe.ranker, split.images.float() / 255, split.captions)
        figures["ranker_distance"] = ranker_distances(pipe.ranker, split, rebuilt, drawn)
    if gallery is not None:
        figures["concept_accuracy"] = concept_figures(gallery, asked, rebuilt[: len(asked.keys)], drawn, protocol.seed)
    pairs = (drawn.shown[:SHEET].float() / 255, asked.images[:SHEET].float() / 255)
    return figures, comparison_sheet(*pairs, captions=asked.captions[:SHEET])


@torch.inference_mode()
def reconstruct(pipe: DallePipeline, images: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (B, h, w) and rebuilt pictures, uint8 like the given ones."""
    parts = [(part.float() / 255).to(pipe.device) for part in in_batches(images, 64)]
    codes = torch.cat([pipe.image_tokenizer.encode(part).cpu() for part in parts])
    return codes, to_uint8(pipe.decode(codes))


def caption_bits(pipe: DallePipeline, split: Split, codes: Tensor, seed: int) -> dict[str, float]:
    """Bits per image token with the right captions, those of other concepts, and none."""
    right = pipe.encode_text(split.captions)
    texts = {
        "right": right,
        "shuffled": right[shuffle_concepts(split.concepts, seed)],
        "none": pipe.prior.null_text().expand_as(right),
    }
    return {name: bits_per_token(pipe.prior, text, codes) for name, text in texts.items()}


def draw_codes(pipe: DallePipeline, split: Split, protocol: Protocol, cache: Path, weights: dict[str, str]) -> Tensor:
    """Codes of all candidates, int64 (B, N, h, w), from the cache where they were drawn before."""
    cache.mkdir(parents=True, exist_ok=True)
    # Whatever changes the drawn codes is part of a chunk's name.
    parts = {n: d for n, d in weights.items() if not n.startswith("ranker/")}
    config = asdict(pipe.prior.config)
    chunks = []
    for start in tqdm(range(0, len(split.keys), CHUNK), desc=f"draw {split.name}", unit="chunk"):
        captions = split.captions[start : start + CHUNK]
        seed = picture_seed(protocol.seed, split.name, start)
        call = {
            "num_images_per_prompt": protocol.candidates,
            "seed": seed,
            **protocol.sampling(),
        }
        text = pipe.encode_text(captions).tolist()
        name = hashlib.sha256(json.dumps([parts, config, text, call]).encode()).hexdigest()
        path = cache / f"{name[:32]}.safetensors"
        if not path.is_file():
            flat = pipe(captions, output_type="latent", **call).images.cpu()
            shaped = flat.reshape(len(captions), protocol.candidates, *flat.shape[1:])
            aside = path.with_suffix(f".{os.getpid()}.part")
            save_file({"codes": shaped.to(torch.int32).contiguous()}, aside)
            aside.replace(path)
        chunks.append(load_file(path)["codes"].long())
    return torch.cat(chunks)


@torch.inference_mode()
def judge(pipe: DallePipeline, split: Split, codes: Tensor, gallery: Gallery | None) -> Drawn:
    """Decodes the candidates, caption by caption, and lets ranker and evaluator look at them."""
    best, shown, features, ranker_features = [], [], [], []
    for caption, candidates in zip(split.captions, codes, strict=True):
        images = to_uint8(pipe.decode(candidates))
        first = 0
        if pipe.ranker is not None:
            first = int(pipe.ranker.rank(images.float() / 255, caption)[0])
            ranker_features.append(ranker_sees(pipe.ranker, images))
        best.append(first)
        shown.append(images[first])
        if gallery is not None:
            features.append(gallery.evaluator.features(images))
    return Drawn(
        best=torch.tensor(best) if pipe.ranker is not None else None,
        shown=torch.stack(shown),
        features=torch.stack(features) if gallery is not None else None,
        ranker_features=torch.stack(ranker_features) if pipe.ranker is not None else None,
    )


@torch.inference_mode()
def ranker_sees(ranker: Ranker, images: Tensor) -> Tensor:
    """Features of uint8 pictures (B, 3, H, W), (B, d) on the CPU."""
    parts = [ranker.image_features(part.to(ranker.device).float() / 255).cpu() for part in in_batches(images, 64)]
    return torch.cat(parts)


def ranker_distances(ranker: Ranker, split: Split, rebuilt: Tensor, drawn: Drawn) -> dict[str, float]:
    """Frechet distances to the real pictures of a split in the ranker's features: no FID, which needs Inception.

    ``one`` is the mean over the candidates, ``best`` the candidate that the same ranker prefers, so of the two the
    distance of ``best`` flatters more. Empty where there are too few pictures for the covariance.
    """
    assert drawn.ranker_features is not None and drawn.best is not None  # noqa: PT018 (one thing: there is a ranker)

    real = Moments.of(ranker_sees(ranker, split.images))
    everything = [Moments.of(features) for features in drawn.ranker_features.unbind(1)]
    if real.rank_deficient or everything[0].rank_deficient:
        return {}
    best = drawn.ranker_features[torch.arange(len(drawn.best)), drawn.best]
    return {
        "reconstructed": frechet_distance(Moments.of(ranker_sees(ranker, rebuilt)), real),
        "best": frechet_distance(Moments.of(best), real),
        "one": sum(frechet_distance(candidate, real) for candidate in everything) / len(everything),
    }


def concept_figures(
    gallery: Gallery, split: Split, rebuilt: Tensor, drawn: Drawn, seed: int
) -> dict[str, dict[str, float]]:
    """Concept accuracy of everything that has a concept, for every k.

    ``real`` is the ceiling, ``reconstructed`` what the image tokenizer leaves of it. ``one`` is one
    picture a caption: the mean over all candidates, which is its expectation. ``best`` is the
    candidate that the ranker prefers. ``shuffled`` is the floor: all candidates, held against the
    concept of another caption.
    """
    assert drawn.features is not None
    keys, concepts = split.keys, split.concepts
    candidates = drawn.features.shape[1]
    other = shuffle_concepts(concepts, seed).tolist()

    def each(values: list[str]) -> list[str]:
        return [value for value in values for _ in range(candidates)]

    everything = drawn.features.flatten(0, 1)
    real = gallery.evaluator.features(split.images)
    figures = {
        "real": gallery.accuracy(real, keys, concepts),
        "reconstructed": gallery.accuracy(gallery.evaluator.features(rebuilt), keys, concepts),
        "one": gallery.accuracy(everything, each(keys), each(concepts)),
        "shuffled": gallery.accuracy(everything, each([keys[i] for i in other]), each([concepts[i] for i in other])),
    }
    if drawn.best is not None:
        picked = drawn.features[torch.arange(len(keys)), drawn.best]
        figures["best"] = gallery.accuracy(picked, keys, concepts)
    return figures


def targets(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What the model was to reach, what it reached, and whether that is enough."""
    rows = []

    def add(name: str, required: float, reached: float) -> None:
        met = reached >= required
        rows.append({"name": name, "required": required, "reached": reached, "met": met})

    for split, required in (("train", 0.8), ("val-styles", 0.5)):
        accuracy = figures[split].get("concept_accuracy", {})
        if "best" in accuracy and accuracy["real"]["top5"]:
            share = accuracy["best"]["top5"] / accuracy["real"]["top5"]
            add(f"concept accuracy, top 5, best candidate, share of the ceiling, {split}", required, share)
    bits = figures["val-styles"]["bits"]
    gain = bits["shuffled"] - bits["right"]
    add("bits per token that the right caption saves over a shuffled one, val-styles", 0.3, gain)
    return rows


def left_out(pipe: DallePipeline, gallery: Gallery | None) -> list[str]:
    """What was not measured, and why."""
    lines = []
    if gallery is None:
        lines.append("concept accuracy: no evaluator was given")
    if pipe.ranker is None:
        lines.append("retrieval and best candidate: the model has no ranker")
    return lines


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
