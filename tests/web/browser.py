"""The page in a tab of Debian's chromium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),  # the image editor needs WebGL
]
PATIENCE = 120_000
"""Milliseconds; a busy machine must not fail a test."""
LEVEL_AA = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
"""Rules of axe: those of WCAG 2.1, levels A and AA."""


class Page:
    """The page in a tab, which records errors and requests to other machines."""

    def __init__(self, browser: Any, port: int, width: int = 1200, colors: str = "light") -> None:
        self.faults: list[str] = []
        self.tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=colors)
        self.tab.set_default_timeout(PATIENCE)
        self.tab.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.tab.on("request", lambda request: self.check(request.url, f"http://127.0.0.1:{port}/"))
        self.tab.on("websocket", lambda socket: self.check(socket.url, f"ws://127.0.0.1:{port}/"))
        self.tab.goto(f"http://127.0.0.1:{port}/")
        self.tab.locator("#prompt textarea").wait_for()

    def check(self, url: str, here: str) -> None:
        if not url.startswith((here, "data:", "blob:")):
            self.faults.append(f"request: {url}")

    def fill(self, **values: str) -> None:
        """Fills fields of the form, by their ids."""
        for name, value in values.items():
            self.tab.locator(f"#{name} textarea, #{name} input").first.fill(value)

    def open(self, title: str) -> None:
        """Opens an accordion."""
        self.tab.get_by_role("button", name=title).click()

    def wait_for_images(self) -> None:
        self.tab.wait_for_function("document.querySelector('#status textarea').value.includes('Seed of the first')")
        self.tab.locator("#files a[download]").first.wait_for()

    def generate(self, folder: Path) -> list[Path]:
        """Presses the button, waits, and downloads the files."""
        self.tab.evaluate("document.querySelector('#status textarea').value = ''")
        self.tab.locator("#generate").click()
        self.wait_for_images()
        links = self.tab.locator("#files a[download]")
        paths = []
        for index in range(links.count()):
            with self.tab.expect_download() as download:
                links.nth(index).click()
            path = folder / download.value.suggested_filename
            download.value.save_as(path)
            paths.append(path)
        return paths

    def tab_to(self, selector: str) -> None:
        """Presses the tab key until an element has the focus."""
        for _ in range(100):
            self.tab.keyboard.press("Tab")
            if self.tab.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"the tab key does not reach {selector}")

    def accessibility_report(self) -> str:
        """Violations that axe finds, "" if there are none."""
        from axe_playwright_python.sync_playwright import Axe

        results = Axe().run(self.tab, options=LEVEL_AA)
        return results.generate_report() if results.violations_count else ""

    def needs_sideways_scroll(self) -> bool:
        return bool(self.tab.evaluate("document.documentElement.scrollWidth > window.innerWidth"))

    def close(self) -> None:
        self.tab.close()
        assert self.faults == []
