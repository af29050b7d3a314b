"""What the commands that generate images share: options of sampling, regions, devices, progress, and the sheet."""

from __future__ import annotations

import gc
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dalle_zoo.cli.errors import UserError, check_device
from dalle_zoo.cli.outputs import check_file
from dalle_zoo.files import check_ending

DTYPES = ("float32", "bfloat16", "float16")
"""What a prior can compute in; float16 is slow on most CPUs."""


MODEL_HELP = "bundled name, folder such as ./mine, org/name, or weights that `dalle-zoo convert` knows [emoji64]"


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


def choose_device(name: str) -> str:
    """Returns the device of that name; for "auto", a GPU if PyTorch sees one, otherwise the CPU."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    check_device(name)
    return name


def sampling_options(options: Namespace) -> Any:
    """Returns the `SamplingOptions` of a command line."""
    from dalle_zoo.sampling import SamplingOptions

    names = ("temperature", "top_k", "top_p", "guidance_scale")
    return SamplingOptions(**{n: getattr(options, n) for n in names if getattr(options, n) is not None})


def region(options: Namespace) -> dict[str, Any]:
    """Returns the image of a command line, and which part of it is kept, as arguments of the pipeline."""
    image, mask = (None if path is None else open_image(path) for path in (options.image, options.mask))
    if options.shift is not None:
        if image is None:
            raise UserError("--shift needs --image, the image that is moved")
        from dalle_zoo.regions import shift_image

        if mask is not None or options.prime_rows is not None:
            raise UserError("--shift makes a mask of its own: omit --mask and --prime-rows")
        image, mask = shift_image(image, *options.shift)
    return {"image": image, "mask": mask, "prime_rows": options.prime_rows}


def check_out(path: Path, overwrite: bool) -> None:
    """Refuses what cannot be written, before any work."""
    check_ending("--out", path)
    check_file("--out", path, overwrite=overwrite)


def open_image(path: Path) -> Any:
    """Opens an image file as training would, or raises `UserError`."""
    from dalle_zoo.data import CorruptImageError, decode_image

    if path.is_dir():
        raise UserError(f"{path} is a folder: expected an image file")
    try:
        return decode_image(path.read_bytes())
    except CorruptImageError as error:
        raise UserError(f"{path}: {error}") from None


def square_columns(count: int) -> int:
    """Columns of a nearly square grid."""
    return next(c for c in range(1, count + 1) if c * c >= count)


def with_bar(pipe: Any, prompts: list[str], **options: Any) -> Any:
    """Calls the pipeline with a progress bar over all tokens, which appears with the first one."""
    from tqdm import tqdm

    with ExitStack() as stack:
        bars: list[tqdm[Any]] = []

        def show(progress: Any) -> None:
            if not bars:  # an argument that the model refuses leaves no empty bar above the message
                bars.append(stack.enter_context(tqdm(total=progress.total, unit="token", desc="sampling")))
            bars[0].update(progress.done - bars[0].n)

        return pipe(prompts, callback=show, **options)


def save_sheet(images: Any, prompts: list[str], columns: int, out: Path) -> None:
    """A grid with the captions written above their images."""
    from dalle_zoo.images import caption_sheet, save_png

    save_png(caption_sheet(images, prompts, columns), out)
