"""Tokens of layers: in the data, in the prior's training and in that of the dVAE."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from dalle_zoo.composition import CompositionConfig, Placed, Scene, SpriteSet, is_held_out, render
from dalle_zoo.composition.colors import HUES, dominant_hue, nearest_hue
from dalle_zoo.composition.sprites import Sprite
from dalle_zoo.data import Collate, ImageTextDataset, open_source
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import PriorConfig
from dalle_zoo.models.ranker import RankerConfig
from dalle_zoo.networks import load_image_tokenizer, save_network
from dalle_zoo.training import Cosine, LearningRate
from dalle_zoo.training.data_modules import ImageDataModule, TextConfig
from dalle_zoo.training.dvae_module import DVAEModule
from dalle_zoo.training.layer_tokens import LayerTokens, exchanged_tokens
from dalle_zoo.training.prior_module import PriorModule
from dalle_zoo.training.ranker_module import RankerModule
from dalle_zoo.training.warm_start import WarmStart

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer`"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),  # Lightning 2.6 calls a deprecated part of torch
]
CONFIG = DVAEConfig(
    image_size=64, width=8, num_groups=3, blocks_per_group=1, decoder_stem=8, codebook_size=16, residual_gain=1.0
)
GRID = CONFIG.grid_size


def dvae(seed: int = 0) -> DVAE:
    torch.manual_seed(seed)
    net = DVAE(CONFIG).eval()
    net.encoder.output.weight.data *= 10  # random weights give most cells one code otherwise
    return net


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A composition of few things, which are quickly encoded in all colors."""
    file = tmp_path_factory.mktemp("few") / "few.yaml"
    file.write_text("things: [balloon, apple, banana, frog, fish, tree, umbrella, robot]\n")
    return str(file)


@pytest.fixture(scope="module")
def sprites(few: str) -> SpriteSet:
    return CompositionConfig.load(few).open_sprites()


@pytest.fixture(scope="module")
def batch(few: str) -> dict[str, Any]:
    dataset = ImageTextDataset(open_source(f"{few}:train"), transform="prior", size=64, layers=GRID)
    batch = Collate()([dict(item) for item in itertools.islice(dataset, 24)], 0)
    assert any((own >= 0).any() for own in batch["recolored"])
    return batch


def most_frequent(net: DVAE, sprites: SpriteSet, own: str, other: str) -> dict[int, int]:
    """For the tokens of things of a color, those that most often take their places in another color."""
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for i in sorted(sprites.single_hued):
        sprite, color = sprites.sprites[i], nearest_hue(dominant_hue(sprites.pixels[i])[0])
        if sprite.split != "train" or color != own or is_held_out("hue", sprite.thing, other):
            continue
        scenes = [Scene(kind="x", items=(Placed(sprite=i, color=color),)) for color in (None, other)]
        images = torch.stack([torch.from_numpy(render(scene, sprites)) for scene in scenes]).permute(0, 3, 1, 2)
        for before, after in zip(*net.encode(images.float() / 255).flatten(1).tolist(), strict=True):
            counts[before][after] += 1
    return {before: max(found, key=lambda after: (found[after], after)) for before, found in counts.items()}


def one_by_one(net: DVAE, batch: dict[str, Any], sprites: SpriteSet) -> Tensor:
    """Tokens of a batch from the tokens of every layer, without remembering any."""
    found, names = [], list(HUES)
    for own, colors, cells in zip(batch["layers"], batch["recolored"], batch["cells"], strict=True):
        alone: list[int] = []
        for layer, (before, after) in zip(own, colors.tolist(), strict=True):
            tokens = net.encode(layer[None].float() / 255).flatten().tolist()
            exchanged = most_frequent(net, sprites, names[before], names[after]) if before >= 0 else {}
            alone.extend(exchanged.get(token, token) for token in tokens)
        found.append([[alone[cell] for cell in row] for row in cells.tolist()])
    return torch.tensor(found)


def prepared(net: DVAE, sprites: SpriteSet) -> LayerTokens:
    tokens = LayerTokens(net)
    tokens.prepare(sprites, torch.device("cpu"))
    return tokens


