"""Measures whether likelihood ranks candidates for a masked region better than chance.

    python benchmarks/inpainting.py        writes benchmarks/results/inpainting.json and its sheet

For images of the bundled data that the model was not trained on, a rectangle of the code grid is masked and sampled
again, several candidates per image. Codes after the first masked one are kept, and their likelihood ranks the
candidates. Their order is compared with that of the original region: its PSNR against the
reconstruction of the image, over the pixels of the masked cells only. Chance is the mean over all candidates, the
ceiling is the best of them; intervals are those of a bootstrap over images.
"""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from dalle_zoo_eval.datasets import read_dataset
from PIL import Image
from torch import Tensor

from dalle_zoo import DallePipeline
from dalle_zoo.data import decode_image
from dalle_zoo.files import write_json
from dalle_zoo.images import image_rows, save_png
from dalle_zoo.sampling import SAMPLE, SamplingOptions, derive_seed
from dalle_zoo.version import __version__

# I images, N candidates of an image, h w code grid

RESULTS = Path(__file__).parent / "results"
REGIONS = {
    "center, 4 x 4 of 8 x 8 cells": (slice(2, 6), slice(2, 6)),
    "upper half, 4 x 8 cells": (slice(0, 4), slice(0, 8)),
    "left half, 8 x 4 cells": (slice(0, 8), slice(0, 4)),
}
"""Masked rows and columns of the code grid."""
RESAMPLES = 10_000
"""Bootstrap resamples of the images."""


def region_psnr(images: Tensor, originals: Tensor, rows: slice, columns: slice, factor: int) -> Tensor:
    """PSNR of a region: (I, N, 3, H, W) against (I, 3, H, W) to (I, N), dB."""
    high, wide = (slice(part.start * factor, part.stop * factor) for part in (rows, columns))
    error = (images - originals[:, None])[..., high, wide].square().flatten(2).mean(2)
    return -10 * error.clamp(min=1e-10).log10()


def interval(values: Tensor) -> dict[str, float]:
    """Mean of values per image, (I,), with the 95% interval of a bootstrap over images."""
    generator = torch.Generator().manual_seed(0)
    means = values[torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"mean": float(values.mean()), "low": low, "high": high}


def measure(likelihood: Tensor, ranker: Tensor, quality: Tensor) -> dict[str, Any]:
    """Compares choices among candidates: scores (I, N) and PSNR (I, N) to figures."""

    def chosen(scores: Tensor) -> Tensor:
        return quality.gather(1, scores.argmax(1, keepdim=True))[:, 0]

    chance = quality.mean(1)
    best = quality == quality.amax(1, keepdim=True)
    choices = {"likelihood": chosen(likelihood), "ranker": chosen(ranker)}
    return {
        "psnr_chance": interval(chance),
        "psnr_best": interval(quality.amax(1)),
        **{f"psnr_{name}": interval(values) for name, values in choices.items()},
        **{f"gain_{name}": interval(values - chance) for name, values in choices.items()},
        "best_chosen_by_likelihood": float(best.gather(1, likelihood.argmax(1, keepdim=True)).float().mean()),
        "best_chosen_by_chance": float(best.float().mean()),
    }


def evaluate(pipe: DallePipeline, codes: Tensor, captions: list[str], candidates: int) -> dict[str, Any]:
    """Figures of all regions, and rows of images for the sheet."""
    text, options = pipe.encode_text(captions), SamplingOptions(temperature=0.7)
    originals = pipe.decode(codes)
    factor = originals.shape[-1] // codes.shape[-1]
    seeds = torch.tensor([[derive_seed(0, i, n) for n in range(candidates)] for i in range(len(codes))])
    figures, sheet = {}, []
    for name, (rows, columns) in REGIONS.items():
        given = codes.clone()
        given[:, rows, columns] = SAMPLE
        sampled = pipe.sample(text, seeds, options, given=given)
        if not torch.equal(sampled[:, 0][given != SAMPLE], codes[given != SAMPLE]):
            raise AssertionError("kept codes were changed")
        likelihood = torch.cat(
            [pipe.following_log_likelihood(text[i : i + 1], sampled[i : i + 1], given[i]) for i in range(len(codes))]
        )
        images = pipe.decode(sampled.flatten(0, 1)).unflatten(0, (len(codes), candidates))
        scores = torch.stack([pipe.score(images[i], [captions[i]] * candidates) for i in range(len(codes))])
        figures[name] = measure(likelihood, scores, region_psnr(images, originals, rows, columns, factor))
        order = likelihood.argsort(1, descending=True)
        ranked = images[torch.arange(len(codes))[:, None], order]
        masked = pipe.preview(given)
        sheet += [masked[:12], ranked[:12, 0], ranked[:12, -1]]
        print(name, figures[name]["gain_likelihood"], flush=True)
    return {"figures": figures, "sheet": [originals[:12], *sheet]}


def read(source: str, count: int) -> list[tuple[Image.Image, str]]:
    """Images and first captions, evenly spaced over a source."""
    items = [item for item in read_dataset("source", None, source).items if item.captions]
    chosen = [items[number * len(items) // count] for number in range(min(count, len(items)))]
    return [(decode_image(item.image), item.captions[0]) for item in chosen]


def main() -> None:
    """Runs the evaluation and writes the result file and its sheet."""
    parser = argparse.ArgumentParser(description="Ranks candidates for masked regions by likelihood.")
    parser.add_argument("--model", default="composition", help="model [composition]")
    parser.add_argument("--source", default="composition:val-styles", help="captioned images [composition:val-styles]")
    parser.add_argument("--images", type=int, default=128, help="number of images, evenly spaced [128]")
    parser.add_argument("--candidates", type=int, default=16, help="candidates per image and region [16]")
    parser.add_argument("--out", type=Path, default=RESULTS / "inpainting.json", help="result file")
    options = parser.parse_args()
    start = time.perf_counter()
    pipe = DallePipeline.from_pretrained(options.model)
    samples = read(options.source, options.images)
    codes = torch.stack([pipe.encode_image(image) for image, _ in samples])
    result = evaluate(pipe, codes, [caption for _, caption in samples], options.candidates)
    save_png(image_rows(*result["sheet"]), options.out.with_suffix(".png"))
    write_json(
        options.out,
        {
            "command": f"python benchmarks/inpainting.py --model {options.model} --source {options.source} "
            f"--images {options.images} --candidates {options.candidates}",
            "model": options.model,
            "model_digest": pipe.digest,
            "source": options.source,
            "images": len(samples),
            "candidates": options.candidates,
            "temperature": 0.7,
            "seed": 0,
            "unit": "dB of the masked region against the reconstruction, mean over images with its 95% interval",
            "regions": result["figures"],
            "seconds": time.perf_counter() - start,
            "torch": torch.__version__,
            "dalle_zoo": __version__,
            "date": datetime.now(UTC).date().isoformat(),
        },
    )
    print(options.out)


if __name__ == "__main__":
    main()
