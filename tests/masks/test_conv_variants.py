"""The convolutional masks of ruDALL-E, and how they differ from the paper's."""

from __future__ import annotations

import pytest
import torch

from dalle_zoo.masks import Mask, TextImageLayout

# Image-to-image part on a 4 x 4 grid with kernel 3, query by key, made with rudalle 1.1.3: get_conv_mask of
# hf_version v3 and v2. Nothing here is computed by the package.
LAYOUT = TextImageLayout(text=3, height=4, width=4)

CLAMPED = """
#...............
##..............
.##.............
..##............
##..#...........
###.##..........
.###.##.........
..##..##........
....##..#.......
....###.##......
.....###.##.....
......##..##....
........##..#...
........###.##..
.........###.##.
..........##..##
"""

TORUS = """
#...............
##..............
.##.............
#.##............
##.##...........
###.##..........
.###.##.........
#.###.##........
....##.##.......
....###.##......
.....###.##.....
....#.###.##....
##.#....##.##...
###.....###.##..
.###.....###.##.
#.##....#.###.##
"""


def matrix(diagram: str) -> torch.Tensor:
    return torch.tensor([[cell == "#" for cell in line] for line in diagram.split()])


@pytest.mark.parametrize(("name", "diagram"), [("conv_clamped", CLAMPED), ("conv_torus", TORUS)])
def test_convolutional_masks_equal_diagrams_of_the_original(name: str, diagram: str) -> None:
    image = Mask.from_spec(f"{name}(kernel=3)", LAYOUT).dense()[3:, 3:]
    assert torch.equal(image, matrix(diagram))


def neighbors(name: str, query: tuple[int, int]) -> set[tuple[int, int]]:
    """Cells that a query attends to on ruDALL-E's grid with a kernel of 11."""
    image = Mask.from_spec(name, TextImageLayout(text=128, height=32, width=32)).dense()[128:, 128:]
    row, column = query
    return {divmod(key, 32) for key in image[32 * row + column].nonzero()[:, 0].tolist()}


def test_neighborhoods_at_the_borders_of_the_grid() -> None:
    before = {(10, 0), *((row, column) for row in range(5, 10) for column in range(6))}
    assert neighbors("conv_clamped", (10, 0)) == before | {(10, 0)}
    wrapped = {(row, column) for row in range(5, 10) for column in range(27, 32)}
    assert neighbors("conv_torus", (10, 0)) == before | wrapped
    last = neighbors("conv_torus", (31, 16))
    assert {row for row, _ in last} == {*range(26, 32), *range(5)}
    assert {row for row, _ in neighbors("conv_clamped", (31, 16))} == set(range(26, 32))


@pytest.mark.parametrize("name", ["conv_clamped", "conv_torus"])
@pytest.mark.parametrize("kernel", [0, 4])
def test_an_even_kernel_raises(name: str, kernel: int) -> None:
    with pytest.raises(ValueError, match=f"kernel .* must be odd and at least 1, got {kernel}"):
        Mask.from_spec(f"{name}(kernel={kernel})", LAYOUT)


@pytest.mark.parametrize("name", ["conv_clamped", "conv_torus"])
def test_on_a_grid_smaller_than_the_kernel_it_is_full(name: str) -> None:
    layout = TextImageLayout(2, 3, 5)
    assert torch.equal(Mask.from_spec(name, layout).dense(), Mask.from_spec("full", layout).dense())
