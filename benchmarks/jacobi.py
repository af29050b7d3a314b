"""Compares windows of guessed tokens with sampling one token at a time: passes, time, and equality of the codes.

    python benchmarks/jacobi.py --threads 1        writes benchmarks/results/speed/jacobi_cpu1.json

Samples images with the bundled weights, one at a time unless stated otherwise. A pass runs the prior on one
token or on one window; both paths are `sample_codes`, without and with ``window``. The first rows compare numbers of
passes and also show the times of both paths; the others compare times.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1])]

from benchmarks.harness import Equality, Row, Series, compare, interleaved, store  # noqa: E402 (runs uninstalled)
from dalle_zoo.models.image_prior import ImagePrior  # noqa: E402
from dalle_zoo.pipeline import load_model  # noqa: E402
from dalle_zoo.sampling import Progress, SamplingOptions, derive_seed, sample_codes  # noqa: E402

CAPTIONS = (
    "a red apple",
    "a flat emoji of a tree",
    "a blue heart",
    "a star on a green background",
    "a 3d emoji of a dog",
    "a flat emoji of a house",
    "a cartoon emoji of a tree",
    "a yellow cat",
)
IMAGES = 3
"""Of each caption, when passes are counted."""
TEMPERATURES = (0.4, 0.7, 1.0)
"""0.7 is what the model card recommends."""
WINDOWS = (1, 2, 4, 8, 16, 32, 64)
WINDOW = 16
"""Of the rows."""
AT_ONCE = (1, 2, 4, 8, 16)
"""Images of one caption."""
SINGLE, WINDOWED = "one token after the other", f"windows of {WINDOW}"


class CountingSampler:
    """Samples, and counts passes.

    Args:
        prior: The prior.
        text: Captions, (P, T).
    """

    def __init__(self, prior: ImagePrior, text: Tensor) -> None:
        self.prior, self.text = prior, text
        self.passes = 0

    def sample(self, number: int, seeds: list[int], temperature: float, window: int | None) -> Tensor:
        """Samples all images of one caption at once, codes (n, h, w)."""
        return sample_codes(
            self.prior,
            self.text[number : number + 1],
            torch.tensor([seeds], device=self.text.device),
            options=SamplingOptions(temperature=temperature),
            window=window,
            callback=self._count,
        )[0]

    def sample_singly(self, images: int, temperature: float, window: int | None) -> tuple[Tensor, int]:
        """Samples images of every caption one after the other; returns codes (B, h, w) and the number of passes."""
        before = self.passes
        which = [(number, image) for number in range(len(CAPTIONS)) for image in range(images)]
        codes = [self.sample(number, [seed(number, image)], temperature, window) for number, image in which]
        return torch.cat(codes), self.passes - before

    def _count(self, progress: Progress) -> None:
        self.passes += 1


def seed(number: int, image: int) -> int:
    """Seeds other than those that were used to choose the guesses."""
    return derive_seed("benchmarks/jacobi", number, image)


def difference(codes: Tensor, expected: Tensor) -> Equality:
    """Share of codes that differ, which must be 0."""
    return Equality(what="share of codes that differ", value=float((codes != expected).double().mean()), limit=0.0)


def count_passes(sampling: CountingSampler, device: str) -> tuple[list[Row], Series]:
    """Returns a row for every temperature, and passes per token by window."""
    rows, lines = [], {}
    for temperature in TEMPERATURES:
        expected, tokens = sampling.sample_singly(IMAGES, temperature, None)
        passes, checks = {}, []
        for window in WINDOWS:
            codes, passes[window] = sampling.sample_singly(IMAGES, temperature, window)
            checks.append(difference(codes, expected))
        lines[f"temperature {temperature}"] = [(float(w), passes[w] / tokens) for w in WINDOWS]
        seconds = interleaved(
            {
                SINGLE: lambda t=temperature: sampling.sample_singly(1, t, None),
                WINDOWED: lambda t=temperature: sampling.sample_singly(1, t, WINDOW),
            },
            device=device,
        )
        row = Row(
            name=f"tokens per pass, composition at temperature {temperature}, {len(expected)} images",
            path=WINDOWED,
            against=SINGLE,
            target=2.0,
            ratio=tokens / passes[WINDOW],
            equal=(max(checks, key=lambda check: check.value),),
            seconds=seconds,
            threads=torch.get_num_threads(),
            note=f"The ratio is tokens over passes; the times are those of {len(CAPTIONS)} images.",
            extra={"tokens": tokens, "passes": passes},
        )
        shares = ", ".join(f"{window}: {passes[window] / tokens:.3f}" for window in WINDOWS)
        print(f"{row.name}: {row.ratio:.2f} of {row.target}; passes per token by window: {shares}", flush=True)
        rows.append(row)
    return rows, Series(x="tokens of a window", y="passes per token", lines=lines)


def compare_times(sampling: CountingSampler, device: str) -> tuple[list[Row], Series]:
    """Returns a row for every number of images at once, and the time per image by that number."""
    rows = []
    temperature = 0.7
    lines: dict[str, list[tuple[float, float]]] = {SINGLE: [], WINDOWED: []}
    for count in AT_ONCE:
        seeds = [seed(0, image) for image in range(count)]
        before = sampling.passes
        codes = sampling.sample(0, seeds, temperature, WINDOW)
        passes = sampling.passes - before
        row = compare(
            f"time, composition, {count} image{'s' * (count > 1)} at once",
            {
                SINGLE: lambda s=seeds: sampling.sample(0, s, temperature, None),
                WINDOWED: lambda s=seeds: sampling.sample(0, s, temperature, WINDOW),
            },
            path=WINDOWED,
            against=SINGLE,
            target=None,
            equal=(difference(codes, sampling.sample(0, seeds, temperature, None)),),
            device=device,
            note="A window waits for the slowest image, and a wider pass takes longer; so windows are for few "
            "images, and `DallePipeline` takes them for at most 4 at once.",
            extra={"passes": passes, "tokens": codes[0].numel()},
        )
        for path, times in row.seconds.items():
            lines[path].append((float(count), 1000 * sorted(times)[len(times) // 2] / count))
        rows.append(row)
    return rows, Series(x="images at once", y="ms per image", lines=lines)


def main() -> None:
    """Runs the benchmark and stores its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda (cpu)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prior, tokenizer = (
        load_model("composition", "prior", device=options.device),
        load_model("composition", "tokenizer"),
    )
    sampling = CountingSampler(prior, prior.encode_captions(tokenizer, CAPTIONS).to(options.device))
    by_passes, passes = count_passes(sampling, options.device)
    by_time, times = compare_times(sampling, options.device)
    path = store(
        "jacobi",
        f"python benchmarks/jacobi.py --threads {options.threads} --device {options.device}",
        by_passes + by_time,
        options.device,
        series={"Passes by window": passes, "Time by images at once": times},
    )
    print(path)


if __name__ == "__main__":
    main()
