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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from dalle_zoo.version import __version__
from dalle_zoo.web.engine import Answer, Engine, QueueFullError, Ticket
from dalle_zoo.web.generation import GenerationRequest, Limits, notes, png_files

POLL = 0.25
"""Seconds between two checks whether the client is still connected."""
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
"""Methods of HTTP that unknown paths of the API answer."""
CLIENT_CLOSED = 499
"""Status that nginx logs for a client that has disconnected."""


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
        limits: Limits of a request. Defaults to `Limits`.
        token: Token that clients must send as ``Authorization: Bearer``. Defaults to none.

    Example:
        >>> from dalle_zoo import DallePipeline
        >>> from dalle_zoo.web.engine import Engine
        >>> engine = Engine(DallePipeline.from_pretrained("composition"))
        >>> app = create_app(engine, token="secret")
        >>> "/v1/images/generations" in [route.path for route in app.routes]
        True
        >>> engine.close()
    """
    limits, pipe = limits or Limits(), engine.pipe
    app = FastAPI(title="dalle-zoo", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    images = Images(limits.stored_images)
    allowed = [Depends(_checker(token))]
    _explain_errors(app)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": engine.waiting}

    @app.get("/v1/models", dependencies=allowed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": pipe.location, "object": "model", "owned_by": "dalle-zoo"}]}

    @app.get("/v1/images/{name}.png", dependencies=allowed)
    async def image(name: str) -> Response:
        if name not in images.stored:
            raise HTTPException(404, "there is no such image: only recent images are available")
        return Response(images.stored[name], media_type="image/png")

    @app.post("/v1/images/generations", dependencies=allowed)
    async def generate(body: GenerationRequest, http: HTTPRequest) -> dict[str, Any]:
        try:
            request = body.to_request(pipe, limits)
            ticket = engine.submit(request)
        except (ValueError, TypeError) as error:
            raise HTTPException(400, str(error)) from None
        except QueueFullError as error:
            raise HTTPException(429, str(error), headers={"Retry-After": str(error.retry_after)}) from None
        answer = await wait(ticket, http)
        data = []
        for index, file in enumerate(await asyncio.to_thread(png_files, answer, request, pipe)):
            shown = (
                {"b64_json": base64.b64encode(file).decode()}
                if body.response_format == "b64_json"
                else {"url": str(http.url_for("image", name=images.add(file)))}
            )
            score = None if answer.scores is None else answer.scores[index]
            data.append({**shown, "seed": answer.seeds[index], "score": score})
        warnings = await asyncio.to_thread(notes, request, pipe)
        return {"created": int(time.time()), "data": data, "model": pipe.location, "warnings": warnings}

    # The page is mounted at the root: without this route it would answer in its own form.
    @app.api_route("/v1/{path:path}", methods=METHODS, dependencies=allowed)
    async def unknown(http: HTTPRequest) -> None:
        raise HTTPException(404, f"there is no {http.method} {http.url.path}")

    return app


async def wait(ticket: Ticket, http: HTTPRequest) -> Answer:
    """Waits for the images, and cancels the request if the client disconnects.

    Raises:
        HTTPException: The client has disconnected, the server is shutting down, or the generation failed.
    """
    future = asyncio.wrap_future(ticket.future)
    try:
        while not future.done():
            await asyncio.wait([future], timeout=POLL)
            if not future.done() and await http.is_disconnected():
                raise HTTPException(CLIENT_CLOSED, "the client has disconnected")
    finally:
        if not future.done():
            ticket.cancel()
    if ticket.canceled:
        raise HTTPException(503, "the server is shutting down")
    if fault := future.exception():  # the engine has logged it; raised as it is, it would end the connection too
        raise HTTPException(500, fault_message(fault))
    return future.result()


def fault_message(fault: BaseException) -> str:
    """Returns the message of an unexpected error for clients, without its text, which may hold secrets."""
    return f"unexpected {type(fault).__name__}: the server's log has the traceback"


def _checker(token: str | None) -> Any:
    """Returns a dependency that rejects requests without the token."""

    async def check(http: HTTPRequest) -> None:
        scheme, _, given = http.headers.get("authorization", "").encode("latin-1").partition(b" ")
        is_bearer = scheme.lower() == b"bearer"  # HTTP ignores the case of a scheme
        if token is not None and not (is_bearer and secrets.compare_digest(given.strip(), token.encode())):
            raise HTTPException(401, "a token is needed: send it as Authorization: Bearer TOKEN")

    return check


def _explain_errors(app: FastAPI) -> None:
    """Gives all errors OpenAI's form."""

    @app.exception_handler(AnyHTTPException)
    async def explain(_: HTTPRequest, error: AnyHTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def explain_body(_: HTTPRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, f"the body is not valid JSON: {first['ctx']['error']}")
        name = ".".join(str(part) for part in first["loc"][1:])
        return _error(400, f"{name or 'body'}: {first['msg']}", param=name or None)

    @app.exception_handler(Exception)
    async def explain_fault(_: HTTPRequest, error: Exception) -> JSONResponse:
        return _error(500, fault_message(error))


def _error(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"error": {"message": message, "type": kind, "param": param, "code": None}}
    return JSONResponse(content, status_code=status, headers=headers)


__all__ = ["create_app"]
