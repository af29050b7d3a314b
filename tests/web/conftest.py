"""A small pipeline with random weights, and a server for it."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from dalle_zoo import DallePipeline
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.tokenizers import ByteTokenizer
from dalle_zoo.web.engine import Engine
from tests.web.browser import ARGUMENTS, CHROMIUM, PATIENCE


class Slow(DallePipeline):
    """A pipeline whose first batch waits until it is released, so that requests gather behind it."""

    released = threading.Event()

    def sample(self, *arguments, **options):  # type: ignore[no-untyped-def]
        self.batches.append(len(arguments[0]))
        assert self.released.wait(120)
        return super().sample(*arguments, **options)


def make_pipe() -> Slow:
    """A pipeline with random weights: images of 16 x 16 pixels, 8 letters of a prompt."""
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=16, width=8, num_groups=3, codebook_size=16, decoder_stem=8))
    tokenizer = ByteTokenizer()
    config = PriorConfig(
        text_length=8, text_vocab=tokenizer.vocab_size, image_height=4, image_width=4, codebook_size=16, width=64,
        num_layers=2, num_heads=1,
    )  # fmt: skip
    prior = Prior(config)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    pipe = Slow(dvae, prior, tokenizer)
    pipe.batches = []
    pipe.released = threading.Event()
    pipe.released.set()
    return pipe


@pytest.fixture
def pipe() -> Slow:
    return make_pipe()


@pytest.fixture
def engine(pipe: Slow) -> Iterator[Engine]:
    engine = Engine(pipe, max_waiting=8, max_images=8)
    yield engine
    pipe.released.set()
    engine.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium; tests are skipped where it or Playwright is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS, timeout=PATIENCE)
        yield browser
        browser.close()


GRADIO_WARNINGS = (
    "ignore::DeprecationWarning:gradio.*",  # it calls functions of pandas that will change
    "ignore::ResourceWarning",  # it leaves event loops to the garbage collector
)
"""Filters of warnings for the modules that serve the page."""


@contextmanager
def serving_page(engine: Engine, **options: Any) -> Iterator[int]:
    """Serves API and page on a free port; what gradio leaves behind is collected before other tests run."""
    from dalle_zoo.web.server import create_server

    with running(create_server(engine, **options)) as port:
        yield port
    engine.close()
    gc.collect()


@contextmanager
def running(app: Any) -> Iterator[int]:
    """Serves an application on a free port of this machine."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


def until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
