"""Stage 2: steps, precision, clipping, the plateau rule, and codes from images or from shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.data
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dalle_zoo.model_folder import ModelFolderError
from dalle_zoo.models.prior import PriorConfig
from dalle_zoo.training import AdamWConfig, LearningRate
from dalle_zoo.training.data_modules import CodeDataModule, ImageDataModule, TextConfig
from dalle_zoo.training.prior_module import PriorModule
from dalle_zoo.training.schedules import LearningRateScheduler
from dalle_zoo.training.strategies import FSDP1
from dalle_zoo.training.trainer import ZooTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    # lightning 2.6 calls a deprecated part of torch's pytree
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
]
CONFIG = PriorConfig(
    text_length=6, text_vocab=280, image_height=4, image_width=4, codebook_size=8, width=16, num_layers=2,
    num_heads=2, masks="row, column",
)  # fmt: skip
ROUNDING = {"rtol": 1e-4, "atol": 1e-6}
"""Sums over a batch in another order, in float32."""


def batch(size: int, seed: int = 0) -> dict[str, Any]:
    """Captions without padding: then the mean over the tokens of a batch is the mean of the means of its halves."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "text": torch.randint(280, (size, 6), generator=generator),
        "codes": torch.randint(8, (size, 4, 4), generator=generator),
    }


def halves(complete: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    middle = len(complete["text"]) // 2
    return [{k: v[part] for k, v in complete.items()} for part in (slice(middle), slice(middle, None))]


def module(**options: Any) -> PriorModule:
    torch.manual_seed(0)
    options = {"learning_rate": LearningRate(peak=1e-2, warmup_steps=0, decay="constant")} | options
    return PriorModule(CONFIG, **options)


def fit(stage: PriorModule, batches: Iterable[dict[str, Any]], steps: int, **options: Any) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(stage, torch.utils.data.DataLoader(list(batches), batch_size=None))  # type: ignore[arg-type]
    return trainer


class Gradients(Callback):
    """Keeps the gradients of every step, as they come and as the optimizer took them."""

    def __init__(self) -> None:
        self.raw: list[list[Tensor]] = []
        self.taken: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.raw.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        parts = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        if parts:
            self.taken.append(torch.stack(parts).norm())


def test_two_batches_of_four_equal_one_of_eight() -> None:
    complete = [batch(8, seed) for seed in range(3)]
    # With a large eps the step is smooth in the gradient: else AdamW would magnify the rounding of the small ones.
    adamw = AdamWConfig(eps=1e-2)
    left, right, one, two = module(adamw=adamw), module(adamw=adamw), Gradients(), Gradients()
    start = [p.clone() for p in left.parameters()]
    fit(left, complete, 3, callbacks=[one])
    fit(right, [half for full in complete for half in halves(full)], 3, callbacks=[two], accumulate_grad_batches=2)
    assert len(one.raw) == len(two.raw) == 3
    for a, b in zip(one.raw, two.raw, strict=True):
        torch.testing.assert_close(a, b, **ROUNDING)
    torch.testing.assert_close(list(left.parameters()), list(right.parameters()), **ROUNDING)
    assert not any(torch.equal(a, b) for a, b in zip(start, left.net.text_head.parameters(), strict=False))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_batch_is_overfitted(precision: Any) -> None:
    stage, data = module(), batch(4)
    before = stage.net.loss(data["text"], data["codes"]).total.item()
    fit(stage, [data] * 60, 60, precision=precision)
    assert {p.dtype for p in stage.parameters()} == {torch.float32}
    assert stage.net.loss(data["text"], data["codes"]).total.item() < 0.2 * before


def test_gradients_are_clipped() -> None:
    free, clipped = Gradients(), Gradients()
    fit(module(), [batch(4)] * 3, 3, callbacks=[free])
    fit(module(), [batch(4)] * 3, 3, callbacks=[clipped], gradient_clip_val=0.01)
    assert all(norm > 0.1 for norm in free.taken)
    assert all(norm <= 0.01 * (1 + 1e-4) for norm in clipped.taken)
    assert len(clipped.taken) >= 2


def test_plateau_windows_count_steps_instead_of_batches() -> None:
    rate = LearningRate(
        peak=1e-9, warmup_steps=1, plateau_window=2, plateau_patience=1, plateau_threshold=0.5, max_halvings=2
    )
    stage = module(learning_rate=rate)
    trainer = fit(stage, [batch(2)] * 40, 9, accumulate_grad_batches=3)
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(scheduler, LearningRateScheduler)
    # Eight steps behind the warm-up are four windows: the first is the best, two halve, the last may not.
    assert (scheduler.last_epoch, scheduler.halvings, scheduler.loss_count) == (9, 2, 0)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-9 / 4)
    mean = float(stage.net.loss(**batch(2)).total.detach())
    assert scheduler.best == pytest.approx(mean, rel=1e-3)


