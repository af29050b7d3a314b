"""Self-check of the reference: correct images pass, others fail, and statistics can be recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dalle_zoo_eval.blur import gaussian_blur
from dalle_zoo_eval.datasets import Item
from dalle_zoo_eval.extractors import EXTRACTORS
from dalle_zoo_eval.extractors.base import Extractor
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.image_sources import ImageBatch
from dalle_zoo_eval.protocol import Protocol, find_protocol
from dalle_zoo_eval.selfcheck import SelfCheck, SelfCheckError, check_reference, first_half
from torch import Tensor

from dalle_zoo.sharing import Share

NETWORK = "inception-2015"
COUNT, SIDE = 240, 8


class Stack:
    """An image source of images in memory."""

    counts = [1]  # noqa: RUF012

    def __init__(self, images: Tensor) -> None:
        self.images, self.identity = images, {"sum": int(images.long().sum())}

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: Sequence[int]) -> ImageBatch:
        images = [self.images[i] for i in indices]
        return ImageBatch(images={1: images}, chosen={1: [0] * len(images)}, captions=[""] * len(images), others=[])


class Pixels:
    """Returns all pixels as features, so that there may be fewer images than features."""

    name = NETWORK
    record: dict[str, str | int] = {"sha256": EXTRACTORS.spec(NETWORK).weights[0].sha256}  # noqa: RUF012

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": images.float().flatten(1) / 255}


class Contrast:
    """Returns the means of the four quarters and the deviation of the pixels as features."""

    name = NETWORK
    record: dict[str, str | int] = {"sha256": EXTRACTORS.spec(NETWORK).weights[0].sha256}  # noqa: RUF012

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        x = images.float() / 255
        quarters = torch.nn.functional.avg_pool2d(x.mean(1), SIDE // 2).flatten(1)
        return {"features": torch.cat([quarters, x.std((1, 2, 3))[:, None]], 1)}


def noise(seed: int = 0, count: int = COUNT) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def items(kinds: Sequence[str]) -> list[Item]:
    return [Item(key=f"{kind}/{i:04d}", image=None, captions=()) for i, kind in enumerate(kinds)]


def check(
    images: Tensor,
    cache: Path,
    kinds: Sequence[str] | None = None,
    protocol: Protocol | None = None,
    network: Extractor | None = None,
) -> SelfCheck:
    measured = FeatureStore(Stack(images), {NETWORK: network or Contrast()}, (0,), 17, cache)
    measured.run(Share(), label="reference")
    known = protocol or find_protocol("coco-30k")
    (group,) = known.groups.values()
    return check_reference(
        measured, known, items(kinds or ["all"] * len(images)),
        known=bool(group.num_images), exclusions=group.captions.exclusions,
    )  # fmt: skip


def passed(found: SelfCheck) -> dict[str, bool]:
    return {c["name"].partition(": ")[2]: c["passed"] for c in found.checks}


HALVES = "first half of the reference against its second"


@pytest.mark.parametrize("seed", range(4))
def test_correct_reference_passes(seed: int, tmp_path: Path) -> None:
    found = check(noise(seed), tmp_path)
    assert passed(found) == {
        "sha256 of its weights": True,
        "reference against itself, share of its variance": True,
        HALVES: True,
    }


def test_half_blurred_reference_fails(tmp_path: Path) -> None:
    images = noise()
    blurred = torch.stack(gaussian_blur(list(images[COUNT // 2 :]), [1])[1])
    with pytest.raises(SelfCheckError, match=rf"{HALVES}: 0\.\d+, expected at most 0\.0\d+, where 16 random splits"):
        check(torch.cat([images[: COUNT // 2], blurred]), tmp_path)


def test_last_third_of_another_kind_fails(tmp_path: Path) -> None:
    images = noise()
    images[2 * COUNT // 3 :] //= 2  # darker
    with pytest.raises(SelfCheckError, match=HALVES):
        check(images, tmp_path)


@pytest.mark.parametrize("count", [120, 600])  # of 192 features
def test_second_half_with_less_detail_fails(count: int, tmp_path: Path) -> None:
    images = noise(count=count)
    assert passed(check(images, tmp_path / "honest", network=Pixels()))[HALVES]
    coarse = images[count // 2 :].float()
    coarse = torch.nn.functional.avg_pool2d(coarse, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    coarse = 127.5 + 2 * (coarse - 127.5)  # of equal contrast
    damaged = torch.cat([images[: count // 2], coarse.clamp(0, 255).byte()])
    with pytest.raises(SelfCheckError, match=HALVES):
        check(damaged, tmp_path / "damaged", network=Pixels())


def test_different_classes_and_folders_pass(tmp_path: Path) -> None:
    """Birds are sorted by class, so the order carries no information only within a class."""
    images = noise()
    images[COUNT // 2 :] //= 2
    kinds = ["bright"] * (COUNT // 2) + ["dark"] * (COUNT // 2)
    assert passed(check(images, tmp_path, kinds))[HALVES]


def test_unknown_folder_is_not_stopped_by_its_order(tmp_path: Path) -> None:
    images = noise()
    images[COUNT // 2 :] //= 2
    found = check(images, tmp_path, protocol=find_protocol("folder"))
    assert HALVES not in passed(found)
    assert any("Either the images are sorted" in line for line in found.left_out)


def test_few_images_are_not_split(tmp_path: Path) -> None:
    found = check(noise(count=99), tmp_path)
    assert f"self-check of {NETWORK} by halves: too few images, 99 of 100" in found.left_out


def test_equal_images_fail(tmp_path: Path) -> None:
    with pytest.raises(SelfCheckError, match="the same features for all 5 images of the reference"):
        check(torch.full((5, 3, SIDE, SIDE), 7, dtype=torch.uint8), tmp_path)


def test_other_weights_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Contrast, "record", {"sha256": "ab"})
    with pytest.raises(SelfCheckError, match=r"sha256 of its weights: ab, expected 6726825d0af5"):
        check(noise(), tmp_path)


def test_recorded_statistics_are_checked(tmp_path: Path) -> None:
    protocol = find_protocol("coco-30k")
    found = check(noise(), tmp_path)
    (line,) = (line for line in found.left_out if "add to the protocol: " in line)
    record: dict[str, Any] = yaml.safe_load(line.partition("add to the protocol: ")[2])
    assert [entry["family"] for entry in record["reference"]] == [NETWORK]
    recorded = Protocol.from_dict({**json.loads(json.dumps(asdict(protocol))), **record})
    again = check(noise(), tmp_path, protocol=recorded)
    assert passed(again)["norm of the mean, as on record"]
    assert passed(again)["trace of the covariance, as on record"]
    assert not any("by record" in line for line in again.left_out)
    with pytest.raises(SelfCheckError, match="trace of the covariance, as on record"):
        check(noise() // 2, tmp_path / "dark", protocol=recorded)


def test_reference_with_exclusions_is_not_recorded(tmp_path: Path) -> None:
    found = check(noise(), tmp_path, protocol=find_protocol("coco-30k-dedup"))
    assert "self-check by record: the reference depends on the exclusion list" in found.left_out


def test_first_half_has_half_of_every_kind() -> None:
    kinds = ["a"] * 4 + ["b"] * 3 + ["c"] * 3
    assert first_half(kinds, range(10)).tolist() == [1, 1, 0, 0, 1, 0, 0, 1, 1, 0]
    assert first_half(["a", "b", "c", "d"], range(4)).tolist() == [False, True, False, True]
    assert first_half(["a"] * 4, [3, 2, 1, 0]).tolist() == [False, False, True, True]
