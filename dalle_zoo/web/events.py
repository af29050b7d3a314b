"""Actions of the web page: generating the images of its form, and restoring the settings of an image."""

from __future__ import annotations

import asyncio
import html
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image
from torch import Tensor

from dalle_zoo.image_settings import read_settings
from dalle_zoo.images import to_pil
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.sampling import Progress
from dalle_zoo.values import as_integer
from dalle_zoo.web.engine import Answer, Engine, QueueFullError, Request
from dalle_zoo.web.generation import GenerationRequest, Limits, notes, png_files

PREVIEW_SECONDS = 0.3
"""Shortest time between two previews."""


class Watch:
    """The newest progress of a request: the engine's thread writes it, the page reads it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: tuple[int, int, Tensor] | None = None

    def see(self, progress: Progress) -> None:
        """Keeps the codes of a complete row."""
        width = progress.codes.shape[-1]
        if progress.done % width == 0:
            with self._lock:
                self._state = progress.done, progress.total, progress.codes[0].cpu()

    def take(self) -> tuple[int, int, Tensor] | None:
        """Tokens sampled, tokens in total, and codes (n, h, w), if they are new."""
        with self._lock:
            state, self._state = self._state, None
        return state


async def generate(
    engine: Engine,
    limits: Limits,
    prompt: str,
    candidates: float,
    keep_best: float,
    seed: str,
    temperature: float,
    top_k: float | None,
    top_p: float | None,
    guidance_scale: float,
    negative_prompt: str,
    editor: dict[str, Any] | None,
    restored: str | None,
) -> AsyncIterator[tuple[Any, Any, str]]:
    """Yields gallery, files and status: while the images appear, and when they are complete.

    Args:
        engine: Runs the request.
        limits: Limits of a request.
        prompt: The prompt.
        candidates: Number of images to generate.
        keep_best: Number of images to keep, ranked; 0 keeps all of them.
        seed: Seed as text, since browsers round large numbers; empty for a random one.
        temperature: Divides the logits.
        top_k: Sample among the k most likely tokens; None or 0: among all.
        top_p: Sample among the tokens that together reach p; None or 0: among all.
        guidance_scale: Scale of guidance.
        negative_prompt: Text that guidance leads away from; empty for none.
        editor: Value of the image editor: an image, and white where it is generated again.
        restored: Path of an image whose kept codes are used, if the editor has no image.

    Raises:
        gr.Error: A value is out of range, the model cannot do it, or too many requests are waiting.
    """
    pipe, watch = engine.pipe, Watch()
    try:
        fields = GenerationRequest(
            prompt=prompt or "",
            n=whole("candidates", candidates),
            rerank=whole("keep the best", keep_best) or None,
            seed=parse_seed(seed or ""),
            temperature=temperature,
            top_k=whole("top k", top_k) if top_k else None,
            top_p=top_p or None,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt or None,
        )
        given = await asyncio.to_thread(kept_codes, pipe, editor, restored)
        request = fields.to_request(pipe, limits, given=given, on_progress=watch.see)
        noted = await asyncio.to_thread(notes, request, pipe)
        ticket = engine.submit(request)
    except (ValueError, TypeError, OSError, QueueFullError) as error:
        raise refusal(error, restored) from None
    future = asyncio.wrap_future(ticket.future)
    try:
        state = "Waiting for other requests …" if engine.waiting else "Generating …"
        yield [], None, "\n".join([state, *noted])
        while not future.done():
            await asyncio.wait([future], timeout=PREVIEW_SECONDS)
            if not future.done() and (seen := watch.take()) is not None:
                done, total, codes = seen
                images = await asyncio.to_thread(lambda codes: to_pil(pipe.preview(codes)), codes)
                yield images, None, "\n".join([f"{done} of {total} tokens", *noted])
    finally:
        if not future.done():
            ticket.cancel()
    if ticket.canceled:
        raise refusal(RuntimeError("the server is shutting down"))
    answer = future.result()
    with TemporaryDirectory(prefix="dalle-zoo-") as folder:  # gradio copies the files before the generator continues
        paths = await asyncio.to_thread(write_files, answer, request, pipe, Path(folder))
        yield list(zip(paths, captions(answer), strict=True)), paths, "\n".join([summary(answer), *noted])


def kept_codes(pipe: DallePipeline, editor: dict[str, Any] | None, restored: str | None) -> Tensor | None:
    """Codes to keep: those of the editor's image or, without one, those in the settings of a restored image.

    Raises:
        ValueError: Nothing is painted, so nothing would be generated.
    """
    image = (editor or {}).get("background")
    if editor is None or image is None:
        return None if restored is None else read_settings(restored).given_codes()
    mask = painted(editor["layers"], image.size)
    if mask.getbbox() is None:
        raise ValueError("nothing of the image is painted white: paint over what to generate, or remove the image")
    return pipe.kept_codes(image, mask=mask)


def painted(layers: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image:
    """The mask of the editor: white where any layer is painted."""
    mask = np.zeros((size[1], size[0]), dtype=bool)
    for layer in layers:
        mask |= np.asarray(layer.convert("RGBA").resize(size).getchannel("A")) > 0
    return Image.fromarray(mask.astype(np.uint8) * 255)


def whole(name: str, value: object) -> int:
    """Returns a number of a slider as an integer; browsers send 8.0 or 8."""
    return as_integer(name, int(value) if isinstance(value, float) and value.is_integer() else value)


def parse_seed(text: str) -> int | None:
    """Returns the seed that a user typed; None for a random one.

    Raises:
        ValueError: It is no integer.
    """
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"seed must be an integer, or empty for a random one, got {text[:40]!r}") from None


def write_files(answer: Answer, request: Request, pipe: DallePipeline, folder: Path) -> list[str]:
    """Writes the images with their settings, and returns their paths."""
    paths = []
    for index, data in enumerate(png_files(answer, request, pipe)):
        path = folder / f"{index:03d}-{answer.seeds[index]}.png"
        path.write_bytes(data)
        paths.append(str(path))
    return paths


def captions(answer: Answer) -> list[str]:
    """Seed, and score if there is one, of every image."""
    scores = answer.scores or (None,) * len(answer.seeds)
    return [
        f"seed {seed}" if score is None else f"score {score:.3f}, seed {seed}"
        for seed, score in zip(answer.seeds, scores, strict=True)
    ]


def summary(answer: Answer) -> str:
    """Returns a summary of an answer in one line."""
    images = f"{len(answer.seeds)} image{'s' * (len(answer.seeds) > 1)}"
    return f"{images} in {answer.seconds:.1f} s. Seed of the first: {answer.seeds[0]}"


def restore(pipe: DallePipeline, path: str) -> list[Any]:
    """Values of the form with which an image is generated again: one candidate with its seed.

    Raises:
        gr.Error: The file has no settings.
    """
    try:
        settings = read_settings(path)
    except (ValueError, OSError) as error:
        raise refusal(error, path) from None
    here = pipe.common_settings(settings.options())
    if any(getattr(settings, name) != here[name] for name in ("model_digest", "dtype", "quantize")):
        gr.Warning("The image was generated with another model or precision, so its pixels will differ.")
    return [
        settings.prompt,
        1,
        0,
        str(settings.seed),
        settings.temperature,
        settings.top_k or 0,
        settings.top_p or 0,
        settings.guidance_scale,
        settings.negative_prompt,
    ]


def refusal(error: Exception, path: str | None = None) -> gr.Error:
    """Returns the message of an error as HTML for the page; paths of the server are reduced to file names."""
    text = str(error) if path is None else str(error).replace(path, Path(path).name)
    return gr.Error(html.escape(text), print_exception=False)
