"""Arguments of a call are checked without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_zoo.call import Call, check_image, check_images


@pytest.mark.parametrize("prompt", [None, 5, Path("prompts.txt"), {"a": 1}, [], [b"a"], ["a", None]])
def test_a_prompt_is_text(prompt: Any) -> None:
    with pytest.raises(TypeError, match="prompt must be a string or a non-empty list of strings"):
        Call(prompt)


def test_a_prompt_is_unicode() -> None:
    with pytest.raises(ValueError, match=r"prompt must be valid Unicode, got half a surrogate pair in 'a \\ud800'"):
        Call(["fine", "a \ud800"])


@pytest.mark.parametrize("name", ["num_images_per_prompt", "rerank", "seed", "window", "batch_size"])
@pytest.mark.parametrize("value", [2.0, "2", True, [1.5, 2], torch.tensor([1.5, 2])])
def test_counts_and_seeds_are_integers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer"):
        Call(["a", "b"], **{name: value})


def test_a_call_has_a_largest_number_of_images() -> None:
    assert Call(["a"] * 4, num_images_per_prompt=25_000).num_images_per_prompt == 25_000
    with pytest.raises(ValueError, match=r"at most 100,000, got 100,004 \(4 prompts, num_images_per_prompt 25,001\)"):
        Call(["a"] * 4, num_images_per_prompt=25_001)


@pytest.mark.parametrize("generator", [5, np.random.default_rng(0), [5, 5], "cpu"])
def test_a_generator_is_that_of_torch(generator: Any) -> None:
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or a list of them"):
        Call(["a", "b"], generator=generator)


@pytest.mark.parametrize("given", [[[1]], np.zeros((8, 8), int), torch.zeros(8, 8), "x"])
def test_given_codes_are_a_tensor_of_integers(given: Any) -> None:
    with pytest.raises(TypeError, match="given must be an int64 tensor, got"):
        Call("a", given=given)


def test_a_callback_is_a_function() -> None:
    Call("a", callback=print)
    with pytest.raises(TypeError, match="callback must be a function of one Progress, got 5"):
        Call("a", callback=5)


@pytest.mark.parametrize("images", [Image.new("RGB", (8, 8)), [], ["x.png"], None, [torch.zeros(3, 8, 8)]])
def test_images_to_score_are_a_list_or_pixels(images: Any) -> None:
    check_images([Image.new("RGB", (8, 8))])
    with pytest.raises(TypeError, match="images must be a non-empty list of PIL images, or pixels"):
        check_images(images)


@pytest.mark.parametrize("value", [200.0, float("nan")])
def test_images_to_score_have_pixels_in_0_to_1(value: float) -> None:
    with pytest.raises(ValueError, match="pixels in"):
        check_images(torch.full((1, 3, 8, 8), value))


def test_one_seed_whatever_its_type() -> None:
    expected = Call("a", 3, seed=7).seeds()
    for seed in (np.int64(7), torch.tensor(7)):
        assert Call("a", 3, seed=seed).seeds().equal(expected)
    assert not Call("a", 3, seed=1).seeds().equal(expected)


def test_a_returned_seed_gives_its_image_again() -> None:
    seeds = Call(["a", "b"], 2, seed=7).seeds()
    assert seeds[0, 0] == 7
    for p, n in ((0, 1), (1, 0), (1, 1)):
        assert Call("a", seed=int(seeds[p, n])).seeds().item() == seeds[p, n]
    for several in (seeds, seeds.flatten().tolist(), tuple(seeds.flatten().tolist())):
        assert Call(["a", "b"], 2, seed=several).seeds().equal(seeds)
    with pytest.raises(ValueError, match="expected 4 seeds, one per image, or a single one, got 3"):
        Call(["a", "b"], 2, seed=[1, 2, 3])
    with pytest.raises(ValueError, match=r"seed must be an integer in 0\.\."):
        Call("a", 2, seed=[1, -1])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("x.png", "floating-point pixels, got str: open it with PIL"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "floating-point pixels, got torch.uint8"),
        (torch.full((3, 8, 8), 255.0), r"pixels in \[0, 1\], got 255..255: divide pixels of 0..255 by 255"),
        (torch.tensor([0.5, torch.nan]), r"pixels in \[0, 1\], got nan..nan"),
        (torch.tensor([-0.1, 0.5]), r"pixels in \[0, 1\], got -0.1..0.5"),
    ],
)
def test_an_image_to_continue(image: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_image(image)
    check_image(torch.rand(3, 8, 8))
