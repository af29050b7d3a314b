"""``dalle-zoo demo``: a grid of images from the bundled weights."""

from __future__ import annotations

import time
from pathlib import Path

from dalle_zoo.cli.outputs import check_file
from dalle_zoo.cli.parser import parser
from dalle_zoo.cli.sampling import save_sheet, without_collection
from dalle_zoo.files import check_ending
from dalle_zoo.values import as_integer
from dalle_zoo.zoo import DEFAULT_MODEL

DEMO_PROMPTS = (
    "a cat",
    "pizza",
    "a rocket",
    "a robot",
    "a strawberry",
    "a flat emoji of a tree",
    "a blue apple",
    "a pink heart",
    "a blue dog",
    "a purple unicorn",
    "a cat on a pink background",
    "a rocket on a blue background",
    "three cars",
    "a dog to the left of a house",
    "a frog to the left of a robot",
    "a small star in the top right corner",
)
"""Prompts of the demo by default: things, and combinations most of which training never composes."""
IMAGES = 16
_COLUMNS, _PIXELS = 4, 192  # across the grid, and the side that an image is enlarged to


def demo(arguments: list[str]) -> None:
    """Generates sixteen images with the bundled weights."""
    p = parser("demo", "Generate a grid of 16 images with the bundled weights.")
    p.add_argument("prompt", nargs="?", help="prompt of all images [16 built-in prompts]")
    p.add_argument("--seed", type=int, default=0, help="seed [0]")
    ranked = "images for each one shown, of which the ranker keeps the best [1]"
    p.add_argument("--candidates", type=int, default=1, metavar="N", help=ranked)
    p.add_argument("--out", type=Path, default=Path("demo.png"), help="PNG file to write; it is replaced [demo.png]")
    options = p.parse_args(arguments)
    as_integer("--candidates", options.candidates, least=1)
    check_ending("--out", options.out)
    check_file("--out", options.out)
    single = options.prompt is not None
    prompts = [options.prompt] if single else list(DEMO_PROMPTS)
    start = time.perf_counter()
    with without_collection():
        from dalle_zoo.call import Call
        from dalle_zoo.pipeline import DallePipeline

    shown = IMAGES // len(prompts)
    rerank = shown if options.candidates > 1 else None  # the ranker takes seconds to import
    call = {"num_images_per_prompt": shown * options.candidates, "rerank": rerank, "seed": options.seed}
    Call(prompts, **call)  # raises for what cannot be generated
    pipe = DallePipeline.from_pretrained(DEFAULT_MODEL)
    images = pipe(prompts, **call, output_type="pt").images
    scale, across = max(1, _PIXELS // images.shape[-1]), 1 if single else _COLUMNS
    save_sheet(images, prompts, columns=_COLUMNS, out=options.out, scale=scale, across=across)
    print(f"{options.out.resolve()}  ({time.perf_counter() - start:.1f} s)")
