"""None and other wrong types at the entry points of the package: an error of the package that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dalle_zoo import DallePipeline, load_model
from dalle_zoo.cli.errors import USER, explain
from dalle_zoo.composition import CompositionConfig
from dalle_zoo.convert import find
from dalle_zoo.hub import download
from dalle_zoo.image_settings import read_settings
from dalle_zoo.inspection import describe_image, describe_model
from dalle_zoo.masks import Mask, TextImageLayout, layer_masks
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.networks import load_image_tokenizer, load_prior
from dalle_zoo.output import PipelineOutput
from dalle_zoo.paths import user_path
from dalle_zoo.publish import prepare
from dalle_zoo.ranker_folder import load_ranker
from dalle_zoo.regions import shift_image
from dalle_zoo.tokenizers import ByteTokenizer, CaptionEncoder, load_text_tokenizer
from dalle_zoo.values import shown, suggests_arguments

WRONG: Any = None
IMAGE = Image.new("RGB", (12, 12))
IDS = torch.zeros(1, 4, dtype=torch.long)


@pytest.fixture(scope="module")
def pipe(random_prior: Callable[..., Any]) -> Any:
    dvae = DVAE(DVAEConfig(image_size=12, width=4, num_groups=3, decoder_stem=4, codebook_size=7))
    return DallePipeline(dvae, random_prior(text_vocab=256), ByteTokenizer())


WITHOUT_MODEL: dict[str, tuple[Callable[[], Any], str]] = {
    "from_pretrained": (lambda: DallePipeline.from_pretrained(WRONG), "location must be a name, a path or a list"),
    "a location": (lambda: DallePipeline.from_pretrained([WRONG]), "location must be a path, got None"),
    "bytes": (lambda: DallePipeline.from_pretrained(b"composition"), "location must be a path, got 99"),  # type: ignore[arg-type]
    "files": (lambda: DallePipeline.from_pretrained("composition", files=WRONG), "files must be a list of patterns"),
    "a number as device": (
        lambda: DallePipeline.from_pretrained("composition", device=3.5),  # type: ignore[arg-type]
        "device must be the name",
    ),
    "an unknown device": (
        lambda: DallePipeline.from_pretrained("composition", device="gpu"),
        "cpu or cuda, got 'gpu'",
    ),
    "load_model": (lambda: load_model(WRONG), "location must be a name"),
    "a component": (lambda: load_model("composition", 3), "unknown component 3"),  # type: ignore[arg-type]
    "the constructor": (lambda: DallePipeline(WRONG, WRONG, WRONG), "image_tokenizer must be an ImageTokenizer"),
    "settings": (lambda: read_settings(WRONG), "path must be a path, got None"),
    "describe_image": (lambda: describe_image(WRONG), "path must be a path, got None"),
    "describe_model": (lambda: describe_model(WRONG), "location must be a name"),
    "a mask": (lambda: Mask.from_spec(WRONG, TextImageLayout(4, 2, 2)), "mask must be text, got None"),
    "a layout": (lambda: Mask.from_spec("row", WRONG), "layout must be a TextImageLayout, got None"),
    "a schedule": (lambda: layer_masks(WRONG, 3), "schedule must be text, got None"),
    "layers": (lambda: layer_masks("row", "3"), "num_layers must be an integer of at least 1, got '3'"),  # type: ignore[arg-type]
    "a text tokenizer": (lambda: load_text_tokenizer(WRONG), "folder must be a path, got None"),
    "a prior": (lambda: load_prior(WRONG), "folder must be a path, got None"),
    "an image tokenizer": (lambda: load_image_tokenizer(WRONG), "folder must be a path, got None"),
    "a ranker": (lambda: load_ranker(WRONG), "folder must be a path, got None"),
    "decode": (lambda: ByteTokenizer().decode(WRONG), "ids must be a list of integers, got None"),
    "an id": (lambda: ByteTokenizer().decode(["a"]), "ids must be an integer, got 'a'"),  # type: ignore[list-item]
    "an encoder": (lambda: CaptionEncoder(WRONG, 4), "tokenizer must be a TextTokenizer, got None"),
    "captions": (lambda: CaptionEncoder(ByteTokenizer(), 4)(WRONG), "texts must be a sequence of captions"),
    "find": (lambda: find(WRONG), "paths must be a path or a list of paths, got None"),
    "an image to shift": (lambda: shift_image(WRONG, 1, 1), "image must be a PIL image, got None"),
    "a shift": (lambda: shift_image(IMAGE, 1.5, 1), "right must be an integer, got 1.5"),  # type: ignore[arg-type]
    "download": (lambda: download(WRONG), "None is not a name on the Hub: expected organization/name"),
    "publish": (lambda: prepare(WRONG, "org/name"), "folder must be a path, got None"),
    "a composition": (lambda: CompositionConfig.load(3), "path must be a path, got 3"),  # type: ignore[arg-type]
    "images of an output": (lambda: PipelineOutput([IMAGE]).save(WRONG), "folder must be a path, got None"),
}
WITH_MODEL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "prompts": (lambda p: p.encode_text(None), "prompts must be a string or a non-empty list of strings, got None"),
    "codes": (lambda p: p.decode(None), "codes must be an int64 tensor, got NoneType"),
    "a list of codes": (lambda p: p.decode([1, 2]), "codes must be an int64 tensor, got list"),
    "preview": (lambda p: p.preview(None), "codes must be an int64 tensor, got NoneType"),
    "kept codes": (lambda p: p.kept_codes(IMAGE, mask=3), "mask must be a PIL image or a tensor"),
    "select": (lambda p: p.select(["a"], IDS, None, 1), "codes must be an int64 tensor, got NoneType"),
    "rows to select": (lambda p: p.select(["a"], IDS, IDS, 1), r"codes must have shape \(P, N, h, w\)"),
    "ids": (lambda p: p.sample(None, IDS), "text must be an int64 tensor, got NoneType"),
    "seeds": (lambda p: p.sample(IDS, None), "seeds must be an int64 tensor, got NoneType"),
    "options": (lambda p: p.sample(IDS, IDS, {"top_k": 3}), r"options must be SamplingOptions, got \{'top_k': 3\}"),
    "a callback": (lambda p: p.sample(IDS, IDS, callback=3), "callback must be a function of one Progress, got 3"),
    "an argument": (lambda p: p("x", num_images=3), "unknown argument 'num_images'. Did you mean 'num_images_per_pr"),
    "a misspelled argument": (lambda p: p("x", guidence_scale=3), "Did you mean 'guidance_scale'"),
    "a device": (lambda p: p.to("gpu"), "device must be the name of a device, such as cpu or cuda, got 'gpu'"),
    "a folder": (lambda p: p.save_pretrained(None), "folder must be a path, got None"),
    "a record": (lambda p: p.save_pretrained("x", record=3), "record must be a mapping"),
    "shards": (lambda p: p.save_pretrained("x", shard_bytes="1"), "shard_bytes must be an integer of at least 1"),
    "a repository": (lambda p: p.push_to_hub(None), "None is not a name on the Hub"),
    "images to encode": (lambda p: p.image_tokenizer.encode(None), "images must be a tensor, got None"),
    "codes to decode": (lambda p: p.image_tokenizer.decode(None), "codes must be a tensor, got None"),
    "codes of a prior": (lambda p: p.prior.image_logits(IDS, None), "codes must be a tensor, got None"),
}


def fails(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert explain(caught.value)[1] == USER  # raised by a check of this package, not by Python in the midst of work


@pytest.mark.parametrize("name", WITHOUT_MODEL)
def test_wrong_types_without_a_model(name: str) -> None:
    fails(*WITHOUT_MODEL[name])


@pytest.mark.parametrize("name", WITH_MODEL)
def test_wrong_types_for_a_pipeline(pipe: Any, name: str) -> None:
    call, message = WITH_MODEL[name]
    fails(lambda: call(pipe), message)


def test_unknown_arguments_of_functions() -> None:
    with pytest.raises(TypeError, match=r"unknown argument 'quantizes'. Did you mean 'quantize'"):
        DallePipeline.from_pretrained("composition", quantizes="int8")  # type: ignore[call-arg]

    @suggests_arguments
    def function(path: Path, /, number: int = 1, *, name: str = "") -> tuple[Path, int, str]:
        """Documented."""
        return path, number, name

    assert function(Path("a"), 2, name="b") == (Path("a"), 2, "b")
    assert function.__doc__ == "Documented."
    with pytest.raises(TypeError, match="unknown argument 'path'"):
        function(path=Path("a"))  # type: ignore[call-arg]


def test_values_in_messages_are_short() -> None:
    assert [shown(value) for value in ("a  b", None, 7.5)] == ["'a  b'", "None", "7.5"]
    assert max(len(shown("x" * 10**6)), len(shown([torch.zeros(99)] * 99))) < 999
    assert shown(IMAGE) == "<PIL.Image.Image image mode=RGB size=12x12>"
    with pytest.raises(TypeError, match=r"folder must be a path, got \[<PIL.Image.Image image mode=RGB size=12x12>\]"):
        user_path([IMAGE], "folder")  # type: ignore[arg-type]
