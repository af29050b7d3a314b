"""The complete server: API and page, with headers that prevent requests of browsers to other hosts."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dalle_zoo.web.api import create_app
from dalle_zoo.web.engine import Engine
from dalle_zoo.web.generation import Limits
from dalle_zoo.web.page import mount_page

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


def create_server(engine: Engine, *, limits: Limits | None = None, token: str | None = None) -> FastAPI:
    """Returns the application with API and page.

    Args:
        engine: Runs the requests; the caller closes it.
        limits: Limits of a request. Defaults to `Limits`.
        token: Token of the API and password of the page. Defaults to none.
    """
    limits = limits or Limits()
    app = create_app(engine, limits=limits, token=token)
    app.add_middleware(PolicyMiddleware)
    return mount_page(app, engine, limits, token=token)