def test_a_batch_has_the_layers_of_each_image(batch: dict[str, Any], sprites: SpriteSet) -> None:
    assert len(batch["layers"]) == 24
    assert {own.dtype for own in batch["layers"]} == {torch.uint8}
    assert {own.shape[1:] for own in batch["layers"]} == {(3, 64, 64)}
    assert batch["cells"].shape == (24, GRID, GRID)
    assert len({len(own) for own in batch["layers"]}) > 1  # as many as the image has different things
    part = {key: value[5:9] for key, value in batch.items() if key != "epoch"}  # as for a grid of samples
    tokens = prepared(dvae(), sprites)
    assert torch.equal(tokens(part), tokens(batch)[5:9])


def test_tokens_are_those_of_layers(batch: dict[str, Any], sprites: SpriteSet) -> None:
    net = dvae()
    tokens, expected = prepared(net, sprites), one_by_one(net, batch, sprites)
    assert torch.equal(tokens(batch), expected)
    assert torch.equal(tokens(batch), expected)  # from memory
    assert not torch.equal(net.encode(batch["image"]), expected)


def test_recolored_things_have_exchanged_tokens(batch: dict[str, Any], sprites: SpriteSet) -> None:
    net = dvae()
    table, names = exchanged_tokens(net, sprites), list(HUES)
    assert table.shape == (len(HUES) + 1, len(HUES) + 1, CONFIG.codebook_size)
    for (i, own), (j, other) in itertools.product(enumerate(names), repeat=2):
        expected = most_frequent(net, sprites, own, other)
        assert table[i, j].tolist() == [expected.get(token, token) for token in range(CONFIG.codebook_size)]
    same = torch.arange(CONFIG.codebook_size)
    assert (table[-1] == same).all()
    assert (table[:, -1] == same).all()
    assert (table != same).any()
    with pytest.raises(ValueError, match=r"things in other colors: call LayerTokens.prepare first"):
        LayerTokens(net)(batch)


def test_held_out_colors_exchange_no_tokens(sprites: SpriteSet, monkeypatch: pytest.MonkeyPatch) -> None:
    net = dvae()
    expected = exchanged_tokens(net, sprites)
    changed = (expected != expected[-1]).any(dim=(0, 2)).nonzero().flatten().tolist()
    expected[:, changed[0]] = expected[:, -1]
    name = list(HUES)[changed[0]]
    held_out = "dalle_zoo.training.layer_tokens.is_held_out"
    monkeypatch.setattr(held_out, lambda kind, thing, color: (kind, color) == ("hue", name))
    assert torch.equal(exchanged_tokens(net, sprites), expected)


def test_without_things_of_one_color_no_tokens_are_exchanged() -> None:
    gray = np.full((1, 64, 64, 4), 255, np.uint8)
    sprites = SpriteSet([Sprite(key="gray", thing="gray", names=("gray",), style="")], gray)
    assert (exchanged_tokens(dvae(), sprites) == torch.arange(CONFIG.codebook_size)).all()


