"""The page in a real browser, and through gradio's client."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dalle_zoo import DallePipeline
from dalle_zoo.image_settings import read_settings
from dalle_zoo.images import save_png
from dalle_zoo.web.engine import Engine
from dalle_zoo.web.generation import Limits
from dalle_zoo.web.server import create_server
from tests.web.conftest import running

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
PATIENCE = 60_000
"""Milliseconds; a busy machine must not fail a test."""

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def bundled() -> Iterator[tuple[DallePipeline, int]]:
    pipe = DallePipeline.from_pretrained("emoji64")
    engine = Engine(pipe)
    with running(create_server(engine, limits=Limits(max_images=8))) as port:
        yield pipe, port
    engine.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"{CHROMIUM} is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Page:
    """The page in a tab, which records errors and requests to other machines."""

    def __init__(self, browser: Any, port: int, width: int = 1200) -> None:
        self.faults: list[str] = []
        self.tab = browser.new_page(viewport={"width": width, "height": 900})
        self.tab.set_default_timeout(PATIENCE)
        self.tab.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.tab.on("request", lambda request: self.check(request.url, f"http://127.0.0.1:{port}/"))
        self.tab.on("websocket", lambda socket: self.check(socket.url, f"ws://127.0.0.1:{port}/"))
        self.tab.goto(f"http://127.0.0.1:{port}/")
        self.tab.locator("#prompt textarea").wait_for()

    def check(self, url: str, here: str) -> None:
        if not url.startswith((here, "data:", "blob:")):
            self.faults.append(f"request: {url}")

    def fill(self, name: str, value: str) -> None:
        self.tab.locator(f"#{name} textarea, #{name} input").first.fill(value)

    def generate(self, folder: Path) -> list[Path]:
        """Presses the button, waits, and downloads the files."""
        self.tab.locator("#generate").click()
        self.tab.wait_for_function("document.querySelector('#status textarea').value.includes('images in')")
        links = self.tab.locator("#files a[download]")
        links.first.wait_for()
        paths = []
        for index in range(links.count()):
            with self.tab.expect_download() as download:
                links.nth(index).click()
            path = folder / download.value.suggested_filename
            download.value.save_as(path)
            paths.append(path)
        self.tab.evaluate("document.querySelector('#status textarea').value = ''")
        return paths


@pytest.fixture
def page(browser: Any, bundled: tuple[DallePipeline, int]) -> Iterator[Page]:
    page = Page(browser, bundled[1])
    yield page
    page.tab.close()
    assert page.faults == []


def test_images_are_those_of_the_pipeline_and_a_downloaded_one_generates_itself(
    page: Page, bundled: tuple[DallePipeline, int], tmp_path: Path
) -> None:
    pipe, _ = bundled
    page.fill("prompt", "a 3d emoji of a red apple")
    page.fill("count", "3")
    page.fill("keep", "2")
    page.fill("seed", "5")
    first = page.generate(tmp_path)
    expected = pipe("a 3d emoji of a red apple", num_images_per_prompt=3, rerank=2, seed=5)
    assert expected.settings is not None
    assert len(first) == 2
    for path, image, settings in zip(first, expected.images, expected.settings, strict=True):
        assert path.read_bytes() == save_png(image, tmp_path / "expected.png", settings).read_bytes()
    page.fill("prompt", "something else")
    page.tab.get_by_text("Use the settings of an image").click()
    page.tab.locator("#restore input[type=file]").set_input_files(first[1])
    page.tab.wait_for_function("document.querySelector('#prompt textarea').value.includes('apple')")
    page.tab.wait_for_function(f"document.querySelector('#seed input').value === '{read_settings(first[1]).seed}'")
    (tmp_path / "again").mkdir()
    (again,) = page.generate(tmp_path / "again")
    with Image.open(again) as one, Image.open(first[1]) as other:
        assert one.tobytes() == other.tobytes()


def test_a_bad_prompt_shows_our_message(page: Page) -> None:
    page.fill("prompt", "   ")
    page.tab.locator("#generate").click()
    page.tab.get_by_text("prompt is empty: describe the image").wait_for()
    page.fill("prompt", "a cat")
    page.fill("seed", "<b>x</b>")
    page.tab.locator("#generate").click()
    page.tab.get_by_text("seed must be an integer, or empty for a random one, got '<b>x</b>'").wait_for()


def test_a_file_without_settings_shows_our_message(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.tab.get_by_text("Use the settings of an image").click()
    page.tab.locator("#restore input[type=file]").set_input_files(tmp_path / "plain.png")
    page.tab.get_by_text("plain.png has no settings of dalle-zoo").wait_for()


def test_the_keyboard_suffices(page: Page) -> None:
    page.tab.locator("#prompt textarea").focus()
    page.tab.keyboard.type("a flat emoji of a red heart")
    page.tab.keyboard.press("Tab")
    assert page.tab.evaluate("document.activeElement.id") == "generate"
    page.tab.keyboard.press("Enter")
    page.tab.wait_for_function("document.querySelector('#status textarea').value.includes('images in')")


def test_a_phone_needs_no_sideways_scroll(browser: Any, bundled: tuple[DallePipeline, int], tmp_path: Path) -> None:
    page = Page(browser, bundled[1], width=390)
    page.fill("prompt", "a flat emoji of a red heart")
    assert len(page.generate(tmp_path)) == 8
    for title in ("Sampling", "Keep a part of an image", "Use the settings of an image", "About this model"):
        page.tab.get_by_role("button", name=re.compile(title)).click()
    page.tab.locator("#card pre").wait_for()
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= 390
    page.tab.close()
    assert page.faults == []


def test_gradio_client(bundled: tuple[DallePipeline, int]) -> None:
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(f"http://127.0.0.1:{bundled[1]}", verbose=False)
    _, files, status = client.predict(
        "a 3d emoji of a red apple", 2, 0, "5", 1, None, None, 1, "", None, None, api_name="/generate"
    )
    assert "2 images in" in status
    assert read_settings(files[0]).seed == 5
