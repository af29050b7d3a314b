"""The complete server: API and page."""

from __future__ import annotations

from fastapi import FastAPI

from dalle_zoo.web.api import create_app
from dalle_zoo.web.engine import Engine
from dalle_zoo.web.generation import Limits
from dalle_zoo.web.middleware import BodyLimitMiddleware, PolicyMiddleware
from dalle_zoo.web.page import mount_page


def create_server(engine: Engine, *, limits: Limits | None = None, token: str | None = None) -> FastAPI:
    """Returns the application with API and page.

    Args:
        engine: Runs the requests; the caller closes it.
        limits: Limits of a request. Defaults to `Limits`.
        token: Token of the API and password of the page. Defaults to none.
    """
    limits = limits or Limits()
    app = create_app(engine, limits=limits, token=token)
    app.add_middleware(BodyLimitMiddleware)
    app.add_middleware(PolicyMiddleware)
    return mount_page(app, engine, limits, token=token)