def test_learning_rate_is_logged() -> None:
    rate = LearningRate(peak=0.1, warmup_steps=4)
    trainer = fit(module(learning_rate=rate), [batch(2)] * 3, 3)
    assert float(trainer.callback_metrics["schedule/learning_rate"]) == pytest.approx(0.075)
    assert {"train/loss", "train/text_loss", "train/image_loss", "train/image_bits"} <= trainer.callback_metrics.keys()


def test_dropped_captions_depend_only_on_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def captions(seed: int) -> list[Tensor]:
        stage, seen = module(caption_dropout=0.5, seed=seed), []
        loss = stage.net.loss
        monkeypatch.setattr(stage.net, "loss", lambda text, *rest: (seen.append(text), loss(text, *rest))[1])
        fit(stage, [batch(16)] * 4, 4)
        return seen

    first, again, other = captions(0), captions(0), captions(1)
    empty = module().net.null_text()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    dropped = torch.cat([(text == empty).all(1) for text in first])
    assert 16 < dropped.sum() < 48  # of 64
    retained = torch.cat([(text == batch(16)["text"]).all(1) for text in first])
    assert torch.equal(retained, ~dropped)
    assert not torch.equal(first[0], first[1])


def data(kind: type[ImageDataModule] | type[CodeDataModule], location: Path, parts: Path) -> Any:
    text = TextConfig(tokenizer=str(parts), length=12, bpe_dropout=0.3)
    options = {"image_size": 16, "transform": "prior", "variants": 2} if kind is ImageDataModule else {}
    module = kind(train=str(location), val=str(location), text=text, batch_size=5, **options)
    module.setup()
    return module


def test_images_and_code_shards_give_equal_losses(shards: Path, codes: Path, parts: Path) -> None:
    config = PriorConfig(
        text_length=12, text_vocab=280, image_height=4, image_width=4, codebook_size=8, width=8, num_layers=1,
        num_heads=1, masks="row",
    )  # fmt: skip
    stage = PriorModule(config, image_tokenizer=str(parts))
    seen = []
    for kind, location in ((ImageDataModule, shards), (CodeDataModule, codes)):
        found = {}
        loader = data(kind, location, parts).train_dataloader()
        for epoch in range(3):
            for part in loader:
                for key, text, grid in zip(part["key"], part["text"], stage.codes(part), strict=True):
                    found[key, epoch] = (text.tolist(), grid.tolist())
        assert len(found) == 3 * 20  # four batches of five
        seen.append(found)
    both = seen[0].keys() & seen[1].keys()
    assert len(both) > 40  # the last two of an epoch are left out, and each kind has its own order
    assert all(seen[0][name] == seen[1][name] for name in both)
    assert len({str(grid) for _, grid in seen[0].values()}) > 20, "the codes should differ, or this shows nothing"


def test_sample_grids_are_generated_from_prompts(parts: Path, codes: Path) -> None:
    config = PriorConfig(
        text_length=12, text_vocab=280, image_height=4, image_width=4, codebook_size=8, width=8, num_layers=1,
        num_heads=1, masks="row",
    )  # fmt: skip
    few = next(iter(data(CodeDataModule, codes, parts).val_dataloader()))
    stage = PriorModule(config, image_tokenizer=str(parts), num_samples=3)
    made = stage.sample_images(few)["samples"]
    assert made.captions == few["caption"][:3]
    assert [row.shape for row in made.rows] == [(3, 3, 16, 16)] * 2
    assert torch.equal(made.generated, stage.sample_images(few)["samples"].generated)
    prompts = stage.sample_images({"text": few["text"], "caption": few["caption"]})["samples"]
    assert torch.equal(prompts.generated[:3], made.generated), "of all captions, without images of their own"
    assert len(prompts.rows) == 1
    assert len(prompts.generated) == len(few["text"]) > 3
    assert PriorModule(config).sample_images(few) == {}
    with pytest.raises(ValueError, match=r"set model\.image_tokenizer"):
        PriorModule(config).codes({"image": torch.zeros(1, 3, 16, 16)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_length": 11},
            r"text\.length is 12, the prior's config\.text_length 11: set model\.config\.text_length to 12",
        ),
        ({"text_vocab": 281}, r"vocabulary of the tokenizer .* is 280, the prior's config\.text_vocab 281"),
        ({"codebook_size": 9}, r"codebook of .* is 8, the prior's config\.codebook_size 9"),
        ({"image_height": 5}, r"height of the codes of .* is 4, the prior's config\.image_height 5"),
    ],
)
def test_wrong_data_raise(changes: dict[str, int], message: str, codes: Path, parts: Path) -> None:
    fits = {"text_length": 12, "text_vocab": 280, "image_height": 4, "image_width": 4, "codebook_size": 8}
    shape = {"width": 8, "num_layers": 1, "num_heads": 1, "masks": "row"}
    own = data(CodeDataModule, codes, parts)
    PriorModule(PriorConfig(**fits, **shape)).check_data(own)
    with pytest.raises(ValueError, match=message):
        PriorModule(PriorConfig(**fits | changes, **shape)).check_data(own)


