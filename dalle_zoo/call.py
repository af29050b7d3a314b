"""Arguments of a call of the pipeline, checked before any work and without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_zoo.images import upright
from dalle_zoo.sampling import SamplingOptions, derive_seed
from dalle_zoo.sampling.jacobi import MAX_IMAGES
from dalle_zoo.values import as_integer, shown

# P prompts, N candidates of a prompt

BATCH_SIZE = 64
"""Default number of images that are generated at once."""
MOST_IMAGES = 100_000
"""Largest number of images of a call, which holds all of them in memory."""
OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass(frozen=True)
class Call:
    """Arguments of `DallePipeline.__call__`, which explains them, with integers of numpy as plain ones.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range, or two do not fit each other.
    """

    prompt: Any
    num_images_per_prompt: int = 1
    rerank: int | None = None
    seed: int | Sequence[int] | Tensor | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    image: Image.Image | Tensor | None = None
    mask: Image.Image | Tensor | None = None
    prime_rows: int | None = None
    given: Tensor | None = None
    negative_prompt: str | Sequence[str] | None = None
    window: int | None = None
    batch_size: int = BATCH_SIZE
    output_type: str = "pil"
    callback: Any = None
    options: SamplingOptions | None = None
    """Temperature, filters and guidance. None: those of a model that is not loaded yet, so that nobody knows whether a
    negative prompt acts."""

    def __post_init__(self) -> None:
        prompts = as_texts("prompt", self.prompt)
        count = as_integer("num_images_per_prompt", self.num_images_per_prompt, least=1)
        if len(prompts) * count > MOST_IMAGES:
            raise ValueError(
                f"a call holds its images in memory: expected at most {MOST_IMAGES:,}, got {len(prompts) * count:,} "
                f"({len(prompts)} prompts, num_images_per_prompt {count:,}); generate them in several calls"
            )
        checked: dict[str, Any] = {"prompt": prompts, "num_images_per_prompt": count}
        if self.negative_prompt is not None:
            negative = as_texts("negative_prompt", self.negative_prompt)
            if self.options is not None and not self.options.guided:
                raise ValueError("negative_prompt acts through guidance: set guidance_scale to another value than 1")
            if len(negative) not in (1, len(prompts)):
                raise ValueError(f"negative_prompt must be one text, or one for each of {len(prompts)} prompts")
            checked["negative_prompt"] = negative * len(prompts) if len(negative) == 1 else negative
        if self.seed is not None:
            checked["seed"] = _seeds(self.seed, len(prompts) * count)
        checked["batch_size"] = as_integer("batch_size", self.batch_size, least=1)
        limits = {
            "rerank": (1, count, " (images to keep of num_images_per_prompt)"),
            "prime_rows": (1, None, ""),
            "window": (1, None, ""),
        }
        for name, (least, most, meaning) in limits.items():
            if getattr(self, name) is not None:
                checked[name] = as_integer(name, getattr(self, name), least=least, most=most, meaning=meaning)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.output_type not in get_args(OutputType):
            raise ValueError(f"output_type must be one of {', '.join(get_args(OutputType))}, got {self.output_type!r}")
        check_callback(self.callback)
        self._check_window()
        self._check_generators()
        self._check_region()

    @property
    def prompts(self) -> list[str]:
        """All prompts."""
        prompts: list[str] = self.prompt
        return prompts

    def _check_region(self) -> None:
        if self.given is not None:
            check_ids("given", self.given)
            if self.given.ndim != 2:
                raise ValueError(
                    f"given must have shape (h, w), the same for all prompts, got {tuple(self.given.shape)}"
                )
            if self.image is not None:
                raise ValueError("give image or given, not both: each states codes that are kept")
        if self.image is None:
            for name in ("mask", "prime_rows"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs image, the image of which a part is kept")
            return
        check_image(self.image)
        if self.mask is None:
            return
        if self.prime_rows is not None:
            raise ValueError("give mask or prime_rows, not both: each states which part of the image is kept")
        check_mask(self.mask)
        sizes = [upright(each).size if isinstance(each, Image.Image) else None for each in (self.image, self.mask)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(f"image and mask must have the same size, got {sizes[0]} and {sizes[1]}")

    def _check_window(self) -> None:
        at_once = min(self.batch_size, len(self.prompts) * self.num_images_per_prompt)
        if self.window is not None and at_once > MAX_IMAGES:
            raise ValueError(
                f"window is faster only for at most {MAX_IMAGES} images at once, got {at_once}: omit window, "
                f"or set batch_size to 1..{MAX_IMAGES}"
            )

    def _check_generators(self) -> None:
        if self.generator is None:
            return
        if self.seed is not None:
            raise ValueError("give seed or generator, not both")
        several = isinstance(self.generator, Sequence)
        given: list[Any] = [*self.generator] if isinstance(self.generator, Sequence) else [self.generator]
        if not all(isinstance(each, torch.Generator) for each in given):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {shown(self.generator)}")
        images = len(self.prompts) * self.num_images_per_prompt
        if several and len(given) != images:
            raise ValueError(f"expected {images} generators, one per image, got {len(given)}")

    def seeds(self) -> Tensor:
        """Returns one seed per image, int64 (P, N), and advances the generators.

        A single seed is that of the first image; those of the others are derived from it. So a seed that a call
        returned generates its image again.
        """
        prompts, count = len(self.prompts), self.num_images_per_prompt
        if isinstance(self.generator, Sequence):
            flat = [_random_seed(generator) for generator in self.generator]
        elif isinstance(self.seed, list):
            flat = self.seed
        else:
            base = int(self.seed) if isinstance(self.seed, int) else _random_seed(self.generator)
            flat = [derive_seed(base, p, n) for p in range(prompts) for n in range(count)]
            if 0 <= base < 2**63:
                flat[0] = base
        return torch.tensor(flat, dtype=torch.long).view(prompts, count)


def as_texts(name: str, value: object) -> list[str]:
    """Returns a text or a list of texts as a list.

    Args:
        name: Name of the argument, for messages.
        value: A string, or a sequence of strings.

    Raises:
        TypeError: The value is something else, or empty.
        ValueError: A text is not valid Unicode.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a string or a non-empty list of strings, got {shown(value)}")
    if (broken := next((text for text in texts if not _is_unicode(text)), None)) is not None:
        raise ValueError(f"{name} must be valid Unicode, got half a surrogate pair in {shown(broken)}")
    return list(texts)


