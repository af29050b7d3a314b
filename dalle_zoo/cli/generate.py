"""``dalle-zoo generate``: images from prompts."""

from __future__ import annotations

import secrets
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.outputs import check_folder
from dalle_zoo.cli.parser import parser
from dalle_zoo.cli.sampling import (
    DTYPES,
    MODEL_HELP,
    check_out,
    checked_call,
    choose_device,
    region,
    save_sheet,
    stated_options,
    without_collection,
)
from dalle_zoo.workspaces import claimed_folder
from dalle_zoo.zoo import DEFAULT_MODEL, check_location

if TYPE_CHECKING:
    from dalle_zoo.image_settings import ImageSettings
    from dalle_zoo.models.quantization import Bits

MOST_COLUMNS = 8
"""Images in a row of a grid for several prompts."""


def generate(arguments: list[str]) -> None:
    """Generates images from prompts."""
    p = parser(
        "generate",
        "Generate images from prompts.\n\n"
        '  dalle-zoo generate "a red apple" -n 16 --rerank 4 --seed 0 --out grid.png\n'
        '  dalle-zoo generate "a red apple" --image photo.png --mask mask.png    generate the white part again\n'
        "  dalle-zoo generate --prompts prompts.txt --folder images              an image file per image, resumable\n"
        "  dalle-zoo generate --like image.png                                   the same image again",
    )
    p.add_argument("prompt", nargs="*", help="one or more prompts, each in quotes")
    p.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts, one per line (.txt) or JSON object (.jsonl); -: standard input",
    )
    p.add_argument("--like", type=Path, metavar="PNG", help="generate an image again from its own settings")
    p.add_argument("--model", help=MODEL_HELP)
    p.add_argument("-n", "--num-images", type=int, help="number of images per prompt [16; 1 with --prompts]")
    p.add_argument("--rerank", type=int, help="number of images to keep per prompt, ranked by score [all]")
    p.add_argument("--seed", type=int, help="seed for sampling; the same seed gives the same images [random]")
    p.add_argument("--temperature", type=float, help="sampling temperature [the model's]")
    p.add_argument("--top-k", type=int, help="sample among the k most likely image tokens [all]")
    p.add_argument("--top-p", type=float, help="sample among the most likely tokens that together reach p [all]")
    p.add_argument("--guidance-scale", type=float, help="classifier-free guidance scale [the model's; 1: no guidance]")
    p.add_argument("--negative-prompt", help="text that guidance leads away from [the empty caption]")
    p.add_argument("--image", type=Path, help="image of which a part is kept")
    p.add_argument("--mask", type=Path, help="which part of it is generated again: white pixels")
    p.add_argument(
        "--shift",
        nargs=2,
        type=int,
        metavar=("X", "Y"),
        help="move the image by pixels and generate what becomes empty",
    )
    p.add_argument("--prime-rows", type=int, help="rows of the code grid to keep, without a mask [half]")
    p.add_argument(
        "--window",
        type=int,
        help="tokens guessed and checked per pass; same images, faster for at most 4 images [off]",
    )
    p.add_argument("--batch-size", type=int, default=64, help="images generated at once [64]")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, … [auto: a GPU if there is one]")
    p.add_argument("--dtype", choices=DTYPES, help="precision of the prior [float32]")
    p.add_argument("--quantize", choices=("int8", "int4"), help="round the prior's matrices to 8 or 4 bits")
    p.add_argument("--out", type=Path, help="the grid, a PNG file [grid.png]")
    p.add_argument("--folder", type=Path, help="also write every image to this folder [images, with --prompts]")
    p.add_argument("--overwrite", action="store_true", help="replace the grid, and the images of the previous call")
    options = p.parse_args(arguments)
    _check_source(options)
    if options.prompts is not None:
        from dalle_zoo.cli.prompt_file import generate_file

        generate_file(options)
        return
    request = _request(options)
    options.out = options.out or Path("grid.png")
    check_out(options.out, options.overwrite)
    if options.folder is None:
        _generate(options, request)
        return
    check_folder("--folder", options.folder, overwrite=options.overwrite)
    with claimed_folder(options.folder):
        check_folder("--folder", options.folder, overwrite=options.overwrite)  # another call may just have ended
        _generate(options, request)


