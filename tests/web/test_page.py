"""The page of the bundled model in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dalle_zoo import DallePipeline
from dalle_zoo.image_settings import read_settings
from dalle_zoo.images import png_bytes, save_png
from dalle_zoo.sampling import SAMPLE
from dalle_zoo.web.engine import Engine
from dalle_zoo.web.generation import Limits
from tests.web.browser import Page
from tests.web.conftest import GRADIO_WARNINGS, serving_page

pytestmark = [pytest.mark.slow, pytest.mark.browser, *map(pytest.mark.filterwarnings, GRADIO_WARNINGS)]


@pytest.fixture(scope="module")
def bundled() -> Iterator[tuple[DallePipeline, int]]:
    pipe = DallePipeline.from_pretrained("composition")
    engine = Engine(pipe)
    with serving_page(engine, limits=Limits(max_images=8)) as port:
        yield pipe, port


@pytest.fixture
def page(browser: Any, bundled: tuple[DallePipeline, int]) -> Iterator[Page]:
    page = Page(browser, bundled[1])
    yield page
    page.close()


def test_images_are_those_of_the_pipeline_and_a_downloaded_one_generates_itself(
    page: Page, bundled: tuple[DallePipeline, int], tmp_path: Path
) -> None:
    pipe, _ = bundled
    page.fill(prompt="a 3d emoji of a red apple", count="3", keep="2", seed="5")
    first = page.generate(tmp_path)
    expected = pipe("a 3d emoji of a red apple", num_images_per_prompt=3, rerank=2, seed=5)
    assert expected.settings is not None
    assert len(first) == 2
    for path, image, settings in zip(first, expected.images, expected.settings, strict=True):
        assert path.read_bytes() == save_png(image, tmp_path / "expected.png", settings).read_bytes()
    page.fill(prompt="something else")
    page.open("Use the settings of an image")
    page.tab.locator("#restore input[type=file]").set_input_files(first[1])
    page.tab.wait_for_function("document.querySelector('#prompt textarea').value.includes('apple')")
    page.tab.wait_for_function(f"document.querySelector('#seed input').value === '{read_settings(first[1]).seed}'")
    (tmp_path / "again").mkdir()
    (again,) = page.generate(tmp_path / "again")
    with Image.open(again) as one, Image.open(first[1]) as other:
        assert one.tobytes() == other.tobytes()


def test_a_bad_prompt_shows_our_message(page: Page) -> None:
    page.fill(prompt="   ")
    page.tab.locator("#generate").click()
    page.tab.get_by_text("prompt is empty: describe the image").wait_for()
    page.fill(prompt="a cat", seed="<b>x</b>")
    page.tab.locator("#generate").click()
    page.tab.get_by_text("seed must be an integer, or empty for a random one, got '<b>x</b>'").wait_for()


def test_a_file_without_settings_shows_our_message(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.open("Use the settings of an image")
    page.tab.locator("#restore input[type=file]").set_input_files(tmp_path / "plain.png")
    page.tab.get_by_text("plain.png has no settings of dalle-zoo").wait_for()


def test_the_keyboard_suffices(page: Page) -> None:
    page.tab_to("#prompt textarea")
    page.tab.keyboard.type("a flat emoji of a red heart")
    page.tab_to("#generate")
    page.tab.keyboard.press("Enter")
    page.wait_for_images()
    page.tab_to("#files a[download]")
    with page.tab.expect_download() as download:
        page.tab.keyboard.press("Enter")
    assert read_settings(download.value.path()).prompt == "a flat emoji of a red heart"
    page.tab_to("#count input[type=range]")
    before = page.tab.evaluate("Number(document.activeElement.value)")
    page.tab.keyboard.press("ArrowLeft")
    assert page.tab.evaluate("Number(document.activeElement.value)") == before - 1
    page.tab_to("#options button.label-wrap")  # the first accordion
    page.tab.keyboard.press("Enter")
    page.tab.get_by_label("Temperature").first.wait_for()


def test_painted_cells_are_generated_again_and_all_others_are_kept(
    page: Page, bundled: tuple[DallePipeline, int], tmp_path: Path
) -> None:
    pipe, _ = bundled
    prompt = "a 3d emoji of a red apple"
    (original,) = pipe(prompt, seed=0).save(tmp_path)
    page.open("Keep a part of an image")
    canvas = page.tab.locator("#editor canvas").first
    canvas.wait_for()
    page.tab.locator("#editor input[type=file]").first.set_input_files(original)
    page.tab.get_by_label("Undo").first.wait_for()
    paint(page, canvas)
    page.fill(prompt=prompt, count="1", seed="7")
    (file,) = page.generate(tmp_path)
    given = read_settings(file).given_codes()
    assert given is not None
    sampled = given == SAMPLE
    assert sampled[3:5, 3:5].all(), "the center is painted"
    assert not sampled[[0, 0, -1, -1], [0, -1, 0, -1]].any(), "the corners are not"
    with Image.open(original) as image:
        assert torch.equal(given[~sampled], pipe.encode_image(image)[~sampled])
    codes = pipe(prompt, seed=7, given=given, output_type="latent").images[0]
    assert torch.equal(codes[~sampled], given[~sampled])
    again = pipe(prompt, seed=7, given=given)
    assert file.read_bytes() == png_bytes(again.images[0], again.settings[0])


def paint(page: Page, canvas: Any) -> None:
    """Paints a short line over the center of the editor."""
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.tab.mouse.move(x - 20, y)
    page.tab.mouse.down()
    page.tab.mouse.move(x + 20, y, steps=8)
    page.tab.mouse.up()


@pytest.mark.parametrize(("width", "colors"), [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")])
def test_everything_open_is_accessible_and_needs_no_sideways_scroll(
    browser: Any, bundled: tuple[DallePipeline, int], tmp_path: Path, width: int, colors: str
) -> None:
    page = Page(browser, bundled[1], width, colors)
    page.fill(prompt="a flat emoji of a yelow heart", count="4", keep="4", seed="5")
    assert len(page.generate(tmp_path)) == 4
    for title in ("Sampling", "Keep a part of an image", "Use the settings of an image", "About this model"):
        page.open(title)
    page.tab.locator("#card h1").wait_for()
    page.tab.locator("#editor canvas").first.wait_for()
    assert not page.needs_sideways_scroll()
    assert page.accessibility_report() == ""
    page.close()