def _seeds(value: object, images: int) -> int | list[int]:
    """Returns a seed, or a list of seeds of single images."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        value = value.flatten().tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return as_integer("seed", value, meaning=", or a list with one integer per image")
    if len(value) != images:
        raise ValueError(f"expected {images} seeds, one per image, or a single one, got {len(value)}")
    return [as_integer("seed", each, least=0, most=2**63 - 1) for each in value]


def check_ids(name: str, value: object) -> None:
    """Raises `TypeError` unless a value is a tensor of int64, such as codes, ids of text or seeds."""
    if not isinstance(value, Tensor) or value.dtype != torch.long:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {kind}")


def check_callback(callback: object) -> None:
    """Raises `TypeError` unless a callback can be called, or none is given."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of one Progress, got {shown(callback)}")


def check_image(image: object) -> None:
    """Raises an error unless an image can be encoded: a PIL image, or finite pixels in [0, 1]."""
    if isinstance(image, Image.Image):
        return
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"image must be a PIL image or a tensor of floating-point pixels, got {kind}: open it with PIL"
        )
    if image.numel() and not (float(image.amin()) >= 0 and float(image.amax()) <= 1):  # False for NaN too
        raise ValueError(
            f"image must have pixels in [0, 1], got {float(image.amin()):g}..{float(image.amax()):g}: divide pixels "
            "of 0..255 by 255"
        )


def check_images(images: object) -> None:
    """Raises an error unless images can be scored: a list of PIL images, or finite pixels in [0, 1], (B, 3, H, W)."""
    if isinstance(images, Tensor):
        check_image(images)
        return
    if not isinstance(images, Sequence) or not images or not all(isinstance(each, Image.Image) for each in images):
        raise TypeError(f"images must be a non-empty list of PIL images, or pixels (B, 3, H, W), got {shown(images)}")


def check_mask(mask: object) -> None:
    """Raises an error unless a mask is a PIL image, or a tensor of bool or of values in [0, 1]."""
    if isinstance(mask, Image.Image):
        return
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a PIL image or a tensor of bool or floating-point values, got {kind}")
    if mask.dtype != torch.bool and mask.numel() and not (float(mask.amin()) >= 0 and float(mask.amax()) <= 1):
        raise ValueError(f"mask must have values in [0, 1], got {float(mask.amin()):g}..{float(mask.amax()):g}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _random_seed(generator: torch.Generator | None) -> int:
    """Samples a seed from a generator, or from the global one, and advances it."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))
