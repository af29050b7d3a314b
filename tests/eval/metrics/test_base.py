"""Contract of all registered metrics: independent of batches and ranks, usable in training loops, extensible."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from dalle_zoo_eval.extractors.sprites import identifier
from dalle_zoo_eval.metrics import METRICS
from dalle_zoo_eval.metrics.base import RowsMetric
from dalle_zoo_eval.metrics.clip_score import clip_score
from dalle_zoo_eval.moments import StatisticsError
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from dalle_zoo.results import IMAGE_SETS

N = 240
GENERATOR = torch.Generator().manual_seed(0)
INPUTS: dict[str, Any] = {
    "features": torch.randn(N, 8, generator=GENERATOR),
    "text_features": torch.randn(N, 8, generator=GENERATOR),
    "logits": torch.randn(N, 8, generator=GENERATOR),
    "codes": torch.randint(9, (N, 2, 2), generator=GENERATOR),
    "codebook_size": torch.full((N,), 9),
    "nll": torch.rand(N, 3, generator=GENERATOR),
    "num_tokens": torch.full((N,), 4),
    "images": torch.randint(256, (N, 3, 4, 4), generator=GENERATOR, dtype=torch.uint8),
    "reference_images": torch.randint(256, (N, 3, 4, 4), generator=GENERATOR, dtype=torch.uint8),
    "keys": [f"{i}_x" for i in range(N)],
    "concepts": [str(i % 120) for i in range(N)],
    # Two images per prompt, nine regions, ten grounds and seven hues.
    "grounds": torch.rand(N, 2, 10, generator=GENERATOR),
    "hues": torch.rand(N, 2, 7, generator=GENERATOR),
    "layout": torch.randint(6, (N, 2), generator=GENERATOR),
    "boxes": torch.randint(64, (N, 2, 9, 4), generator=GENERATOR),
    "things": torch.tensor([identifier("cat"), identifier("dog")]).repeat(N, 1)[..., None].expand(-1, -1, 9),
    "shapes": torch.randint(9, (N, 2, 9), generator=GENERATOR),
    "styles": torch.randint(9, (N, 2, 9), generator=GENERATOR),
    "novel": torch.rand(N, 2, 4, generator=GENERATOR) > 0.3,
    "thumbnails": torch.randint(256, (N, 2, 3, 4, 4), generator=GENERATOR, dtype=torch.uint8),
    "targets": [{"kind": "ground", "things": {"all": "cat"}, "ground": ("red", "blue")[i % 2]} for i in range(N)],
}
OPTIONS = {"kid": {"subset_size": 50}, "r_precision": {"mismatched": 20}}


def made(name: str) -> Metric:
    return METRICS[name](**OPTIONS.get(name, {}))


def feed(metric: Metric, name: str, start: int, stop: int) -> None:
    inputs = METRICS.spec(name).inputs
    batch = {key: INPUTS[key][start:stop] for key in inputs - {"real"}}
    if "real" in inputs:
        other = {key: (v + 0.5 if isinstance(v, Tensor) else v) for key, v in batch.items()}
        metric.update(**other, real=True)
        batch["real"] = False
    metric.update(**batch)


def values(metric: Metric) -> dict[str, float]:
    found = metric.compute()
    parts = found if isinstance(found, Mapping) else {"value": found}
    # Parts may have intervals.
    return {f"{k} {i}": n for k, v in parts.items() for i, n in enumerate(torch.as_tensor(v).flatten().tolist())}


NUMBERS = {"features", "text_features", "logits", "nll"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [name for name in METRICS if METRICS.spec(name).inputs & NUMBERS])
def test_non_finite_scores_raise(name: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check, the CLIP score of NaN would be max(0, NaN) = 0."""
    broken = sorted(METRICS.spec(name).inputs & NUMBERS)[0]
    values = INPUTS[broken].clone()
    values[3, 2] = bad
    monkeypatch.setitem(INPUTS, broken, values)
    metric = made(name)

    def score() -> None:
        feed(metric, name, 0, N)
        metric.compute()

    with pytest.raises(StatisticsError, match="hold NaN or infinity: the network or its input is broken"):
        score()