def test_codes_of_validation_or_other_weights_raise(codes: Path, parts: Path, tmp_path: Path) -> None:
    fits = {"text_length": 12, "text_vocab": 280, "image_height": 4, "image_width": 4, "codebook_size": 8}
    config = PriorConfig(**fits, width=8, num_layers=1, num_heads=1, masks="row")
    own = data(CodeDataModule, codes, parts)
    stage = PriorModule(config, image_tokenizer=str(parts))
    stage.check_data(own)

    def changed(name: str, **values: Any) -> str:
        folder = Path(shutil.copytree(codes, tmp_path / name))
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | values))
        return str(folder)

    assert own.text is not None
    other = CodeDataModule(str(codes), own.text, val=changed("grid", grid=[5, 4]))
    other.setup("validate")
    with pytest.raises(ValueError, match=r"height of the codes of .*grid' is 5"):
        stage.check_data(other)
    val = changed("weights", tokenizer={"codebook_size": 8, "weights_sha256": "0" * 64})
    other = CodeDataModule(str(codes), own.text, val=val)
    other.setup("fit")
    with pytest.raises(ValueError, match=r"weights' were written by other weights .* got 0{64}; encode again"):
        stage.check_data(other)
    PriorModule(config).check_data(other)  # nothing to compare with
    del other.opened["val"]
    stage.check_data(other)


def test_images_without_image_tokenizer_raise(shards: Path, parts: Path) -> None:
    config = PriorConfig(
        text_length=12, text_vocab=280, image_height=4, image_width=4, codebook_size=8, width=8, num_layers=1,
        num_heads=1, masks="row",
    )  # fmt: skip
    own = data(ImageDataModule, shards, parts)
    PriorModule(config, image_tokenizer=str(parts)).check_data(own)
    with pytest.raises(ValueError, match="image_tokenizer"):
        PriorModule(config).check_data(own)
    with pytest.raises(ValueError, match=r"set data\.init_args\.text"):
        PriorModule(config).check_data(ImageDataModule(str(shards), image_size=16))
    larger = ImageDataModule(str(shards), image_size=20, text=own.text)
    larger.setup()
    with pytest.raises(ValueError, match="image_size is 20, which the image tokenizer turns into 5x5 codes"):
        PriorModule(config, image_tokenizer=str(parts)).check_data(larger)
    with pytest.raises(ValueError, match="image tokenizer has 8 codes, the prior's config expects 9"):
        PriorModule(PriorConfig(**vars(config) | {"codebook_size": 9}), image_tokenizer=str(parts))
    with pytest.raises(ValueError, match="turns into 4x4 codes; the prior's config expects 4x5"):
        PriorModule(PriorConfig(**vars(config) | {"image_width": 5}), image_tokenizer=str(parts)).check_data(own)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_caption_dropout_out_of_range_raises(share: float) -> None:
    with pytest.raises(ValueError, match=r"caption_dropout must be in \[0, 1\)"):
        module(caption_dropout=share)


def test_training_starts_from_weights_of_a_model(tmp_path: Path) -> None:
    first = PriorModule(CONFIG)
    first.export(tmp_path)
    second = PriorModule(CONFIG, init_from=str(tmp_path))
    for name, tensor in first.net.state_dict().items():
        assert torch.equal(second.net.state_dict()[name], tensor), name
    with pytest.raises(ModelFolderError, match="does not fit"):
        PriorModule(replace(CONFIG, width=2 * CONFIG.width), init_from=str(tmp_path))


def test_blocks_are_compiled_on_request_if_possible() -> None:
    assert all(block.residual.compiled for block in module(compile=True).net.residual_blocks())
    assert not any(block.residual.compiled for block in module().net.residual_blocks())
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "max_steps": 1}
    options |= {"enable_checkpointing": False}
    trainer = ZooTrainer(precision="16-resblock", enable_model_summary=False, **options)
    with pytest.raises(ValueError, match="16-resblock on the CPU, where float16 is emulated: use another precision"):
        trainer.fit(module(compile=True), torch.utils.data.DataLoader([batch(2)], batch_size=None))
    sharded = module(compile=True)
    sharded.trainer = Trainer(strategy=FSDP1(), **options)
    with pytest.raises(ValueError, match="does not work with strategy fsdp: use fsdp2"):
        sharded.on_fit_start()
