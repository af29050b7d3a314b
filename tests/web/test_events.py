"""What the page does with the values of its form, without a browser."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from PIL import Image

from dalle_zoo.image_settings import read_settings
from dalle_zoo.images import to_pil
from dalle_zoo.sampling import SAMPLE, Progress, SamplingDefaults, SamplingOptions
from dalle_zoo.web import events
from dalle_zoo.web.engine import Engine, Request
from dalle_zoo.web.events import Watch, generate, kept_codes, parse_seed, restore
from dalle_zoo.web.generation import GenerationRequest, Limits
from tests.web.conftest import Slow, until

DEFAULTS = ("a cat", 2, 0, "5", 1.0, None, None, 1.0, "", None, None)
"""Values of the form, in the order of its inputs."""


def form(**changes: Any) -> list[Any]:
    names = (
        "prompt",
        "count",
        "keep",
        "seed",
        "temperature",
        "top_k",
        "top_p",
        "guidance",
        "negative",
        "editor",
        "file",
    )
    return list((dict(zip(names, DEFAULTS, strict=True)) | changes).values())


def run(engine: Engine, *values: Any) -> list[Any]:
    async def collect() -> list[Any]:
        states = []
        async for gallery, files, status in generate(engine, Limits(), *values):
            seeds = [read_settings(path).seed for path in files or []]  # the files go after the last state
            states.append((gallery, seeds, status))
        return states

    return asyncio.run(collect())


def test_a_request_starts_from_what_suits_the_model(pipe: Slow) -> None:
    pipe.sampling = SamplingDefaults(0.5, 2)
    request = GenerationRequest.model_validate({"prompt": "a cat", "temperature": None, "top_k": 2})
    options = request.to_request(pipe, Limits()).options
    assert options == SamplingOptions(temperature=0.5, top_k=2, guidance_scale=2)


def test_an_image_of_the_form_is_that_of_the_pipeline(engine: Engine, pipe: Slow, tmp_path: Path) -> None:
    *_, (gallery, seeds, status) = run(engine, *form())
    assert seeds == pipe("a cat", num_images_per_prompt=2, seed=5).seeds.tolist()
    assert [caption for _, caption in gallery] == [f"seed {seed}" for seed in seeds]
    assert status.startswith("2 images in ")
    assert status.endswith("Seed of the first: 5")
    assert not Path(gallery[0][0]).exists(), "gradio has its own copies"


def test_rows_appear_while_they_are_sampled(engine: Engine, pipe: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    see = Watch.see

    def see_and_wait(self: Watch, progress: Progress) -> None:
        see(self, progress)
        until(lambda: self._state is None)  # the page has taken the row

    monkeypatch.setattr(events, "PREVIEW_SECONDS", 0.01)
    monkeypatch.setattr(Watch, "see", see_and_wait)
    first, *previews, last = run(engine, *form())
    assert (first[0], len(last[0])) == ([], 2)
    assert [status for _, _, status in previews] == [f"{done} of 16 tokens" for done in (4, 8, 12, 16)]
    codes = pipe("a cat", num_images_per_prompt=2, seed=5, output_type="latent").images
    for rows, (images, _, _) in enumerate(previews, 1):
        codes_so_far = codes.clone()
        codes_so_far[:, rows:] = SAMPLE
        assert images == to_pil(pipe.preview(codes_so_far))


def test_the_status_has_what_a_user_should_know_of_the_prompt(engine: Engine, pipe: Slow) -> None:
    pipe.tokenizer.words = {"a": 2, "cat": 1}
    states = run(engine, *form(prompt="a cta"))
    note = "prompt 'a cta': the model never saw the word 'cta'"
    assert [status.partition("\n")[2] for _, _, status in states] == [note] * len(states)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"count": 17}, r"n must be in 1\.\.16, got 17"),
        ({"seed": "<b>"}, "got &#x27;&lt;b&gt;&#x27;"),
        ({"keep": 1}, "rerank needs a ranker"),
        ({"negative": "a dog"}, "set guidance_scale"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_bad_value_is_explained(engine: Engine, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(gr.Error, match=message):
        run(engine, *form(**changes))


def test_a_page_that_is_closed_cancels_its_request(engine: Engine, pipe: Slow) -> None:
    pipe.released.clear()
    engine.submit(Request(prompt="first", seeds=(1,)))
    until(lambda: pipe.batches)

    async def leave() -> None:
        states = generate(engine, Limits(), *form())
        await anext(states)
        await states.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert [ticket.canceled for ticket in engine._waiting] == [True]


def test_painted_cells_are_generated_again(pipe: Slow) -> None:
    image, layer = Image.new("RGBA", (16, 16), "red"), Image.new("RGBA", (16, 16))
    editor = {"background": image, "layers": [layer], "composite": image}
    with pytest.raises(ValueError, match="nothing of the image is painted white"):
        kept_codes(pipe, editor, None)
    layer.paste("white", (5, 5, 7, 11))
    given = kept_codes(pipe, editor, None)
    assert given is not None
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1:3, 1] = True
    assert torch.equal(given == SAMPLE, expected)
    assert torch.equal(given[~expected], pipe.encode_image(image.convert("RGB"))[~expected])
    assert kept_codes(pipe, {"background": None, "layers": [], "composite": None}, None) is None


def test_a_file_restores_its_settings_and_its_kept_codes(pipe: Slow, tmp_path: Path) -> None:
    given = torch.full((4, 4), SAMPLE)
    given[0] = 3
    output = pipe("a cat", seed=2**62 + 1, top_k=4, guidance_scale=2.0, negative_prompt="a dog", given=given)
    (path,) = output.save(tmp_path)
    assert restore(pipe, str(path)) == ["a cat", 1, 0, str(2**62 + 1), 1.0, 4, 0, 2.0, "a dog"]
    assert torch.equal(kept_codes(pipe, None, str(path)) == SAMPLE, given == SAMPLE)  # type: ignore[arg-type]
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(gr.Error, match=r"^'plain\.png has no settings of dalle-zoo"):
        restore(pipe, str(tmp_path / "plain.png"))


def test_places_of_the_server_are_not_shown(engine: Engine, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(gr.Error, match=r"^'plain\.png has no settings of dalle-zoo"):
        run(engine, *form()[:-1], str(tmp_path / "plain.png"))


def test_seeds_are_text() -> None:
    assert parse_seed(" 7 ") == 7
    assert parse_seed("") is None
    with pytest.raises(ValueError, match="seed must be an integer"):
        parse_seed("1.5")
