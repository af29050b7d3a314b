"""What the commands that generate images share: options of sampling, regions, devices, and the sheet."""

from __future__ import annotations

import gc
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dalle_zoo.cli.errors import UserError, check_device
from dalle_zoo.cli.outputs import check_file
from dalle_zoo.files import check_ending
from dalle_zoo.zoo import DEFAULT_MODEL

DTYPES = ("float32", "bfloat16", "float16")
"""What a prior can compute in; float16 is slow on most CPUs."""


SAMPLING = ("temperature", "top_k", "top_p", "guidance_scale")
"""Names of the options of sampling, on the command line and in a file of prompts."""
MODEL_HELP = (
    f"bundled name, folder such as ./mine, org/name, or weights that `dalle-zoo convert` knows [{DEFAULT_MODEL}]"
)


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


def stated_options(options: Namespace) -> dict[str, Any]:
    """Returns the options of sampling that a command line states, checked; the model has the others."""
    from dalle_zoo.sampling import SamplingOptions

    stated = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    SamplingOptions(**stated)
    return stated


def checked_call(prompts: Any, stated: dict[str, Any], **arguments: Any) -> Any:
    """Returns the arguments of a call as `Call`, or raises an error for what no model can generate.

    Args:
        prompts: One prompt or several.
        stated: Options of sampling from `stated_options`.
        arguments: The other arguments of the pipeline.
    """
    from dalle_zoo.call import Call
    from dalle_zoo.sampling import SamplingOptions

    return Call(prompts, **arguments, options=SamplingOptions(**stated) if "guidance_scale" in stated else None)


def region(options: Namespace) -> dict[str, Any]:
    """Returns the image of a command line and its kept part as arguments of the pipeline."""
    if options.image is None:
        if options.shift is not None:
            raise UserError("--shift needs --image, the image that is moved")
        if options.mask is not None:
            raise UserError("--mask needs --image, the image of which a part is kept")
        return {"image": None, "mask": None, "prime_rows": options.prime_rows}
    image, mask = open_image(options.image), open_image(options.mask) if options.mask else None
    if options.shift is not None:
        from dalle_zoo.regions import shift_image

        if mask is not None or options.prime_rows is not None:
            raise UserError("--shift makes a mask of its own: omit --mask and --prime-rows")
        image, mask = shift_image(image, *options.shift)
    return {"image": image, "mask": mask, "prime_rows": options.prime_rows}


def check_out(path: Path, overwrite: bool) -> None:
    """Raises an error before any work if the output cannot be written."""
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


def save_sheet(images: Any, prompts: list[str], columns: int, out: Path, scale: int = 2, across: int = 1) -> None:
    """Writes a grid with captions above the images, see `caption_sheet`."""
    from dalle_zoo.images import save_png
    from dalle_zoo.sheets import caption_sheet

    save_png(caption_sheet(images, prompts, columns, scale, across), out)
