"""``dalle-zoo demo``: a grid of images from the bundled weights."""

from __future__ import annotations

import time
from pathlib import Path

from dalle_zoo.cli.outputs import check_file
from dalle_zoo.cli.parser import parser
from dalle_zoo.cli.sampling import save_sheet, without_collection
from dalle_zoo.files import check_ending
from dalle_zoo.zoo import DEFAULT_MODEL

DEMO_PROMPTS = (
    "a 3d emoji of a red apple",
    "a flat emoji of a grinning face",
    "a cartoon emoji of a blue heart",
    "a blob emoji of a star",
)
"""Prompts of the demo's rows by default, all of the training set."""
DEMO_TEMPERATURE = 0.7
"""Where the bundled weights generate best (model_cards/emoji64.md)."""


def demo(arguments: list[str]) -> None:
    """Generates sixteen images with the bundled weights."""
    p = parser("demo", "Generate a grid of 16 images with the bundled weights.")
    p.add_argument("prompt", nargs="?", help="prompt [four built-in prompts]")
    p.add_argument("--seed", type=int, default=0, help="seed [0]")
    p.add_argument("--out", type=Path, default=Path("demo.png"), help="PNG file to write; it is replaced [demo.png]")
    options = p.parse_args(arguments)
    check_ending("--out", options.out)
    check_file("--out", options.out)
    prompts = list(DEMO_PROMPTS) if options.prompt is None else [options.prompt]
    start = time.perf_counter()
    with without_collection():
        from dalle_zoo.call import Call
        from dalle_zoo.pipeline import DallePipeline

    call = {"num_images_per_prompt": 16 // len(prompts), "seed": options.seed}
    Call(prompts, **call)  # raises for what cannot be generated
    pipe = DallePipeline.from_pretrained(DEFAULT_MODEL)
    images = pipe(prompts, **call, temperature=DEMO_TEMPERATURE, output_type="pt").images
    save_sheet(images, prompts, columns=4, out=options.out)
    print(f"{options.out.resolve()}  ({time.perf_counter() - start:.1f} s)")