def test_each_layer_is_encoded_once(
    batch: dict[str, Any], sprites: SpriteSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = dvae()
    tokens, encode = prepared(net, sprites), net.encode
    encoded: list[Tensor] = []

    def counted(images: Tensor) -> Tensor:
        encoded.extend(images)
        return encode(images)

    monkeypatch.setattr(net, "encode", counted)
    tokens(batch)
    every = [layer.numpy().tobytes() for own in batch["layers"] for layer in own]
    different = len(set(every))
    assert len(encoded) == different < len(every)
    tokens(batch)
    assert len(encoded) == different


def test_memory_of_layers_is_limited(
    batch: dict[str, Any], sprites: SpriteSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dalle_zoo.training.layer_tokens._REMEMBERED", 10)
    tokens = prepared(dvae(), sprites)
    assert torch.equal(tokens(batch), tokens(batch))
    assert len(tokens._known) <= sum(len(own) for own in batch["layers"])


def test_another_grid_is_refused(batch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the batch has layers of 8 tokens in a row, the image tokenizer 16"):
        LayerTokens(dvae())({**batch, "cells": batch["cells"][:, :8, :8]})


def test_only_composed_images_have_layers(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="layers exist only for composed data such as composition:train"):
        ImageTextDataset(open_source(str(tmp_path)), transform="prior", size=64, layers=16)
    for changed in ({"size": 32}, {"transform": "dvae"}, {"layers": 10}):
        options: dict[str, Any] = {"transform": "prior", "size": 64, "layers": 16, **changed}
        with pytest.raises(ValueError, match=r"image_size 64, transform prior and a number of tokens that divides 64"):
            ImageTextDataset(open_source("composition:train"), **options)
    with pytest.raises(ValueError, match="layers must be"):
        ImageTextDataset(open_source("composition:train"), transform="prior", size=64, layers=0)


def test_the_prior_learns_tokens_of_layers(
    batch: dict[str, Any], few: str, sprites: SpriteSet, tmp_path: Path
) -> None:
    net = dvae()
    save_network(net, "dvae", tmp_path)
    config = PriorConfig(
        text_length=4, text_vocab=256, image_height=GRID, image_width=GRID, codebook_size=16, width=8, num_layers=1,
        num_heads=1, masks="row",
    )  # fmt: skip
    module = PriorModule(config, image_tokenizer=str(tmp_path))
    text = TextConfig(tokenizer="byte", bpe_dropout=0.0)
    fit(module, 1, ImageDataModule(f"{few}:train", f"{few}:held-out", image_size=64, text=text, layers=True))
    assert torch.equal(module.codes(batch), one_by_one(net, batch, sprites))
    images = {"image": batch["image"]}
    assert torch.equal(module.codes(images), net.encode(batch["image"]))
    with pytest.raises(ValueError, match=r"the batch has no layers, but data.init_args.layers is set"):
        module.codes({**images, "layers": batch["layers"]})


@pytest.mark.parametrize("side", [8, 16, 32])
def test_layers_have_the_grid_of_the_network(side: int) -> None:
    config = PriorConfig(text_length=4, text_vocab=8, image_height=side, image_width=side, codebook_size=16, width=8,
                         num_layers=1, num_heads=1, masks="row")  # fmt: skip
    data = ImageDataModule("composition:train", image_size=64, layers=True)
    PriorModule(config).complete_data(data)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["cells"].shape == (8, side, side)


def test_a_run_does_not_continue_with_codes_of_other_weights(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        save_network(dvae(seed), "dvae", tmp_path)
        module = layered(tmp_path)
        assert module.fingerprints() == {}
        module.complete_data(ImageDataModule("composition:train", image_size=64, layers=True))
        found.append(module.fingerprints()["model.layer_codes"])
    assert found[0] != found[1]


def test_the_ranker_has_no_use_for_layers() -> None:
    data = ImageDataModule("composition:train", image_size=64, text=TextConfig(), layers=True)
    RankerModule(RankerConfig(text_vocab=2048), tokenizer="composition").complete_data(data)
    with pytest.raises(ValueError, match=r"layers is for networks with image tokens, .* set it to false"):
        data.setup("fit")


def layered(folder: Path, **options: Any) -> DVAEModule:
    torch.manual_seed(0)
    rate = LearningRate(peak=3e-3, warmup_steps=0, decay="constant")
    return DVAEModule(CONFIG, learning_rate=rate, init_from=str(folder), **options)


def fit(module: DVAEModule | PriorModule, steps: int, data: ImageDataModule) -> Trainer:
    module.complete_data(data)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=2, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.fixture
def data(few: str) -> ImageDataModule:
    return ImageDataModule(f"{few}:train", f"{few}:held-out", image_size=64, batch_size=16, layers=True)


def test_the_dvae_learns_tokens_of_layers(
    batch: dict[str, Any], sprites: SpriteSet, data: ImageDataModule, tmp_path: Path
) -> None:
    first = dvae()
    save_network(first, "dvae", tmp_path)
    module = layered(tmp_path)
    logged: dict[str, Any] = {}
    log: Any = module.log

    def recorded(name: str, value: Any, **options: Any) -> None:
        logged[name] = torch.as_tensor(value).detach()
        log(name, value, **options)

    module.log = recorded  # type: ignore[method-assign, assignment]
    expected = one_by_one(first, batch, sprites)

    def measured(net: DVAE) -> tuple[float, float]:
        with torch.no_grad():
            right = (net.encode(batch["image"]) == expected).float().mean()
            return float(right), float((net.decode(expected) - batch["image"]).abs().mean())

    before = measured(module.net)
    trainer = fit(module, 40, data)
    after = measured(module.net)
    assert 1 - after[0] < 0.8 * (1 - before[0])  # the encoder finds them
    assert after[1] < before[1]  # the decoder joins them
    trainer.validate(module, datamodule=data, verbose=False)
    assert 0 < float(trainer.callback_metrics["val/codes_of_layers"]) <= 1
    parts = (float(logged[f"train/{name}"]) for name in ("codes", "nll"))
    assert float(logged["train/loss"]) == pytest.approx(sum(parts), rel=1e-4)
    module.export(tmp_path / "exported")  # the network in training, not the first
    exported = load_image_tokenizer(tmp_path / "exported")
    assert isinstance(exported, DVAE)
    assert not torch.equal(exported.encoder.output.weight, first.encoder.output.weight)
    assert not any("_layer_tokens" in name for name in module.state_dict())


def test_a_frozen_encoder_learns_to_decode_tokens_of_layers(
    batch: dict[str, Any], sprites: SpriteSet, data: ImageDataModule, tmp_path: Path
) -> None:
    first = dvae()
    save_network(first, "dvae", tmp_path)
    module, codes = layered(tmp_path, freeze_encoder=True), one_by_one(first, batch, sprites)
    fit(module, 20, data)
    assert torch.equal(module.net.encode(batch["image"]), first.encode(batch["image"]))
    with torch.no_grad():
        errors = [float((net.decode(codes) - batch["image"]).abs().mean()) for net in (first, module.net)]
    assert errors[1] < errors[0]


def test_layers_need_codes_to_keep() -> None:
    data = ImageDataModule("composition:train", image_size=64, layers=True)
    with pytest.raises(ValueError, match=r"layers keeps the codes of a trained dVAE: name it in model.init_args"):
        DVAEModule(CONFIG).complete_data(data)
    warm = DVAEModule(CONFIG, warm_start=WarmStart(steps=40), layer_codes="composition")
    with pytest.raises(ValueError, match="set warm_start to null"):
        warm.complete_data(data)


def test_training_continues_with_the_codes_of_the_first_model(
    batch: dict[str, Any], sprites: SpriteSet, tmp_path: Path
) -> None:
    first, other = dvae(), dvae(seed=1)
    for name, net in {"first": first, "other": other}.items():
        (tmp_path / name).mkdir()
        save_network(net, "dvae", tmp_path / name)
    module = layered(tmp_path / "other", layer_codes=str(tmp_path / "first"))
    module.complete_data(ImageDataModule("composition:train", image_size=64, layers=True))
    assert module._layer_tokens is not None
    module._layer_tokens.prepare(sprites, torch.device("cpu"))
    assert torch.equal(module._layer_tokens(batch), one_by_one(first, batch, sprites))
    assert torch.equal(module.net.encode(batch["image"]), other.encode(batch["image"]))
    with pytest.raises(ValueError, match=r"layer_codes has no effect without data.init_args.layers"):
        module.complete_data(ImageDataModule("composition:train", image_size=64))


def test_codes_of_another_size_are_refused(tmp_path: Path) -> None:
    save_network(dvae(), "dvae", tmp_path)
    module = DVAEModule(replace(CONFIG, codebook_size=8), layer_codes=str(tmp_path))
    with pytest.raises(ValueError, match=r"layer_codes has 16 codes of 4 pixels, model.config 8 of 4"):
        module.complete_data(ImageDataModule("composition:train", image_size=64, layers=True))


def test_the_relaxation_is_no_schedule_of_layers(tmp_path: Path) -> None:
    save_network(dvae(), "dvae", tmp_path)
    module = DVAEModule(CONFIG, kl_weight=Cosine(start=0.0, end=1.0, steps=9), init_from=str(tmp_path))
    assert "kl_weight.steps" in module.schedule_ends()
    module.complete_data(ImageDataModule("composition:train", image_size=64, layers=True))
    assert "kl_weight.steps" not in module.schedule_ends()
