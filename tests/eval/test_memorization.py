"""Nearest images, sheets of pairs, and exclusion lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dalle_zoo_eval.memorization import nearest, pair_sheet, write_exclusions


def features(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def test_copy_is_found() -> None:
    gallery = features(20, 0)
    asked = torch.cat([features(3, 1), 2 * gallery[[7]], features(2, 2)])  # the cosine knows no length
    found = nearest(asked, [gallery])
    assert found.index[3] == 7
    assert float(found.similarity[3]) == pytest.approx(1, abs=1e-6)
    assert found.closest(2)[0] == 3
    assert found.record(0.999)["share_above"] == pytest.approx(1 / 6)


def test_nearest_does_not_depend_on_batch_size() -> None:
    asked, gallery = features(30, 1), features(50, 2)
    cosines = torch.nn.functional.cosine_similarity(asked[:, None], gallery[None], dim=-1)
    for batch_size in (7, 1024):
        found = nearest(asked, gallery.split(7), batch_size=batch_size)
        torch.testing.assert_close(found.similarity, cosines.max(1).values)
        assert torch.equal(found.index, cosines.argmax(1))


def test_incompatible_sets_raise() -> None:
    with pytest.raises(ValueError, match="must hold images, got 0 query images"):
        nearest(features(0, 0), [features(4, 0)])
    with pytest.raises(ValueError, match="must hold images, got an empty gallery"):
        nearest(features(4, 0), [])
    with pytest.raises(ValueError, match="of one network, got 8 and 4 numbers"):
        nearest(features(2, 0), [features(2, 0)[:, :4]])


def test_unreadable_images_are_never_nearest() -> None:
    gallery = features(6, 0)
    asked = gallery.clone()
    gallery[2] = torch.nan
    found = nearest(asked, [gallery])
    assert found.index.tolist()[:2] == [0, 1]
    assert 2 not in found.index
    assert bool(found.similarity.isfinite().all())


def test_sheet_has_one_tile_per_pair() -> None:
    found = nearest(features(5, 1), [features(9, 2)])
    images = [torch.full((3, 40, 60), 9, dtype=torch.uint8)] * 2
    sheet = pair_sheet(found, images, [torch.zeros(3, 20, 20, dtype=torch.uint8)] * 2, title="pairs")
    assert sheet.width > 4 * 128
    assert sheet.convert("L").getextrema() == (0, 255)


def test_exclusion_list_has_overlapping_keys(tmp_path: Path) -> None:
    gallery = features(4, 0)
    found = nearest(torch.cat([gallery[:2], -gallery[2:3]]), [gallery])
    path = tmp_path / "lists" / "overlaps.txt"
    assert write_exclusions(found, ["a", "b", "c"], 0.99, path, note="a test") == 2
    assert path.read_text() == "# a test\na\nb\n"
