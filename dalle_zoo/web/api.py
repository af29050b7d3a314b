"""HTTP interface: OpenAI's image generation endpoint, served by an `Engine`.

```
POST /v1/images/generations   {"prompt", "n", "size", "response_format", "seed", ...} → {"created", "data": [...]}
GET  /v1/models               the model
GET  /v1/images/NAME.png      images of answers with response_format "url"
GET  /health                  {"status": "ok", "waiting": ...}
```
Errors have OpenAI's form, ``{"error": {"message", "type", "param", "code"}}``.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections import OrderedDict
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from dalle_zoo.call import Call
from dalle_zoo.image_settings import ImageSettings
from dalle_zoo.images import png_bytes, to_pil
from dalle_zoo.sampling import SamplingOptions
from dalle_zoo.version import __version__
from dalle_zoo.web.engine import Answer, Engine, QueueFullError, Request, Ticket

POLL = 0.25
"""Seconds between two checks that the client is still connected."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    max_images: int = 16
    """Largest number of images."""
    max_prompt: int = 1000
    """Longest prompt, characters."""
    stored_images: int = 256
    """Number of recent images that answers with URLs keep in memory."""


class GenerationRequest(BaseModel):
    """Body of ``POST /v1/images/generations``: OpenAI's fields, and those of `SamplingOptions`."""

    model_config = ConfigDict(extra="ignore")  # clients send fields of other models, such as quality

    prompt: str
    n: int = 1
    size: str | None = None
    response_format: Literal["url", "b64_json"] = "url"
    model: str | None = None
    seed: int | None = None
    rerank: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    negative_prompt: str | None = None


@dataclass
class Images:
    """Recent images by random name, the oldest of which are dropped."""

    limit: int
    stored: OrderedDict[str, bytes] = field(default_factory=OrderedDict)

    def add(self, data: bytes) -> str:
        """Stores an image and returns its name."""
        name = secrets.token_urlsafe(16)
        self.stored[name] = data
        while len(self.stored) > self.limit:
            self.stored.popitem(last=False)
        return name


