"""The warm start of the codes: k-means, its way into the network, and a run with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.data
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F

from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.training import LearningRate
from dalle_zoo.training.dvae_module import DVAEModule
from dalle_zoo.training.warm_start import Codebook, WarmStart, kmeans, set_codes

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    # lightning 2.6 calls a deprecated part of torch's pytree
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
]
CONFIG = DVAEConfig(image_size=16, width=8, num_groups=3, blocks_per_group=1, decoder_stem=8, codebook_size=16)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kmeans_finds_clusters() -> None:
    spots = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    vectors = (spots[:, None] + 0.1 * torch.randn(2, 50, 2, generator=seeded())).flatten(0, 1)
    centers, distance = kmeans(vectors, 2, 20, seeded(3))
    order = torch.cdist(spots, centers).argmin(1)
    assert sorted(order.tolist()) == [0, 1]
    torch.testing.assert_close(centers[order], vectors.view(2, 50, 2).mean(1))
    assert float(distance) == pytest.approx(0.02, rel=0.3)


def test_empty_cluster_moves_to_a_vector() -> None:
    vectors = torch.cat([torch.zeros(50, 2), torch.ones(1, 2)])
    found = {tuple(kmeans(vectors, 2, 50, seeded(s))[0].sum(1).sort().values.tolist()) for s in range(3)}
    assert found == {(0.0, 2.0)}  # though both centers start at zero nearly always


def test_kmeans_with_too_few_vectors_raises() -> None:
    with pytest.raises(ValueError, match="at least 5 vectors for as many codes, got 4"):
        kmeans(torch.zeros(4, 2), 5, 1, seeded())


def test_codes_are_the_nearest_centers() -> None:
    torch.manual_seed(0)
    dvae, bridge = DVAE(CONFIG), nn.Conv2d(CONFIG.widths[-1], CONFIG.decoder_stem, 1)
    centers = torch.randn(16, 8)
    set_codes(dvae, bridge, centers, 3.0)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        cells = bridge(dvae.encoder.features(dvae.map_pixels(images))).permute(0, 2, 3, 1)
        distances = torch.cdist(cells, centers).square()
        assert torch.equal(dvae.encode(images), distances.argmin(-1))
        logits = dvae.logits(images).permute(0, 2, 3, 1)
        torch.testing.assert_close(F.softmax(logits, -1), F.softmax(-3 * distances, -1), atol=1e-5, rtol=1e-3)
        codes = torch.arange(16).view(1, 4, 4)
        stem = centers[codes].permute(0, 3, 1, 2)
        torch.testing.assert_close(dvae.decoder.from_codes(codes), dvae.decoder.from_stem(stem))


def module(**options: Any) -> DVAEModule:
    torch.manual_seed(0)
    return DVAEModule(CONFIG, learning_rate=LearningRate(peak=5e-3, warmup_steps=0, decay="constant"), **options)


def fit(stage: DVAEModule, steps: int) -> Trainer:
    shades = torch.rand(200, 4, 3, 2, 2, generator=seeded())
    batches = [{"image": F.interpolate(part, (16, 16))} for part in shades]
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(stage, loader)
    return trainer


def codes_used(stage: DVAEModule) -> int:
    images = F.interpolate(torch.rand(64, 3, 2, 2, generator=seeded(1)), (16, 16))
    return len(stage.net.encode(images).unique())


@pytest.mark.slow  # a complete run
def test_warm_start_increases_codebook_use() -> None:
    stage = module(warm_start=WarmStart(steps=60, gather=8))
    fit(stage, 60)
    assert len(stage.features) == 8
    assert stage.features[0].shape == (4 * 16, 8)  # four images of 4 x 4 cells
    fresh = module(warm_start=WarmStart(steps=60, gather=8))
    assert torch.allclose(stage.net.decoder.input.weight, fresh.net.decoder.input.weight, rtol=1e-3)  # only decayed
    stage = module(warm_start=WarmStart(steps=60, gather=8))
    fit(stage, 61)
    assert not stage.features
    plain = module()
    fit(plain, 61)
    assert codes_used(stage) > 2 * codes_used(plain)


def test_quantized_steps_train_encoder_codes_and_decoder() -> None:
    """Images get better than right after k-means, and the network's own layers are the codebook."""
    images = F.interpolate(torch.rand(64, 3, 2, 2, generator=seeded(1)), (16, 16))

    def error(stage: DVAEModule) -> float:
        with torch.no_grad():
            return float((stage.net.decode(stage.net.encode(images)) - images).square().mean())

    start = module(warm_start=WarmStart(steps=60, gather=8, quantized_steps=200, revive_every=20))
    fit(start, 61)
    stage = module(warm_start=WarmStart(steps=60, gather=8, quantized_steps=139, revive_every=20))
    fit(stage, 199)
    assert error(stage) < 0.8 * error(start)
    with torch.no_grad():
        features = stage.bridge(stage.net.encoder.features(stage.net.map_pixels(images))).permute(0, 2, 3, 1)
        distances = torch.cdist(features.flatten(0, 2), stage.codebook.vectors)
    nearest = distances.argmin(1).view(64, 4, 4)
    assert (stage.net.encode(images) == nearest).float().mean() > 0.99  # except for ties within rounding
    codes = torch.arange(16).view(1, 4, 4)
    torch.testing.assert_close(
        stage.net.decoder.from_codes(codes),
        stage.net.decoder.from_stem(stage.codebook.vectors[codes].permute(0, 3, 1, 2)),
    )


