"""``dalle-zoo demo | generate | reconstruct``: generated images and reconstructions."""

from __future__ import annotations

import gc
import itertools
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dalle_zoo.cli.errors import UserError, check_device
from dalle_zoo.cli.outputs import check_file, check_folder
from dalle_zoo.cli.parser import parser
from dalle_zoo.files import check_ending
from dalle_zoo.workspaces import claimed_folder

DEMO_PROMPTS = (
    "a 3d emoji of a red apple",
    "a flat emoji of a grinning face",
    "a cartoon emoji of a blue heart",
    "a blob emoji of a star",
)
"""Captions of the demo's rows when none is asked for, all of the training set."""
DEMO_TEMPERATURE = 0.7
"""Where the bundled weights generate best (model_cards/emoji64.md)."""
DTYPES = ("float32", "bfloat16", "float16")
"""What a prior can compute in; float16 is slow on most CPUs."""


@contextmanager
def without_collection() -> Iterator[None]:
    """Disables Python's cyclic garbage collection during imports.

    Importing PyTorch creates half a million permanent objects; scanning them repeatedly takes a tenth of the time.
    """
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # once per process: later collections skip what was imported
            gc.freeze()
        gc.enable()


def demo(arguments: list[str]) -> None:
    """Sixteen images from the bundled weights."""
    p = parser("demo", "Generate a grid of 16 images with the bundled weights.")
    p.add_argument("prompt", nargs="?", help="caption (default: four of our own)")
    p.add_argument("--seed", type=int, default=0, help="seed (0)")
    p.add_argument("--out", type=Path, default=Path("demo.png"), help="PNG to write (demo.png, replaced)")
    options = p.parse_args(arguments)
    check_ending("--out", options.out)
    check_file("--out", options.out)
    prompts = [options.prompt] if options.prompt else list(DEMO_PROMPTS)
    start = time.perf_counter()
    with without_collection():
        from dalle_zoo.call import Call
        from dalle_zoo.pipeline import DallePipeline

    call = {"num_images_per_prompt": 16 // len(prompts), "seed": options.seed}
    Call(prompts, **call)  # raises for what cannot be generated
    pipe = DallePipeline.from_pretrained("emoji64")
    images = _with_bar(pipe, prompts, **call, temperature=DEMO_TEMPERATURE, output_type="pt")
    _save_sheet(images, prompts, columns=4, out=options.out)
    print(f"{options.out.resolve()}  ({time.perf_counter() - start:.1f} s)")


MODEL_HELP = "bundled name, folder such as ./mine, org/name, or weights that `dalle-zoo convert` knows (emoji64)"


def generate(arguments: list[str]) -> None:
    """Images from a prompt."""
    p = parser(
        "generate",
        "Generate images from a prompt.\n\n"
        '  dalle-zoo generate "a 3d emoji of a red apple" -n 16 --rerank 4 --seed 0 --out grid.png',
    )
    p.add_argument("prompt", nargs="+", help="captions, each in quotes")
    p.add_argument("--model", default="emoji64", help=MODEL_HELP)
    p.add_argument("-n", "--num-images", type=int, default=16, help="candidates of every caption (16)")
    p.add_argument("--rerank", type=int, help="keep so many, those the ranker scores best")
    p.add_argument("--seed", type=int, help="same seed, same images (default: a new one each time)")
    p.add_argument("--temperature", type=float, default=1.0, help="divides the logits (1)")
    p.add_argument("--top-k", type=int, help="sample among the k most likely image tokens")
    p.add_argument("--top-p", type=float, help="sample among the tokens that together reach p")
    p.add_argument("--guidance-scale", type=float, default=1.0, help="classifier-free guidance scale (1: none)")
    p.add_argument("--prime", type=Path, help="image whose top rows are kept")
    p.add_argument("--prime-rows", type=int, help="rows of the code grid to keep (half)")
    p.add_argument("--window", type=int, help="tokens run at once, guessed and checked: same images, for 1 to 4")
    p.add_argument("--batch-size", type=int, default=64, help="images at once (64)")
    p.add_argument("--device", default="cpu", help="cpu, cuda, … (cpu)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the prior (float32)")
    p.add_argument("--quantize", choices=("int8", "int4"), help="round the prior's matrices to 8 or 4 bits")
    p.add_argument("--out", type=Path, default=Path("grid.png"), help="the grid, a PNG (grid.png)")
    p.add_argument("--folder", type=Path, help="also write every image to this folder")
    p.add_argument("--overwrite", action="store_true", help="replace the grid, and the images of the previous call")
    options = p.parse_args(arguments)
    _check_out(options.out, options.overwrite)
    if options.folder is None:
        _generate(options)
        return
    check_folder("--folder", options.folder, overwrite=options.overwrite)
    with claimed_folder(options.folder):
        check_folder("--folder", options.folder, overwrite=options.overwrite)  # another call may just have ended
        _generate(options)


def _generate(options: Namespace) -> None:
    with without_collection():
        import torch

        from dalle_zoo.call import Call
        from dalle_zoo.images import save_images, to_pil
        from dalle_zoo.pipeline import DallePipeline
        from dalle_zoo.sampling import SamplingOptions

    check_device(options.device)
    sampling = SamplingOptions(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        guidance_scale=options.guidance_scale,
    )
    call = {
        "num_images_per_prompt": options.num_images,
        "rerank": options.rerank,
        "seed": options.seed,
        "prime": _open_image(options.prime) if options.prime else None,
        "prime_rows": options.prime_rows,
        "window": options.window,
        "batch_size": options.batch_size,
    }
    Call(options.prompt, **call)  # raises for what no model can generate
    dtype = getattr(torch, options.dtype)
    pipe = DallePipeline.from_pretrained(options.model, device=options.device, dtype=dtype, quantize=options.quantize)
    images = _with_bar(pipe, options.prompt, **call, **asdict(sampling), output_type="pt")
    each = options.rerank or options.num_images
    if options.folder:
        names = (f"{index // each:03d}-{index % each:03d}.png" for index in itertools.count())
        save_images(dict(zip(names, to_pil(images), strict=False)), options.folder)
    columns = each if len(options.prompt) > 1 else _columns(each)
    _save_sheet(images, options.prompt, columns=columns, out=options.out)
    print(options.out.resolve())


def reconstruct(arguments: list[str]) -> None:
    """Images through the image tokenizer and back, side by side."""
    p = parser("reconstruct", "Put images through the image tokenizer and back: originals above, results below.")
    p.add_argument("files", nargs="+", type=Path, help="images")
    p.add_argument("--model", default="emoji64", help=MODEL_HELP)
    p.add_argument("--out", type=Path, default=Path("reconstructions.png"), help="PNG to write (reconstructions.png)")
    p.add_argument("--overwrite", action="store_true", help="replace an existing file")
    options = p.parse_args(arguments)
    _check_out(options.out, options.overwrite)

    import torch

    from dalle_zoo.data import center_transform
    from dalle_zoo.images import image_rows, psnr, save_png
    from dalle_zoo.networks import load_image_tokenizer
    from dalle_zoo.zoo import find_component

    net = load_image_tokenizer(find_component(options.model, "dvae"))
    images = torch.stack([center_transform(_open_image(path), net.image_size) for path in options.files]).float() / 255
    with torch.inference_mode():
        back = net.decode(net.encode(images))
    for path, value in zip(options.files, psnr(back, images).tolist(), strict=True):
        print(f"{path}: {value:.1f} dB")
    print(save_png(image_rows(images, back), options.out).resolve())


def _check_out(path: Path, overwrite: bool) -> None:
    """Refuses what cannot be written, before any work."""
    check_ending("--out", path)
    check_file("--out", path, overwrite=overwrite)


def _open_image(path: Path) -> Any:
    from dalle_zoo.data import CorruptImageError, decode_image

    if path.is_dir():
        raise UserError(f"{path} is a folder: expected an image file")
    try:
        return decode_image(path.read_bytes())
    except CorruptImageError as error:
        raise UserError(f"{path}: {error}") from None


def _columns(count: int) -> int:
    """Columns of a nearly square grid."""
    return next(c for c in range(1, count + 1) if c * c >= count)


def _with_bar(pipe: Any, prompts: list[str], **options: Any) -> Any:
    """Calls the pipeline with a progress bar over all tokens."""
    from tqdm import tqdm

    with tqdm(unit="token", desc="sampling") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return pipe(prompts, callback=show, **options).images


def _save_sheet(images: Any, prompts: list[str], columns: int, out: Path) -> None:
    """A grid with the captions written above their images."""
    from dalle_zoo.images import caption_sheet, save_png

    save_png(caption_sheet(images, prompts, columns), out)


__all__ = ["demo", "generate", "reconstruct"]
