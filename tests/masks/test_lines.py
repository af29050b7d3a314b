"""Line plans: every allowed pair of a mask is in exactly one line, and no other pair is."""

from __future__ import annotations

import pytest
import torch

from dalle_zoo.masks import MASKS, Mask, TextImageLayout

LAYOUTS = [TextImageLayout(3, 4, 4), TextImageLayout(1, 2, 5), TextImageLayout(2, 6, 3), TextImageLayout(1, 1, 1)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", list(MASKS))
def test_the_line_plan_contains_exactly_the_allowed_pairs(name: str, layout: TextImageLayout) -> None:
    mask = Mask.from_spec(name, layout)
    plan = mask.line_plan()
    assert sorted(plan.queries.flatten().tolist()) == list(range(layout.image))
    rebuilt = torch.zeros(layout.image, layout.image, dtype=torch.int64)
    for line, queries in enumerate(plan.queries.tolist()):
        for row, query in enumerate(queries):
            for slot, key in enumerate(plan.keys[line].tolist()):
                rebuilt[query, key] += int(plan.allowed[line, row, slot])
    assert torch.equal(rebuilt, mask.dense()[layout.text :, layout.text :].long())
    sizes = mask.line_sizes
    assert (sizes.num_lines, sizes.num_queries, sizes.num_keys) == plan.allowed.shape
    assert sizes.num_gathered == plan.queries.numel() + plan.keys.numel()


@pytest.mark.parametrize(("name", "by_rows", "num_keys"), [("row", True, 64), ("column", False, 32)])
def test_the_cheaper_direction_is_chosen(name: str, by_rows: bool, num_keys: int) -> None:
    plan = Mask.from_spec(name, TextImageLayout(256, 32, 32)).line_plan()
    assert plan.queries[0].tolist() == (list(range(32)) if by_rows else list(range(0, 1024, 32)))
    assert plan.keys.shape == (32, num_keys)


@pytest.mark.parametrize(("name", "lines", "num_queries"), [("conv", 16, 64), ("row", 32, 32), ("full", 8, 128)])
def test_lines_that_share_most_keys_are_merged(name: str, lines: int, num_queries: int) -> None:
    plan = Mask.from_spec(name, TextImageLayout(256, 32, 32)).line_plan()
    assert plan.queries.shape == (lines, num_queries)


@pytest.mark.parametrize(("name", "causal"), [("column", True), ("row_same", True), ("row", False), ("conv", False)])
def test_lines_that_attend_only_to_themselves_are_causal(name: str, causal: bool) -> None:
    assert Mask.from_spec(name, TextImageLayout(256, 32, 32)).line_plan().causal is causal
