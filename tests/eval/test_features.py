"""Feature stores: threads, and images of several sizes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dalle_zoo_eval import features
from dalle_zoo_eval.blur import gaussian_blur
from dalle_zoo_eval.extractors.base import ExtractorFileError
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.image_sources import ImageBatch
from dalle_zoo_eval.provenance import PACKAGES
from torch import Tensor

from dalle_zoo.sharing import Share


class Mixed:
    """Noise images of two alternating sizes."""

    identity: dict[str, Any] = {"kind": "mixed"}  # noqa: RUF012
    counts = [1]  # noqa: RUF012

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = [(3, 6, 6), (3, 4, 8)] * 5
        self.images = [torch.randint(256, size, generator=generator, dtype=torch.uint8) for size in sizes]
        self.threads: set[int] = set()

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: Sequence[int]) -> ImageBatch:
        self.threads.add(threading.get_ident())
        return ImageBatch(
            images={1: [self.images[i] for i in indices]}, chosen={1: [0] * len(indices)}, captions=[], others=[]
        )


class Means:
    """Returns channel means of images that `prepare` has doubled."""

    name = "means"
    record: dict[str, str | int] = {"sha256": "0"}  # noqa: RUF012

    def __init__(self) -> None:
        self.prepared_by: set[int] = set()
        self.looked_by: set[int] = set()

    def prepare(self, images: Tensor) -> Tensor:
        self.prepared_by.add(threading.get_ident())
        return images.repeat_interleave(2, -1)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.looked_by.add(threading.get_ident())
        assert images.shape[-1] in (12, 16)
        return {"features": images.float().mean((2, 3))}


def test_images_are_prepared_in_another_thread_in_order(tmp_path: Path) -> None:
    subject, network = Mixed(), Means()
    measured = FeatureStore(subject, {"means": network}, (0, 1), 4, tmp_path)
    measured.run(Share(), label="mixed")
    for radius, images in gaussian_blur(subject.images, (0, 1)).items():
        expected = torch.stack([image.float().mean((1, 2)) for image in images])
        torch.testing.assert_close(measured.all("means", f"{radius}/1/features"), expected)
    assert network.looked_by == {threading.get_ident()}
    assert subject.threads == network.prepared_by
    assert not subject.threads & network.looked_by
    assert measured.seconds() > 0


class Broken(Means):
    """A network whose features overflow for one image."""

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        found = super().__call__(images)
        found["features"][0, 1] = torch.inf
        return found


def test_non_finite_features_raise_and_are_not_stored(tmp_path: Path) -> None:
    measured = FeatureStore(Mixed(), {"means": Broken()}, (0,), 4, tmp_path)
    with pytest.raises(ExtractorFileError, match=r"the features of means hold NaN or infinity.*--leave-out means"):
        measured.run(Share(), label="mixed")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_other_packages_or_devices_have_other_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(device: str = "cpu") -> Path:
        return FeatureStore(Mixed(), {"means": Means()}, (0,), 4, tmp_path, device).folders["means"]

    here = folder()
    assert folder() == here != folder("cuda")
    assert folder("cuda:0") == folder("cuda:1")
    changed = set()
    for package in PACKAGES:
        versions = dict.fromkeys(PACKAGES, "1.0") | {package: "2.0"}
        monkeypatch.setattr(features, "package_versions", lambda names, all=versions: {n: all[n] for n in names})
        changed.add(folder())
    assert len(changed | {here}) == len(PACKAGES) + 1
