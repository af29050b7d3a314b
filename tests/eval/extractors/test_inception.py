"""The two Inception networks: equal to torch-fidelity and torchmetrics, input of the DM-GAN code, checked files.

The weights are random: each file has the shape of the published one and its own digest.
"""

from __future__ import annotations

import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dalle_zoo_eval.extractors import ExtractorFileError, load_extractor
from dalle_zoo_eval.extractors.inception import (
    WEIGHTS_2015,
    WEIGHTS_DMGAN,
    InceptionExtractor,
    dmgan_input,
    dmgan_resize,
)
from dalle_zoo_eval.metrics.frechet import frechet_distance
from dalle_zoo_eval.metrics.inception_score import inception_score
from dalle_zoo_eval.metrics.kid import kernel_distance
from dalle_zoo_eval.metrics.precision_recall import precision, recall
from dalle_zoo_eval.moments import Moments
from PIL import Image
from torch import Tensor, nn

from dalle_zoo.files import sha256_file

N = 4
# Tolerances that the protocols state.
RELATIVE = 1e-4
# For float32 features of convolutions with other batch sizes.
BATCHES = 1e-4


def package(name: str) -> Any:
    """Imports a module; skips the test if it is missing or does not fit the installed torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported ({error}): pip install dalle-zoo[test]")


def random_weights(path: Path, **options: Any) -> Path:
    """Initializes weights that preserve the scale of activations, unlike torch's initialization."""
    inception = package("torchvision.models.inception")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = inception.Inception3(init_weights=False, transform_input=False, **options)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights_2015(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package("torch_fidelity")
    path = tmp_path_factory.mktemp("inception-2015") / WEIGHTS_2015.name
    return random_weights(path, num_classes=1008, aux_logits=False)


@pytest.fixture(scope="module")
def network_2015(weights_2015: Path) -> InceptionExtractor:
    state = torch.get_rng_state()
    found = load_extractor("inception-2015", weights_2015.parent, expected_sha256=sha256_file(weights_2015))
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(found, InceptionExtractor)
    return found


@pytest.fixture(scope="module")
def weights_dmgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("dmgan") / WEIGHTS_DMGAN[1].name)


@pytest.fixture(scope="module")
def dmgan(weights_dmgan: Path) -> InceptionExtractor:
    found = load_extractor("dmgan", weights_dmgan.parent, expected_sha256=sha256_file(weights_dmgan))
    assert isinstance(found, InceptionExtractor)
    return found


