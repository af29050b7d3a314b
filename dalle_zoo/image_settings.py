"""Settings of a generated image in its PNG file, from which the image can be generated again.

They are stored in two text chunks: ``parameters`` in the format of AUTOMATIC1111's web UI, which other tools read, and
``dalle-zoo``, JSON with everything that determines the pixels.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, get_args

import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from dalle_zoo.files import FileError, escape_surrogates, parse_json
from dalle_zoo.models.quantization import Bits
from dalle_zoo.paths import user_path
from dalle_zoo.sampling import SamplingOptions
from dalle_zoo.version import __version__

KEY = "dalle-zoo"
"""Name of the text chunk with JSON."""
PARAMETERS = "parameters"
"""Name of the text chunk of AUTOMATIC1111's web UI."""
FORMAT = 1
"""Version of the JSON."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Dtypes in which a prior can compute."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Settings with which an image was generated."""

    prompt: str
    """The prompt."""
    seed: int
    """Seed of the image."""
    model: str
    """Name, folder or repository of the model."""
    model_digest: str | None = None
    """SHA-256 of the model's list of checksums; None for a model that was not loaded from a folder."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int | None = None
    """Number of most likely tokens from which tokens were sampled; None: all."""
    top_p: float | None = None
    """Total probability of the most likely tokens from which tokens were sampled; None: all tokens."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance."""
    negative_prompt: str | None = None
    """Prompt that replaces the empty caption in guidance; None: the empty caption."""
    given: tuple[tuple[int, ...], ...] | None = None
    """Rows of given codes, with -1 for sampled codes; None: all codes were sampled."""
    dtype: str = "float32"
    """Precision of the prior; other precisions round differently on other devices."""
    quantize: Bits | None = None
    """Format to which the prior's matrices were quantized; None: not quantized."""
    score: float | None = None
    """Score by which the image was ranked, from the ranker or as log-likelihood of given cells; None: unranked."""
    version: str = __version__
    """Version of dalle-zoo."""

    def options(self) -> SamplingOptions:
        """Returns temperature, filters and guidance."""
        return SamplingOptions(**{f.name: getattr(self, f.name) for f in fields(SamplingOptions)})

    def given_codes(self) -> Tensor | None:
        """Returns the given codes, int64 (h, w); None if all were sampled."""
        return None if self.given is None else torch.tensor(self.given)

    def parameters(self, width: int, height: int) -> str:
        """Returns the text of AUTOMATIC1111's web UI: prompt, negative prompt, and a line of named values.

        Args:
            width: Width of the image, pixels.
            height: Height of the image, pixels.
        """
        values: dict[str, Any] = {
            "CFG scale": self.guidance_scale,
            "Seed": self.seed,
            "Size": f"{width}x{height}",
            "Model hash": self.model_digest[:10] if self.model_digest else None,
            "Model": Path(self.model).name,
            "Temperature": self.temperature,
            "Top k": self.top_k,
            "Top p": self.top_p,
            "Version": f"dalle-zoo {self.version}",
        }
        lines = [self.prompt]
        if self.negative_prompt is not None:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None))
        return "\n".join(lines)

    def to_png(self, width: int, height: int) -> PngImagePlugin.PngInfo:
        """Returns the text chunks for `PIL.Image.Image.save` (``pnginfo``)."""
        info = PngImagePlugin.PngInfo()
        settings = json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, allow_nan=False)
        for key, text in ((PARAMETERS, self.parameters(width, height)), (KEY, settings)):
            info.add_itxt(key, escape_surrogates(text))  # of a folder whose name is not UTF-8
        return info

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> ImageSettings:
        """Checks and converts the JSON of an image.

        Args:
            values: The JSON object.
            where: Name of the file, for messages.

        Raises:
            FileError: A value is missing, unknown or of another type.
        """
        if values.get("format") != FORMAT:
            raise FileError(
                f"{where}: its settings have format {values.get('format')!r}, this version of dalle-zoo reads {FORMAT}"
                ": update dalle-zoo"
            )
        values = {name: value for name, value in values.items() if name != "format"}
        if unknown := sorted(values.keys() - {f.name for f in fields(cls)}):
            raise FileError(f"{where}: its settings have unknown names: {', '.join(unknown)}")
        for name, kinds in _KINDS.items():
            if name in values and not (isinstance(values[name], kinds) and not isinstance(values[name], bool)):
                raise FileError(f"{where}: {name} of its settings has an invalid value, {values[name]!r}")
        if missing := [name for name in ("prompt", "seed", "model") if name not in values]:
            raise FileError(f"{where}: its settings lack {', '.join(missing)}")
        if not 0 <= values["seed"] < 2**63:
            raise FileError(f"{where}: seed of its settings must be in 0..2^63 - 1, got {values['seed']}")
        for name, known in (("dtype", DTYPES), ("quantize", (None, *get_args(Bits)))):
            if name in values and values[name] not in known:
                raise FileError(f"{where}: {name} of its settings has an invalid value, {values[name]!r}")
        if values.get("given") is not None:
            values["given"] = _rows(values["given"], where)
        return cls(**values)


def _rows(given: list[Any], where: str) -> tuple[tuple[int, ...], ...]:
    """Checks the rows of codes of an image."""
    codes = [code for row in given if isinstance(row, list) for code in row]
    if not all(isinstance(row, list) for row in given) or not all(type(code) is int for code in codes):
        raise FileError(f"{where}: given of its settings must be rows of integers")
    if not codes or len({len(row) for row in given}) > 1 or not all(-1 <= code < 2**31 for code in codes):
        raise FileError(f"{where}: given of its settings must be rows of equal length, of codes or -1")
    return tuple(tuple(row) for row in given)


_NUMBER, _NONE = (int, float), type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,), "seed": (int,), "model": (str,), "model_digest": (str, _NONE), "temperature": _NUMBER,
    "top_k": (int, _NONE), "top_p": (*_NUMBER, _NONE), "guidance_scale": _NUMBER, "negative_prompt": (str, _NONE),
    "given": (list, _NONE), "dtype": (str,), "quantize": (str, _NONE), "score": (*_NUMBER, _NONE), "version": (str,),
}  # fmt: skip


def read_settings(path: str | Path | BinaryIO) -> ImageSettings:
    """Reads the settings of an image that dalle-zoo generated.

    Args:
        path: Path of a PNG file, or an open one.

    Raises:
        FileError: The file is not an image, or has no settings or damaged ones.
        OSError: The file cannot be read.

    Example:
        >>> read_settings("grid/000-000.png").prompt  # doctest: +SKIP
        'a red apple'
    """
    path = user_path(path) if not hasattr(path, "read") else path
    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
    except UnidentifiedImageError:
        raise FileError(f"{path} is not an image: expected a PNG file of dalle-zoo") from None
    except (ValueError, Image.DecompressionBombError) as error:  # Pillow's limits of text and of pixels
        raise FileError(f"{path}: {error}") from None
    except OSError as error:
        if error.strerror is not None:  # of the system
            raise
        raise FileError(f"{path} is damaged ({error}): copy or download it again") from None
    if not isinstance(text, str):
        raise FileError(
            f"{path} has no settings of dalle-zoo: it was not generated with dalle-zoo, or a program removed them"
        )
    return ImageSettings.from_dict(parse_json(text.encode(), str(path)), str(path))


def _quoted(value: Any) -> str:
    """Returns a value as written by the web UI: as JSON if it contains a separator."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else text