def _check_source(options: Namespace) -> None:
    """Raises `UserError` unless the prompts come from one place."""
    sources = [name for name in ("prompt", "prompts", "like") if getattr(options, name)]
    if len(sources) != 1:
        raise UserError(f"give one of PROMPT, --prompts FILE and --like PNG, got {', '.join(sources) or 'none'}")
    for prompt in options.prompt:
        if _is_file(prompt):
            raise UserError(f"{prompt} is a file: use --prompts {prompt} for the prompts in it, or describe the image")
    if options.like:
        fixed = ("model", "num_images", "rerank", "seed", "temperature", "top_k", "top_p", "guidance_scale",
                 "negative_prompt", "image", "mask", "shift", "prime_rows", "dtype", "quantize")  # fmt: skip
        if given := [f"--{name.replace('_', '-')}" for name in fixed if getattr(options, name) is not None]:
            raise UserError(f"--like takes all settings from the file, and {', '.join(given)} would change them")
    if options.model is not None:
        check_location(options.model)


def _is_file(prompt: str) -> bool:
    try:
        return Path(prompt).is_file()
    except (OSError, ValueError):  # a prompt may be longer than the name of a file, or have a null character
        return False


@dataclass(frozen=True)
class _Request:
    """Checked arguments of a call of the pipeline."""

    prompts: list[str]
    call: dict[str, Any]
    stated: dict[str, Any]
    """Options of sampling that the command line states; the model has the others."""
    like: ImageSettings | None
    """Settings of the image that is generated again."""


def _request(options: Namespace) -> _Request:
    """Returns what the options ask for, or raises an error for what no model can generate."""
    with without_collection():
        from dalle_zoo.image_settings import read_settings

    like = read_settings(options.like) if options.like else None
    stated = stated_options(options) if like is None else asdict(like.options())
    prompts = options.prompt if like is None else [like.prompt]
    call = region(options) | {
        "num_images_per_prompt": 1 if like is not None else 16 if options.num_images is None else options.num_images,
        "rerank": options.rerank,
        "seed": like.seed if like is not None else secrets.randbits(62) if options.seed is None else options.seed,
        "negative_prompt": options.negative_prompt if like is None else like.negative_prompt,
        "window": options.window,
        "batch_size": options.batch_size,
    }
    checked_call(prompts, stated, **call)
    return _Request(prompts, call, stated, like)


def _generate(options: Namespace, request: _Request) -> None:
    with without_collection():
        import torch

        from dalle_zoo.images import save_images, save_png, square_columns, to_pil
        from dalle_zoo.pipeline import DallePipeline

    device = choose_device(options.device)
    prompts, call, like = request.prompts, request.call, request.like
    dtype = getattr(torch, options.dtype or (like.dtype if like else "float32"))
    quantize: Bits | None = like.quantize if like else options.quantize
    pipe = DallePipeline.from_pretrained(
        like.model if like else DEFAULT_MODEL if options.model is None else options.model,
        device=device,
        dtype=dtype,
        quantize=quantize,
    )
    if like is not None:
        call |= {"given": like.given_codes()}
        if like.model_digest != pipe.digest:
            raise UserError(f"{options.like} was generated with other weights of {like.model}: pixels would differ")
    output = pipe(prompts, **call, **request.stated, output_type="pt")
    each = len(output.images) // len(prompts)
    settings = output.settings if like is None else [like]  # with the score it was chosen for
    if options.folder:
        named = zip(to_pil(output.images), settings, strict=True)
        save_images({f"{k // each:03d}-{k % each:03d}.png": image for k, image in enumerate(named)}, options.folder)
    columns = min(each, MOST_COLUMNS) if len(prompts) > 1 else square_columns(each)
    if len(output.images) == 1:
        save_png(to_pil(output.images)[0], options.out, settings[0])
    else:
        save_sheet(output.images, prompts, columns=columns, out=options.out)
    if like is None:
        print(f"seed: {call['seed']} (repeat with --seed {call['seed']})")
        if len(settings) > 1:
            print("seeds of the images:", ", ".join(str(each.seed) for each in settings))
    print(options.out.resolve())