def test_function_with_non_finite_input_raises() -> None:
    with pytest.raises(StatisticsError, match="text_features hold NaN or infinity"):
        clip_score(torch.ones(2, 3), torch.full((2, 3), torch.nan))


@pytest.mark.parametrize("name", METRICS)
def test_score_does_not_depend_on_batches_and_reset_clears(name: str) -> None:
    complete, parts = made(name), made(name)
    feed(complete, name, 0, N)
    for start, stop in ((0, 100), (100, 101), (101, N)):
        feed(parts, name, start, stop)
    assert values(parts) == pytest.approx(values(complete), rel=1e-5)
    parts.reset()
    feed(parts, name, 0, N)
    assert values(parts) == pytest.approx(values(complete), rel=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_ranks_are_merged(name: str) -> None:
    """Merges states like torchmetrics: lists are concatenated, sums are added."""
    complete, ranks = made(name), [made(name), made(name)]
    feed(complete, name, 0, N)
    feed(ranks[0], name, 0, 130)
    feed(ranks[1], name, 130, N)
    merged = ranks[0]
    for state, reduction in merged._reductions.items():
        one, two = (getattr(rank, state) for rank in ranks)
        if isinstance(one, list):
            setattr(merged, state, [*one, *two])
        else:
            assert reduction is not None
            setattr(merged, state, reduction(torch.stack([one, two])))
    merged._computed = None
    assert values(merged) == pytest.approx(values(complete), rel=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_spec_lists_inputs_and_labels(name: str) -> None:
    spec = METRICS.spec(name)
    assert spec.inputs <= {*INPUTS, "real"}
    assert set(spec.images) <= set(IMAGE_SETS)
    assert spec.record()["label"] == spec.label
    assert f"{0.5:{spec.format}}"


@pytest.mark.parametrize("name", [name for name in METRICS if "real" in METRICS.spec(name).inputs])
def test_reset_can_retain_the_reference(name: str) -> None:
    metric = METRICS[name](**OPTIONS.get(name, {}), reset_real_features=False)
    feed(metric, name, 0, N)
    expected = values(metric)
    metric.reset()
    batch = {key: INPUTS[key] for key in METRICS.spec(name).inputs - {"real"}}
    metric.update(**batch, real=False)
    assert values(metric) == pytest.approx(expected, rel=1e-9)


def test_collection_passes_each_metric_its_inputs() -> None:
    collection = MetricCollection({name: METRICS[name]() for name in ("clip_score", "codebook_use")})
    collection.update(**{key: INPUTS[key] for key in ("features", "text_features", "codes", "codebook_size")})
    found = collection.compute()
    assert {"used", "perplexity"} <= {name.rpartition("_")[2] for name in found}


class Validated(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.kid = METRICS["kid"](subset_size=16)
        self.layer = torch.nn.Linear(4, 4)

    def validation_step(self, batch: Tensor, index: int) -> None:
        del index
        self.kid.update(features=batch + 1, real=True)
        self.kid.update(features=self.layer(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("kid", self.kid.compute()["value"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*treespec, LeafSpec.*")
def test_metric_works_in_validation_step() -> None:
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    data = DataLoader(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), batch_size=8)
    (logged,) = trainer.validate(Validated(), data, verbose=False)
    assert logged["kid"] > 0


def test_external_functions_and_classes_are_checked() -> None:
    with pytest.raises(TypeError, match="unknown option 'split': known are splits, seed"):
        METRICS["is"](split=3)
    empty = METRICS["kid"]()
    empty.update(features=torch.rand(3, 2), real=True)
    with pytest.raises(ValueError, match="kid has no features: call update first"):
        empty.compute()
    with pytest.raises(ValueError, match="metric 'kid' is already registered"):
        METRICS.register("kid")(lambda features: 0.0)
    assert issubclass(METRICS["kid"], RowsMetric)


def test_documentation_lists_implementation_of_every_metric() -> None:
    text = (Path(__file__).parents[3] / "docs/evaluate/metrics.md").read_text()
    table = text.partition("| metric | implementation | why |")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.partition(" | ")[0])]
    assert sorted(named) == list(METRICS)