def create_app(engine: Engine, *, limits: Limits | None = None, token: str | None = None) -> FastAPI:
    """Returns the application.

    Args:
        engine: Runs the requests; the caller closes it.
        limits: What one request may ask for. Defaults to `Limits`.
        token: Token that clients must send as ``Authorization: Bearer``. Defaults to none.
    """
    limits = limits or Limits()
    app = FastAPI(title="dalle-zoo", version=__version__, docs_url=None, redoc_url=None)
    images = Images(limits.stored_images)
    allowed = [Depends(_checker(token))]

    @app.exception_handler(HTTPException)
    async def explain(_: HTTPRequest, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def explain_body(_: HTTPRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return _error(400, f"{name or 'body'}: {first['msg']}", param=name or None)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": engine.waiting}

    @app.get("/v1/models", dependencies=allowed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": engine.pipe.location, "object": "model", "owned_by": "dalle-zoo"}]}

    @app.get("/v1/images/{name}.png", dependencies=allowed)
    async def image(name: str) -> Response:
        if name not in images.stored:
            raise HTTPException(404, "there is no such image: only recent ones are kept")
        return Response(images.stored[name], media_type="image/png")

    @app.post("/v1/images/generations", dependencies=allowed)
    async def generate(body: GenerationRequest, http: HTTPRequest) -> dict[str, Any]:
        request = to_request(body, engine, limits)
        try:
            ticket = engine.submit(request)
        except QueueFullError as error:
            raise HTTPException(429, str(error), headers={"Retry-After": str(error.retry_after)}) from None
        answer = await wait(ticket, http)
        files = await asyncio.to_thread(png_files, answer, request, engine)
        data = []
        for index, file in enumerate(files):
            shown = (
                {"b64_json": base64.b64encode(file).decode()}
                if body.response_format == "b64_json"
                else {"url": str(http.url_for("image", name=images.add(file)))}
            )
            score = None if answer.scores is None else answer.scores[index]
            data.append(shown | {"seed": answer.seeds[index], "score": score})
        return {"created": int(time.time()), "data": data, "model": engine.pipe.location}

    return app


def to_request(body: GenerationRequest, engine: Engine, limits: Limits) -> Request:
    """Checks a body and converts it to a request of the engine.

    Raises:
        HTTPException: A value is out of range, or the model cannot do it; the message says what to do.
    """
    height, width = engine.pipe.image_size
    try:
        if not body.prompt.strip():
            raise ValueError("prompt is empty: describe the image")
        if len(body.prompt) > limits.max_prompt:
            raise ValueError(f"prompt has {len(body.prompt)} characters, at most {limits.max_prompt} are allowed")
        if not 1 <= body.n <= limits.max_images:
            raise ValueError(f"n must be in 1..{limits.max_images}, got {body.n}")
        if body.size not in (None, "auto", f"{width}x{height}"):
            raise ValueError(f"size must be {width}x{height}, the size of this model's images, got {body.size!r}")
        if body.model not in (None, engine.pipe.location):
            raise ValueError(f"this server has the model {engine.pipe.location}, not {body.model!r}")
        call = Call(body.prompt, body.n, body.rerank, body.seed, negative_prompt=body.negative_prompt)
        options = SamplingOptions(
            temperature=body.temperature, top_k=body.top_k, top_p=body.top_p, guidance_scale=body.guidance_scale
        )
        if body.negative_prompt is not None and not options.guided:
            raise ValueError("negative_prompt acts through guidance: set guidance_scale to another value than 1")
        if body.rerank is not None and engine.pipe.ranker is None:
            raise ValueError("rerank needs a ranker, and this model has none: omit rerank")
    except (ValueError, TypeError) as error:
        raise HTTPException(400, str(error)) from None
    return Request(
        prompt=body.prompt,
        seeds=tuple(call.seeds()[0].tolist()),
        options=options,
        rerank=call.rerank,
        negative_prompt=body.negative_prompt,
    )


async def wait(ticket: Ticket, http: HTTPRequest) -> Answer:
    """Waits for the images, and cancels the request if the client goes away."""
    future = asyncio.wrap_future(ticket.future)
    try:
        while not future.done():
            await asyncio.wait([future], timeout=POLL)
            if not future.done() and await http.is_disconnected():
                raise HTTPException(499, "the client has gone away")
        return future.result()
    except (CancelledError, asyncio.CancelledError):
        raise HTTPException(503, "the server is shutting down") from None
    finally:
        if not future.done():
            ticket.cancel()


def png_files(answer: Answer, request: Request, engine: Engine) -> list[bytes]:
    """PNG files of an answer, each with its settings."""
    pipe, options = engine.pipe, request.options
    files = []
    for index, image in enumerate(to_pil(answer.images)):
        settings = ImageSettings(
            prompt=request.prompt,
            seed=answer.seeds[index],
            model=pipe.location,
            model_digest=pipe.digest,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            guidance_scale=options.guidance_scale,
            negative_prompt=request.negative_prompt,
            given=None if request.given is None else tuple(map(tuple, request.given.tolist())),
            dtype=str(pipe.prior_dtype).removeprefix("torch."),
            quantize=pipe.quantized,
            score=None if answer.scores is None else answer.scores[index],
        )
        files.append(png_bytes(image, settings))
    return files


def _checker(token: str | None) -> Any:
    """Returns a dependency that rejects requests without the token."""

    async def check(http: HTTPRequest) -> None:
        given = http.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if token is not None and not secrets.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "a token is needed: send it as Authorization: Bearer TOKEN")

    return check


def _error(status: int, message: str, param: str | None = None, headers: Any = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"error": {"message": message, "type": kind, "param": param, "code": None}}
    return JSONResponse(content, status_code=status, headers=headers)


__all__ = ["GenerationRequest", "Limits", "create_app"]
