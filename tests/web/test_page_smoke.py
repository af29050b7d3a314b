"""The page of a small model: through gradio's client, and once in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio_client
import pytest

from dalle_zoo.image_settings import read_settings
from dalle_zoo.images import png_bytes
from dalle_zoo.sampling import SamplingDefaults
from dalle_zoo.web.engine import Engine
from tests.web.browser import Page
from tests.web.conftest import GRADIO_WARNINGS, Slow, make_pipe, serving_page

pytestmark = [*map(pytest.mark.filterwarnings, GRADIO_WARNINGS)]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Slow, int]]:
    pipe = make_pipe()
    pipe.sampling = SamplingDefaults(temperature=0.5, guidance_scale=2)
    engine = Engine(pipe)
    with serving_page(engine) as port:
        yield pipe, port


def expected_files(pipe: Slow, **options: Any) -> list[bytes]:
    output = pipe("a cat", **options)
    return [png_bytes(*each) for each in zip(output.images, output.settings, strict=True)]


def test_gradio_client(server: tuple[Slow, int], tmp_path: Path) -> None:
    pipe, port = server
    client = gradio_client.Client(
        f"http://127.0.0.1:{port}", verbose=False, download_files=tmp_path, httpx_kwargs={"timeout": 120}
    )
    values = ("a cat", 2, 0, "5", 1, 0, 0, 1, "", None, None)
    _, files, status = client.predict(*values, api_name="/generate")
    fields = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/generate"]["parameters"]
    client.close()
    usual = {field["label"]: field.get("parameter_default") for field in fields}
    assert (usual["Temperature"], usual["Guidance scale"]) == (0.5, 2)
    stated = {"temperature": 1, "guidance_scale": 1}
    assert [Path(file).read_bytes() for file in files] == expected_files(
        pipe, num_images_per_prompt=2, seed=5, **stated
    )
    assert status.startswith("2 images in ")


@pytest.mark.browser
def test_the_page_works_on_a_phone(browser: Any, server: tuple[Slow, int], tmp_path: Path) -> None:
    pipe, port = server
    page = Page(browser, port, width=390)
    page.fill(prompt="a cat", count="2", seed="5")
    files = page.generate(tmp_path)
    assert [file.read_bytes() for file in files] == expected_files(pipe, num_images_per_prompt=2, seed=5)
    assert read_settings(files[0]).seed == 5
    assert not page.needs_sideways_scroll()
    assert page.accessibility_report() == ""
    page.close()