def images(seed: int, contrast: float) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(N, 3, 6, 5, generator=random) * contrast
    return (nn.functional.interpolate(coarse, (48, 40), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def sides() -> tuple[Tensor, Tensor]:
    return images(0, 1.0), images(1, 0.7)


@pytest.fixture(scope="module")
def seen(network_2015: InceptionExtractor, sides: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], ...]:
    return tuple(network_2015(images) for images in sides)


class Images(torch.utils.data.Dataset[Tensor]):
    """A dataset for torch-fidelity."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def fidelity(sides: tuple[Tensor, Tensor], weights: Path, **metrics: Any) -> dict[str, float]:
    options = {"batch_size": N, "cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True}
    options |= {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(weights)}
    calculate = package("torch_fidelity").calculate_metrics
    found: dict[str, float] = calculate(input1=Images(sides[0]), input2=Images(sides[1]), **options, **metrics)
    return found


def distance(seen: tuple[dict[str, Tensor], ...]) -> float:
    a, b = (Moments.zero(2048).add(side["features"]) for side in seen)
    return frechet_distance(a, b)


def test_features_and_logits_have_expected_shapes(seen: tuple[dict[str, Tensor], ...]) -> None:
    for side in seen:
        assert {kind: tuple(values.shape) for kind, values in side.items()} == {
            "features": (N, 2048),
            "logits": (N, 1008),
        }
        assert all(values.dtype == torch.float32 for values in side.values())
        assert side["features"].std(0).mean() > 1e-3  # else the comparisons below would compare nothing


def test_scores_equal_torch_fidelity(
    weights_2015: Path, sides: tuple[Tensor, Tensor], seen: tuple[dict[str, Tensor], ...]
) -> None:
    reference = fidelity(
        sides, weights_2015, isc=True, isc_splits=2, kid=True, kid_subsets=5, kid_subset_size=3, prc=True
    )
    ours = [*inception_score(seen[0]["logits"], splits=2)]
    ours += kernel_distance(seen[0]["features"], seen[1]["features"], subsets=5, subset_size=3)
    ours += [f(seen[0]["features"], seen[1]["features"])["value"] for f in (precision, recall)]
    names = [
        f"{score}_{part}" for score in ("inception_score", "kernel_inception_distance") for part in ("mean", "std")
    ]
    assert ours == pytest.approx([reference[name] for name in [*names, "precision", "recall"]], rel=RELATIVE)


def test_distance_equals_torch_fidelity(seen: tuple[dict[str, Tensor], ...]) -> None:
    """Uses the first 64 features, since all 2048 take half a minute; see the slow test below."""
    fid = package("torch_fidelity.metric_fid")
    few = tuple({"features": side["features"][:, :64].contiguous()} for side in seen)
    reference = fid.fid_statistics_to_metric(
        *(fid.fid_features_to_statistics(side["features"]) for side in few), False
    )
    a, b = (Moments.zero(64).add(side["features"]) for side in few)
    assert frechet_distance(a, b) == pytest.approx(reference["frechet_inception_distance"], rel=RELATIVE)


@pytest.mark.slow
def test_fid_equals_torch_fidelity_and_torchmetrics(
    weights_2015: Path, sides: tuple[Tensor, Tensor], seen: tuple[dict[str, Tensor], ...]
) -> None:
    reference = fidelity(sides, weights_2015, fid=True)["frechet_inception_distance"]
    assert distance(seen) == pytest.approx(reference, rel=RELATIVE)
    fid = package("torchmetrics.image.fid").FrechetInceptionDistance(
        feature_extractor_weights_path=str(weights_2015), antialias=False
    )
    for real, images in zip((True, False), sides, strict=True):
        fid.update(images, real=real)
    assert distance(seen) == pytest.approx(float(fid.compute()), rel=RELATIVE)


def test_batch_size_changes_features_only_by_rounding(
    network_2015: InceptionExtractor, sides: tuple[Tensor, Tensor], seen: tuple[dict[str, Tensor], ...]
) -> None:
    again = network_2015(sides[0][:2])
    assert torch.allclose(again["features"], seen[0]["features"][:2], rtol=BATCHES, atol=BATCHES)
    assert torch.allclose(again["logits"], seen[0]["logits"][:2], rtol=BATCHES, atol=BATCHES)


def test_dmgan_equals_torchvision_with_dmgan_input(
    weights_dmgan: Path, dmgan: InceptionExtractor, sides: tuple[Tensor, Tensor]
) -> None:
    """The reference is written step by step: Pillow, [0, 1], second scaling, every layer up to the pool."""
    images = sides[0][:2]
    resized = [
        np.asarray(Image.fromarray(i.permute(1, 2, 0).numpy()).resize((299, 299), Image.Resampling.BILINEAR))
        for i in images
    ]
    x = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        x[:, channel] = x[:, channel] * (std / 0.5) + (mean - 0.5) / 0.5
    net = package("torchvision.models.inception").Inception3(init_weights=False)
    net.load_state_dict(torch.load(weights_dmgan, weights_only=True))
    body = [layer for name, layer in net.eval().named_children() if name not in ("AuxLogits", "dropout", "fc")]
    assert len(body) == 19
    with torch.inference_mode():
        for layer in body:
            x = layer(x)
    found = dmgan(images)
    assert list(found) == ["features"]
    assert found["features"].shape == (2, 2048)
    assert torch.allclose(found["features"], x.flatten(1), rtol=1e-3, atol=1e-4)


def test_dmgan_input_has_published_range() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    low, high = dmgan_input(ends).flatten(1)
    assert low.tolist() == pytest.approx([-0.030, -0.088, -0.188], abs=1e-6)
    assert high.tolist() == pytest.approx([0.428, 0.360, 0.262], abs=1e-6)


def test_dmgan_does_not_resize_images_of_its_size() -> None:
    images = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert dmgan_resize(images) is images
    assert dmgan_resize(images[..., :200, :100]).shape == (1, 3, 299, 299)


def test_prepared_images_give_equal_features(network_2015: InceptionExtractor, dmgan: InceptionExtractor) -> None:
    images = torch.randint(0, 256, (2, 3, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert dmgan.prepare(images).shape == (2, 3, 299, 299)
    for network in (network_2015, dmgan):
        assert torch.equal(network(network.prepare(images))["features"], network(images)["features"])


def test_records_distinguish_the_networks(
    network_2015: InceptionExtractor, dmgan: InceptionExtractor, weights_2015: Path, weights_dmgan: Path
) -> None:
    assert network_2015.record == {
        "name": "inception-2015",
        "sha256": sha256_file(weights_2015),
        "pixels": 299,
        "resize": "bilinear as TensorFlow 1",
    }
    assert dmgan.record["name"] == "dmgan"
    assert dmgan.record["sha256"] == sha256_file(weights_dmgan)
    assert dmgan.record["resize"] != network_2015.record["resize"]


def test_published_digests_match_file_names() -> None:
    for file in (WEIGHTS_2015, *WEIGHTS_DMGAN):
        assert len(file.sha256) == 64
        assert file.sha256.startswith(file.name.removesuffix(".pth").rpartition("-")[2])


NAMES = {"inception-2015": ("torch_fidelity", WEIGHTS_2015), "dmgan": ("torchvision", WEIGHTS_DMGAN[0])}


@pytest.mark.parametrize("name", NAMES)
def test_missing_file_raises_with_download_hint(name: str, tmp_path: Path) -> None:
    needed, file = NAMES[name]
    package(needed)
    for location in (tmp_path, tmp_path / file.name):
        with pytest.raises(ExtractorFileError) as caught:
            load_extractor(name, location)
        for part in (str(tmp_path / file.name), file.sha256, file.url, "to that path"):
            assert part in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_unexpected_file_is_not_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed, file = NAMES[name]
    package(needed)
    path = tmp_path / file.name
    path.write_bytes(b"something else")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened before it was checked"))
    for expected in (None, "0" * 64):
        with pytest.raises(ExtractorFileError, match=r"expected .*: download the right file again"):
            load_extractor(name, path, expected_sha256=expected)


class Bomb:
    """Creates a file if it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", NAMES)
def test_file_with_code_is_not_executed(name: str, tmp_path: Path) -> None:
    needed, file = NAMES[name]
    package(needed)
    path, trace = tmp_path / file.name, tmp_path / "trace"
    buffer = io.BytesIO()
    torch.save({"a": Bomb(trace)}, buffer)
    contents = {"bomb": buffer.getvalue(), "pickle": pickle.dumps([1, 2], protocol=2), "truncated": b"PK\x03\x04"}
    for content in contents.values():
        path.write_bytes(content)
        with pytest.raises(ExtractorFileError, match=r"is not a readable file of weights|must hold a dict"):
            load_extractor(name, path, expected_sha256=sha256_file(path))
    assert not trace.exists()


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_another_network_raise(name: str, tmp_path: Path) -> None:
    needed, file = NAMES[name]
    package(needed)
    path = tmp_path / file.name
    torch.save({"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(ExtractorFileError, match="does not hold the weights"):
        load_extractor(name, path, expected_sha256=sha256_file(path))


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_wrong_images_raise(dmgan: InceptionExtractor, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\)"):
        dmgan(images)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_missing_package_raises_with_install_hint(
    name: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision raises RuntimeError with a torch for which it was not built."""
    import builtins

    real = builtins.__import__

    def broken(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.startswith(("torch_fidelity", "torchvision")):
            raise error("no such operator")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ImportError, match=r"no such operator.*pip install dalle-zoo\[eval\]"):
        load_extractor(name, tmp_path)