def test_gradient_passes_straight_through_codes() -> None:
    codebook = Codebook(4, 3, WarmStart(steps=1, gather=1))
    codebook.start(torch.randn(4, 3, generator=seeded()), torch.ones(()))
    features = torch.randn(2, 3, 2, 2, generator=seeded(1)).requires_grad_()
    quantized, loss, facts = codebook(features)
    weights = torch.randn(2, 3, 2, 2, generator=seeded(2))
    (gradient,) = torch.autograd.grad((quantized * weights).sum(), features, retain_graph=True)
    assert gradient.equal(weights)
    assert (
        torch.cdist(quantized.detach().permute(0, 2, 3, 1).reshape(-1, 3), codebook.vectors).min(1).values.max() < 1e-5
    )
    assert facts[:, -2].sum() == 8  # cells
    torch.testing.assert_close(facts[:, :-2].sum(0), features.detach().sum((0, 2, 3)))
    (pulled,) = torch.autograd.grad(loss, features)
    moved = features.detach() - 0.1 * pulled
    assert codebook(moved)[2][:, -1].sum() < facts[:, -1].sum()  # nearer to the codes


def test_codes_are_running_means_of_features() -> None:
    codebook = Codebook(2, 2, WarmStart(steps=1, gather=1, codebook_decay=0.5))
    codebook.start(torch.tensor([[0.0, 0.0], [5.0, 5.0]]), torch.ones(()))
    codebook.observe(torch.tensor([[8.0, 4.0, 2.0, 6.0], [0.0, 0.0, 0.0, 0.0]]))
    # half of one feature at 0 and half of two whose sum is (8, 4): (4, 2) over 1.5
    torch.testing.assert_close(codebook.vectors, torch.tensor([[4.0 / 1.5, 2.0 / 1.5], [5.0, 5.0]]))
    assert float(codebook.distance) == pytest.approx(0.5 * 1 + 0.5 * 3)


def test_unused_codes_move_to_features() -> None:
    codebook = Codebook(3, 2, WarmStart(steps=1, gather=1))
    codebook.start(torch.tensor([[0.0, 0.0], [5.0, 5.0], [9.0, 9.0]]), torch.ones(()))
    codebook.observe(torch.tensor([[0.0, 0.0, 4.0, 1.0], [0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 1.0, 0.0]]))
    codebook.revive(torch.tensor([[1.0, 2.0]]), seeded())
    torch.testing.assert_close(codebook.vectors, torch.tensor([[0.0, 0.0], [1.0, 2.0], [9.0, 9.0]]))
    assert codebook.use.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 40, "quantized_steps": -1}, "quantized_steps and commitment must be at least 0"),
        ({"steps": 40, "revive_every": 0}, "revive_every at least 1"),
        ({"steps": 10, "gather": 11}, "gather must be between 1 and steps 10, got 11"),
        ({"steps": 40, "sharpness": 0.0}, "sharpness must be above 0"),
        ({"steps": 40, "iterations": 0}, "iterations at least 1"),
    ],
)
def test_impossible_settings_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmStart(**options)


def test_warm_start_and_trained_codes_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="would overwrite the codes of init_from"):
        module(warm_start=WarmStart(steps=40), init_from="composition")
