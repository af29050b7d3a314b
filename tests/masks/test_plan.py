"""Contract of every registered mask, and everything derived from its declaration."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from dalle_zoo.masks import MASKS, Mask, MaskMod, TextImageLayout, text_then_image

LAYOUTS = [
    TextImageLayout(text=6, height=4, width=4),
    TextImageLayout(text=3, height=2, width=7),
    TextImageLayout(text=3, height=7, width=2),
    TextImageLayout(text=5, height=16, width=16),
    TextImageLayout(text=1, height=1, width=1),
    TextImageLayout(text=2, height=6, width=1),
    TextImageLayout(text=2, height=1, width=6),
]
PAPER = TextImageLayout(text=256, height=32, width=32)

every_mask = pytest.mark.parametrize("spec", [*MASKS, "conv(kernel=3)"])
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda it: f"{it.text}+{it.height}x{it.width}")


@every_mask
@every_layout
def test_masks_are_causal_and_image_attends_to_all_text(spec: str, layout: TextImageLayout) -> None:
    mask = Mask.from_spec(spec, layout)
    dense, text = mask.dense(), layout.text
    assert dense.shape == (layout.length, layout.length)
    assert dense.dtype == torch.bool
    assert not dense.triu(1).any(), "causal"
    assert dense.diagonal().all(), "every position attends to itself"
    assert dense[text:, :text].all(), "the image attends to all text"
    assert not dense[:text, text:].any(), "text never attends to the image"
    assert mask.num_pairs == int(dense.sum())
    assert 0 < mask.density <= 1


@every_mask
@every_layout
def test_decode_table_lists_the_rows_of_the_matrix(spec: str, layout: TextImageLayout) -> None:
    mask = Mask.from_spec(spec, layout)
    image = mask.dense()[layout.text :, layout.text :]
    table = mask.decode_table()
    assert table.keys.dtype == torch.int64
    assert table.keys.shape == table.valid.shape
    assert table.valid.any(dim=0).all(), "no column that is only padding"
    for step in range(layout.image):
        expected = image[step].nonzero()[:, 0].tolist()
        assert table.keys[step][table.valid[step]].tolist() == expected
        assert (table.keys[step][~table.valid[step]] == step).all(), "padding is safe to read"


@every_mask
@pytest.mark.parametrize("layout", [*LAYOUTS, PAPER], ids=str)
def test_the_cache_plan_retains_every_key_until_its_last_read(spec: str, layout: TextImageLayout) -> None:
    mask = Mask.from_spec(spec, layout)
    table, plan = mask.decode_table(), mask.cache_plan()
    slots = torch.full((plan.num_slots,), -1)
    for step in range(layout.image):
        slots[plan.slot_of_key[step]] = step
        assert torch.equal(slots[plan.read_slots[step]], table.keys[step])
    assert torch.equal(plan.valid, table.valid)
    # The number of slots is the largest number of keys that are still needed at once.
    reads = mask.dense()[layout.text :, layout.text :].int()
    steps = torch.arange(layout.image)
    last_read = layout.image - 1 - reads.flip(0).argmax(dim=0)
    alive = (steps[None, :] <= steps[:, None]) & (last_read[None, :] >= steps[:, None])
    assert plan.num_slots == int(alive.sum(dim=1).max())


@pytest.mark.parametrize(
    ("spec", "slots"),
    # Column: keys of all rows but the last are cached when the last row begins, and each step frees one column.
    # Conv: the farthest offset is 191.
    [("row", 33), ("column", 993), ("conv", 192), ("full", 1024)],
)
def test_slots_of_the_papers_model(spec: str, slots: int) -> None:
    assert Mask.from_spec(spec, PAPER).cache_plan().num_slots == slots


@every_mask
def test_sdpa_arguments_give_the_softmax_over_allowed_keys(spec: str) -> None:
    mask = Mask.from_spec(spec, TextImageLayout(text=3, height=5, width=6))
    generator = torch.Generator().manual_seed(0)
    length = mask.layout.length
    query, key, value = torch.randn(3, 2, 4, length, 8, generator=generator, dtype=torch.float64)
    scores = (query @ key.mT / 8**0.5).masked_fill(~mask.dense(), -torch.inf)
    expected = scores.softmax(dim=-1) @ value
    came = F.scaled_dot_product_attention(query, key, value, **mask.sdpa_arguments("cpu"))
    torch.testing.assert_close(came, expected)


def test_a_causal_mask_needs_no_matrix_for_sdpa() -> None:
    assert Mask.from_spec("full", LAYOUTS[0]).sdpa_arguments() == {"is_causal": True}
    # A band as long as the image is plain causal attention.
    assert Mask.from_spec("row", TextImageLayout(2, 1, 6)).sdpa_arguments() == {"is_causal": True}
    assert set(Mask.from_spec("row", LAYOUTS[0]).sdpa_arguments()) == {"attn_mask"}


def test_flops_count_scores_and_values() -> None:
    # 22 positions, causal: 253 pairs; a head of 8 takes 8 multiply-adds each way.
    assert Mask.from_spec("full", LAYOUTS[0]).flops(num_heads=3, head_dim=8) == 253 * 3 * 8 * 2 * 2


def test_dense_returns_a_new_tensor() -> None:
    mask = Mask.from_spec("row", LAYOUTS[0])
    mask.dense().zero_()
    assert mask.dense().any()


def test_masks_can_be_built_under_a_meta_device_or_inference_mode() -> None:
    with torch.device("meta"), torch.inference_mode():
        mask = Mask.from_spec("conv(kernel=3)", LAYOUTS[0])
        assert mask.cache_plan().slot_of_key.device.type == "cpu"
    dense = mask.dense()
    assert dense.device.type == "cpu"
    assert not dense.is_inference()
    assert mask.dense("meta").device.type == "meta"


def test_a_mask_has_the_canonical_spec_and_compares_by_identity() -> None:
    masks = [Mask.from_spec(spec, LAYOUTS[0]) for spec in ("conv(kernel=3)", " conv( kernel=3 )")]
    assert {mask.spec for mask in masks} == {"conv(kernel=3)"}
    assert len({*masks, masks[0]}) == 2


BROKEN: dict[str, tuple[MaskMod, type[Exception], str]] = {
    "not causal": (lambda q, k: (q - k).abs() < 99, ValueError, "position 0 attends to a later"),
    "not itself": (lambda q, k: k < q, ValueError, "position 0 does not attend to itself"),
    "no text": (
        lambda q, k: (k <= q) & (q - k < 3),
        ValueError,
        "position 6 .* not attend to all text",
    ),
    "not bool": (lambda q, k: q - k, TypeError, "bool tensor, got torch.int64"),
    "no tensor": (lambda q, k: True, TypeError, "bool tensor, got bool"),
    "one argument": (lambda q, k: q >= 0, ValueError, r"expected shape \(22, 22\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_mask_that_breaks_the_contract_raises(case: str) -> None:
    mod, error, message = BROKEN[case]
    with pytest.raises(error, match=f"mask 'mine'.* {message}"):
        Mask("mine", LAYOUTS[0], mod)


def test_text_then_image_makes_any_rule_causal() -> None:
    layout = LAYOUTS[0]
    everything = Mask("mine", layout, text_then_image(layout, lambda q, k: (q == q) | (k == k)))
    assert torch.equal(everything.dense(), Mask.from_spec("full", layout).dense())


@every_mask
@every_layout
def test_counts_are_equal_for_masks_built_without_text_then_image(spec: str, layout: TextImageLayout) -> None:
    built = Mask.from_spec(spec, layout)
    plain = Mask("mine", layout, lambda query, key: built.mod(query, key))  # is asked for every pair
    assert plain.num_pairs == built.num_pairs == int(built.dense().sum())
    assert plain.line_sizes == built.line_sizes
    assert plain.is_causal == built.is_causal == torch.equal(built.dense(), torch.ones_like(built.dense()).tril())


@every_mask
def test_a_large_grid_is_counted_without_its_matrix(spec: str) -> None:
    layout = TextImageLayout(text=16, height=64, width=64)
    built = Mask.from_spec(spec, layout)
    asked: list[int] = []

    def mod(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        asked.append((query - key).numel())
        return built.mod(query, key)

    mod.repeats_by_row = True  # type: ignore[attr-defined]
    mask = Mask("mine", layout, mod)
    assert mask.num_pairs == built.num_pairs
    assert mask.line_sizes == built.line_sizes
    assert sum(asked) == layout.image + layout.image * layout.width  # each cell with itself, and rows with one row


def test_a_rule_that_depends_on_the_row_raises() -> None:
    layout = LAYOUTS[0]
    mask = Mask("mine", layout, text_then_image(layout, lambda q, k: q // 8 == k // 8))
    for use in (mask.dense, mask.sdpa_arguments, mask.line_plan, mask.decode_table):
        with pytest.raises(ValueError, match=r"mask 'mine'.*depends on the row of a cell, for cells 1 rows apart"):
            use()


@pytest.mark.parametrize("sizes", [(0, 4, 4), (6, -1, 4), (6, 4, 2.0), (6, 4, True), (6, 4, "4")])
def test_invalid_layout_sizes_raise(sizes: tuple[int, int, int]) -> None:
    with pytest.raises((TypeError, ValueError), match="must be an integer of at least 1, got"):
        TextImageLayout(*sizes)


def test_listing_masks_does_not_load_torch() -> None:
    code = (
        "import sys; from dalle_zoo.masks import MASKS, layer_masks; "
        "layer_masks('paper(kernel=3)', 4); list(MASKS); "
        "sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("window", [1, 2, 4, 16])
@every_mask
@every_layout
def test_a_key_is_cached_through_all_windows_that_may_read_it(spec: str, layout: TextImageLayout, window: int) -> None:
    mask = Mask.from_spec(spec, layout)
    plan, reads = mask.cache_plan(window), mask.dense()[layout.text :, layout.text :]
    slots = torch.full((plan.num_slots,), -1)
    for first in range(layout.image):
        written = slice(first, first + window)
        # The pass from `first` writes its complete window; every later pass may still begin at first + 1.
        slots[plan.slot_of_key[written]] = torch.arange(layout.image)[written]
        for step in range(first, min(first + window, layout.image)):
            assert set(reads[step].nonzero().flatten().tolist()) <= set(slots.tolist())


def test_number_of_additional_slots_for_a_window() -> None:
    row = Mask.from_spec("row", PAPER)
    assert [row.cache_plan(window).num_slots for window in (1, 2, 32)] == [33, 34, 64]
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        row.cache_plan(0)
