"""Arguments of a call of the pipeline, checked before any work and without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from dalle_zoo.sampling import derive_seed
from dalle_zoo.sampling.jacobi import MAX_IMAGES
from dalle_zoo.values import as_integer

# P prompts, N candidates of a prompt

BATCH_SIZE = 64
"""Default number of images that are generated at once."""
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
    seed: int | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    prime: Image.Image | Tensor | None = None
    prime_rows: int | None = None
    window: int | None = None
    batch_size: int = BATCH_SIZE
    output_type: str = "pil"

    def __post_init__(self) -> None:
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if not isinstance(prompts, Sequence) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise TypeError(f"prompt must be a string or a non-empty list of strings, got {self.prompt!r}")
        if (broken := next((p for p in prompts if not _is_unicode(p)), None)) is not None:
            raise ValueError(f"prompt must be valid Unicode, got half a surrogate pair in {broken!r}")
        count = as_integer("num_images_per_prompt", self.num_images_per_prompt, least=1)
        checked = {"prompt": list(prompts), "num_images_per_prompt": count}
        checked["batch_size"] = as_integer("batch_size", self.batch_size, least=1)
        limits = {
            "rerank": (1, count, " (images to keep of num_images_per_prompt)"),
            "seed": (None, None, ""),
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
        self._check_window()
        self._check_generators()
        if self.prime is not None:
            check_prime(self.prime)
        elif self.prime_rows is not None:
            raise ValueError("prime_rows needs prime, the image whose top rows are kept")

    @property
    def prompts(self) -> list[str]:
        """All prompts."""
        prompts: list[str] = self.prompt
        return prompts

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
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {self.generator!r}")
        images = len(self.prompts) * self.num_images_per_prompt
        if several and len(given) != images:
            raise ValueError(f"expected {images} generators, one per image, got {len(given)}")

    def seeds(self) -> Tensor:
        """Returns one seed per image, int64 (P, N), and advances the generators."""
        prompts, count = len(self.prompts), self.num_images_per_prompt
        if isinstance(self.generator, Sequence):
            flat = [_random_seed(generator) for generator in self.generator]
        else:
            base = self.seed if self.seed is not None else _random_seed(self.generator)
            flat = [derive_seed(base, p, n) for p in range(prompts) for n in range(count)]
        return torch.tensor(flat, dtype=torch.long).view(prompts, count)


def check_prime(image: object) -> None:
    """Raises an error unless an image can be encoded: a PIL image, or finite pixels in [0, 1]."""
    if isinstance(image, Image.Image):
        return
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"prime must be a PIL image or a tensor of floating-point pixels, got {kind}: open it with PIL"
        )
    if image.numel() and not (float(image.amin()) >= 0 and float(image.amax()) <= 1):  # False for NaN too
        raise ValueError(
            f"prime must have pixels in [0, 1], got {float(image.amin()):g}..{float(image.amax()):g}: divide pixels "
            "of 0..255 by 255"
        )


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
