"""Requests of clients: limits, fields, and the PNG files of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from dalle_zoo.call import Call
from dalle_zoo.image_settings import ImageSettings
from dalle_zoo.images import png_bytes, to_pil
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.regions import ranks_by_likelihood
from dalle_zoo.sampling import check_given
from dalle_zoo.web.engine import Answer, Preview, Request


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request."""

    max_images: int = 16
    """Largest number of images. Defaults to 16."""
    max_prompt: int = 1000
    """Longest prompt, characters. Defaults to 1000."""
    stored_images: int = 256
    """Number of recent images that answers with URLs keep in memory. Defaults to 256."""


class GenerationRequest(BaseModel):
    """Body of ``POST /v1/images/generations``: OpenAI's fields, and those of `SamplingDefaults.options`."""

    # Clients send fields of other models, such as quality. As everywhere, 3.0, "3" and true are no integers.
    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: str
    n: int = 1
    size: str | None = None
    response_format: Literal["url", "b64_json"] = "url"
    model: str | None = None
    seed: int | None = None
    rerank: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _omit_null(cls, values: Any) -> Any:
        """Takes null for an omitted field, as OpenAI's API does."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    def to_request(
        self, pipe: DallePipeline, limits: Limits, *, given: Tensor | None = None, on_progress: Preview | None = None
    ) -> Request:
        """Checks the fields and converts them to a request of the engine.

        Args:
            pipe: The pipeline that will run it.
            limits: Limits of a request.
            given: Codes to keep, int64 (h, w), with `SAMPLE` where to sample. Defaults to none.
            on_progress: Called after every pass, see `Request`. Defaults to none.

        Raises:
            ValueError: A value is out of range, or the model cannot do it; the message says what to do.
        """
        self._check(pipe, limits)
        options = pipe.sampling.options(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, guidance_scale=self.guidance_scale
        )
        if options.guided:
            pipe.prior.null_text()  # raises an error if the model has no empty caption
        if given is not None:
            check_given(pipe.prior.config, given[None], prompts=1)
        call = Call(self.prompt, self.n, self.rerank, self.seed, negative_prompt=self.negative_prompt, options=options)
        if self.rerank is not None and not ranks_by_likelihood(given) and pipe.ranker is None:
            raise ValueError("rerank needs a ranker, and this model has none: omit rerank")
        return Request(
            prompt=self.prompt,
            seeds=tuple(call.seeds()[0].tolist()),
            options=options,
            rerank=call.rerank,
            negative_prompt=self.negative_prompt,
            given=given,
            on_progress=on_progress,
        )

    def _check(self, pipe: DallePipeline, limits: Limits) -> None:
        height, width = pipe.image_size
        if not self.prompt.strip():
            raise ValueError("prompt is empty: describe the image")
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt or "")):
            if len(text) > limits.max_prompt:
                raise ValueError(
                    f"{name} has {len(text)} characters, at most {limits.max_prompt} are allowed: shorten it"
                )
        if not 1 <= self.n <= limits.max_images:
            raise ValueError(f"n must be in 1..{limits.max_images}, got {self.n}")
        if self.size not in (None, "auto", f"{width}x{height}"):
            raise ValueError(f"size must be {width}x{height}, the size of this model's images, got {self.size!r}")
        if self.model not in (None, pipe.location):
            raise ValueError(f"this server has the model {pipe.location}, not {self.model!r}")


def notes(request: Request, pipe: DallePipeline) -> list[str]:
    """What a client should know of the texts of a request, see `DallePipeline.prompt_notes`."""
    texts = dict.fromkeys(text for text in (request.prompt, request.negative_prompt) if text)
    return [note for text in texts for note in pipe.prompt_notes(text)]


def png_files(answer: Answer, request: Request, pipe: DallePipeline) -> list[bytes]:
    """PNG files of an answer, each with its settings."""
    common: dict[str, Any] = pipe.common_settings(request.options, request.given)
    scores = answer.scores or (None,) * len(answer.seeds)
    return [
        png_bytes(
            image,
            ImageSettings(
                prompt=request.prompt, negative_prompt=request.negative_prompt, seed=seed, score=score, **common
            ),
        )
        for image, seed, score in zip(to_pil(answer.images), answer.seeds, scores, strict=True)
    ]
