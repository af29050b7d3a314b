"""The page of a study in a real browser, opened from the disk and from the server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.study.design import Study
from dalle_zoo_eval.study.page import page_html
from dalle_zoo_eval.study.server import StudyServer
from dalle_zoo_eval.study.votes import read_votes

from tests.eval.study.conftest import shown_order

CHROMIUM = Path("/usr/bin/chromium")
PHONE = {"width": 390, "height": 844}
KEYS = "120"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} does not exist")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()


def start(page: Any, address: str, code: str) -> None:
    page.goto(f"{address}#{code}")
    page.get_by_role("button", name="Start").click()


def answer_by_key(page: Any, key: str) -> None:
    page.locator("[data-answer='1']:enabled").wait_for()  # both images are visible
    page.keyboard.press(key)


@pytest.mark.browser
@pytest.mark.slow
def test_page_works_from_disk_on_phone_and_by_keyboard(browser: Any, made: Any, tmp_path: Path) -> None:
    study: Study = made(controls=1)
    address = (tmp_path / "study/page/index.html").as_uri()
    context = browser.new_context(viewport=PHONE, has_touch=True, accept_downloads=True, offline=True)
    page, requests, problems = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    start(page, address, study.raters[1].code)
    expected = []
    for number, shown in enumerate(shown_order(study, 1)):
        assert page.locator("#caption").text_content() == shown["caption"]  # with its "<b>" as text
        assert page.locator("#left").get_attribute("src") == f"images/{shown['left']}"
        assert page.evaluate("document.documentElement.scrollWidth <= 390")
        assert all(page.locator(f"#{side}").bounding_box()["width"] > 150 for side in ("left", "right"))
        if number == 0:
            answer_by_key(page, "0")  # the first question does not allow "neither"
            page.keyboard.press("Control+1")
            assert page.locator("#count").text_content().startswith("0 of 8")
            page.locator("[data-answer='2']").tap()
        else:
            answer_by_key(page, "2")
        page.locator("[data-answer='0']").wait_for()
        buttons = page.locator("#answers button").all()
        assert all(box["y"] + box["height"] <= PHONE["height"] for b in buttons if (box := b.bounding_box()))
        answer_by_key(page, KEYS[number % 3])
        expected += [(shown["pair"], "realism", 2), (shown["pair"], "match", int(KEYS[number % 3]))]
        if number == 1:  # continues where it was
            page.reload()
            start(page, address, study.raters[1].code)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    votes = read_votes(study, [saved]).votes
    assert [(v.pair, v.question, v.answer) for v in votes] == expected
    assert {v.rater for v in votes} == {1}
    assert all(url.startswith(("file:", "blob:")) for url in requests)
    assert problems == []


@pytest.mark.browser
@pytest.mark.slow
def test_page_sends_votes_and_retries(browser: Any, made: Any, tmp_path: Path) -> None:
    study: Study = made(controls=0)
    with StudyServer(tmp_path / "study", port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        page = browser.new_page()
        start(page, address, "1-aaaaaaaaaa")
        answer_by_key(page, "1")
        page.get_by_text("This code is not valid").wait_for()
        assert server.votes.count == 0
        page.goto("about:blank")
        start(page, address, study.raters[0].code)
        page.route("**/votes", lambda route: route.abort())
        for _ in range(6):
            answer_by_key(page, "1")
        page.get_by_text("6 votes are not sent yet").wait_for()
        page.get_by_text("will be sent again").wait_for()
        assert server.votes.count == 0
        page.unroute("**/votes")
        page.get_by_text("All votes are sent").wait_for()
        assert server.votes.count == 6
        server.shutdown()


def test_page_has_no_secrets_and_captions_do_not_end_its_script(made: Any, tmp_path: Path) -> None:
    study = made(captions=("a </script><script>alert(1)</script>", "<!--", "x"))
    html = page_html(study)
    assert html.count("</script>") == 2
    assert not any(secret in html for secret in (*study.systems, *(rater.code for rater in study.raters)))
    data = json.loads(html.partition('id="study">')[2].partition("</script>")[0])
    assert data["pairs"][0][0] == study.captions[0]
    assert "connect-src 'none'" in html
    assert "connect-src 'self'" in page_html(study, collect=True)
    assert "http" not in html.replace("http-equiv", "")
    names = {path.name for path in (tmp_path / "study/page/images").iterdir()}
    assert names == {name for pair in study.pairs for name in pair.images}
