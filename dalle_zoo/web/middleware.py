"""What holds for every request and response: a limit of the body, and headers that keep browsers on this machine."""

from __future__ import annotations

from fastapi import HTTPException
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",  # gradio's page needs all of them
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
    )
)
"""Content security policy: browsers send requests to this server only."""


MAX_JSON = 2**20
"""Largest body of a request to the API, bytes; it is read before the token is checked."""
MAX_BODY = 32 * 2**20
"""Largest body of any other request, such as a file for the page, bytes."""


class BodyLimitMiddleware:
    """Answers 413 to a request whose body is too large, without reading all of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application."""
        limit = MAX_JSON if scope.get("path", "").startswith("/v1/") else MAX_BODY
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, f"a request may have {limit} bytes")
            return message

        await self.app(scope, receive_limited if scope["type"] == "http" else receive, send)


class PolicyMiddleware:
    """Adds the policy to every response, without buffering it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy)
