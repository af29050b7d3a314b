"""The four panels of figure 11 of the paper, and the patterns on other grids."""

import pytest
import torch

from dalle_zoo.masks import MASKS, Mask, TextImageLayout

# Image-to-image part of the illustrated case (6 text positions, 4 x 4 grid, kernel 3), query by key, by
# the offsets that the figure shows: row 0..4; column 0, 4, 8, 12; conv 0, 1, 3, 4, 5, 7; column on
# transposed states: blocks of 4. Nothing here is computed by the package.
EXAMPLE = TextImageLayout(text=6, height=4, width=4)

ROW = """
#...............
##..............
###.............
####............
#####...........
.#####..........
..#####.........
...#####........
....#####.......
.....#####......
......#####.....
.......#####....
........#####...
.........#####..
..........#####.
...........#####
"""

COLUMN = """
#...............
.#..............
..#.............
...#............
#...#...........
.#...#..........
..#...#.........
...#...#........
#...#...#.......
.#...#...#......
..#...#...#.....
...#...#...#....
#...#...#...#...
.#...#...#...#..
..#...#...#...#.
...#...#...#...#
"""

CONV = """
#...............
##..............
.##.............
#.##............
##.##...........
###.##..........
.###.##.........
#.###.##........
.#.###.##.......
..#.###.##......
...#.###.##.....
....#.###.##....
.....#.###.##...
......#.###.##..
.......#.###.##.
........#.###.##
"""

COLUMN_TRANSPOSED = """
#...............
##..............
###.............
####............
....#...........
....##..........
....###.........
....####........
........#.......
........##......
........###.....
........####....
............#...
............##..
............###.
............####
"""

TEXT = """
#.....
##....
###...
####..
#####.
######
"""


def matrix(diagram: str) -> torch.Tensor:
    return torch.tensor([[cell == "#" for cell in line] for line in diagram.split()])


@pytest.mark.parametrize(("spec", "diagram"), [("row", ROW), ("column", COLUMN), ("conv(kernel=3)", CONV)])
def test_masks_equal_figure_11(spec: str, diagram: str) -> None:
    dense = Mask.from_spec(spec, EXAMPLE).dense()
    assert torch.equal(dense[6:, 6:], matrix(diagram))
    assert torch.equal(dense[:6, :6], matrix(TEXT))
    assert dense[6:, :6].all(), "every image position reads all text"
    assert not dense[:6, 6:].any(), "text never reads the image"


def test_column_on_transposed_states_is_block_diagonal() -> None:
    image = Mask.from_spec("column", EXAMPLE).dense()[6:, 6:]
    column_major = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]
    assert torch.equal(image[column_major][:, column_major], matrix(COLUMN_TRANSPOSED))


def test_full_is_plain_causal() -> None:
    dense = Mask.from_spec("full", EXAMPLE).dense()
    assert all(bool(dense[q, k]) == (k <= q) for q in range(22) for k in range(22))


CONV_11 = {r * 32 + o for r in range(6) for o in (0, 1, 2, 3, 4, 5, 27, 28, 29, 30, 31)}


@pytest.mark.parametrize(
    ("spec", "offsets"),
    [
        ("row", set(range(33))),
        ("column", set(range(0, 1024, 32))),
        ("conv", CONV_11),
        ("full", set(range(1024))),
    ],
)
def test_offsets_of_the_papers_model(spec: str, offsets: set[int]) -> None:
    layout = TextImageLayout(text=256, height=32, width=32)
    image = Mask.from_spec(spec, layout).dense()[256:, 256:]
    for query in (0, 1, 31, 32, 500, 991, 1023):  # both borders, the center, the last cell
        read = set((query - image[query].nonzero()[:, 0]).tolist())
        assert read == {o for o in offsets if o <= query}


def slow_pairs(text: int, height: int, width: int, kernel: int) -> int:
    """Pairs of the conv mask, counted one by one from the bands that the paper plots."""
    reach = kernel // 2
    offsets = {r * width + c % width for r in range(reach + 1) for c in range(-reach, reach + 1)}
    image = sum(q - k in offsets for q in range(height * width) for k in range(q + 1))
    return text * (text + 1) // 2 + height * width * text + image


@pytest.mark.parametrize(
    ("spec", "pairs"),
    [
        ("row", 328_304),
        ("column", 311_936),
        ("full", 819_840),
        ("conv", slow_pairs(256, 32, 32, 11)),
    ],
)
def test_pair_counts_of_the_papers_model(spec: str, pairs: int) -> None:
    mask = Mask.from_spec(spec, TextImageLayout(text=256, height=32, width=32))
    assert mask.num_pairs == pairs
    assert mask.density == pairs / 819_840


@pytest.mark.parametrize(("height", "width", "kernel"), [(3, 7, 3), (7, 3, 3), (5, 6, 5), (4, 4, 1)])
def test_conv_on_other_grids(height: int, width: int, kernel: int) -> None:
    mask = Mask.from_spec(f"conv(kernel={kernel})", TextImageLayout(2, height, width))
    assert mask.num_pairs == slow_pairs(2, height, width, kernel)


def test_conv_on_a_grid_narrower_than_its_kernel_is_a_band() -> None:
    image = Mask.from_spec("conv(kernel=5)", TextImageLayout(1, 5, 4)).dense()[1:, 1:]
    for query in range(20):
        assert image[query].nonzero()[:, 0].tolist() == list(range(max(0, query - 11), query + 1))


@pytest.mark.parametrize("kernel", [-1, 0, 2, 10])
def test_conv_raises_for_an_even_kernel(kernel: int) -> None:
    with pytest.raises(ValueError, match=f"kernel .* must be odd and at least 1, got {kernel}"):
        Mask.from_spec(f"conv(kernel={kernel})", EXAMPLE)


def test_the_papers_masks_are_registered_with_an_explanation() -> None:
    assert {"full", "row", "column", "conv"} <= set(MASKS)
    for name, factory in MASKS.items():
        assert factory.__doc__, name
        assert factory.__doc__.splitlines()[0].endswith("."), name
