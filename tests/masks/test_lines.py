"""Line plans: every pair that a mask allows stands in one line, and nothing else."""

from __future__ import annotations

import pytest
import torch

from dalle_zoo.masks import MASKS, Mask, TextImageLayout
from dalle_zoo.models import attention

LAYOUTS = [TextImageLayout(3, 4, 4), TextImageLayout(1, 2, 5), TextImageLayout(2, 6, 3), TextImageLayout(1, 1, 1)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", list(MASKS))
def test_lines_restate_the_mask(name: str, layout: TextImageLayout) -> None:
    mask = Mask.from_spec(name, layout)
    plan = mask.line_plan()
    assert sorted(plan.queries.flatten().tolist()) == list(range(layout.image))
    rebuilt = torch.zeros(layout.image, layout.image, dtype=torch.int64)
    for line, queries in enumerate(plan.queries.tolist()):
        for row, query in enumerate(queries):
            for slot, key in enumerate(plan.keys[line].tolist()):
                rebuilt[query, key] += int(plan.allowed[line, row, slot])
    assert torch.equal(rebuilt, mask.dense()[layout.text :, layout.text :].long())


@pytest.mark.parametrize(("name", "by_rows", "num_keys"), [("row", True, 64), ("column", False, 32)])
def test_the_cheaper_direction_is_taken(name: str, by_rows: bool, num_keys: int) -> None:
    plan = Mask.from_spec(name, TextImageLayout(256, 32, 32)).line_plan()
    assert plan.queries[0].tolist() == (list(range(32)) if by_rows else list(range(0, 1024, 32)))
    assert plan.keys.shape == (32, num_keys)


@pytest.mark.parametrize(
    ("name", "expected"), [("row", False), ("column", False), ("conv(kernel=5)", False), ("full", True)]
)
def test_only_a_full_mask_falls_back(name: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the agreement of the back-ends would compare sdpa with itself."""
    mask = Mask.from_spec(name, TextImageLayout(4, 8, 8))
    lengths = []
    real = attention.sdpa
    monkeypatch.setattr(attention, "sdpa", lambda q, k, v, m: lengths.append(q.shape[-2]) or real(q, k, v, m))
    query, key, value = torch.randn(3, 2, 2, mask.layout.length, 4)
    out = attention.lines(query, key, value, mask)
    assert (mask.layout.length in lengths) is expected
    torch.testing.assert_close(out, attention.dense(query, key, value, mask), atol=1e-5, rtol=1e-5)
