"""What can be known about a GPU without one: devices of all tensors, no waiting inside steps, the steps as graphs.

A training step waits once, where it decides whether the weights may change; a sampling step never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dalle_zoo_eval.extractors import load_extractor
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader

from dalle_zoo.masks import Mask, TextImageLayout
from dalle_zoo.models import attention
from dalle_zoo.models.attention.agreement import disagreement
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.initial import shapes_only
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.models.ranker import Ranker, RankerConfig
from dalle_zoo.ranker_folder import save_ranker
from dalle_zoo.sampling import SamplingOptions, sample_codes, token_log_likelihood
from dalle_zoo.tokenizers import ByteTokenizer
from dalle_zoo.training.averaging import WeightEMA
from dalle_zoo.training.dvae_module import DVAEModule
from dalle_zoo.training.finite import FiniteGuard
from dalle_zoo.training.muon import MuonConfig
from dalle_zoo.training.prior_module import PriorModule
from dalle_zoo.training.progress import RunProgress
from dalle_zoo.training.ranker_module import RankerModule
from dalle_zoo.training.schedules import LearningRate
from dalle_zoo.training.trainer import ZooTrainer
from tests.simulated_gpu import SimulatedGPU, Wait, simulated_gpu

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    # Lightning calls a deprecated function of PyTorch.
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
]

Maker = Callable[..., Prior]
SIZES = PriorConfig(text_length=4, text_vocab=10, image_height=2, image_width=2, codebook_size=7, width=16,
                    num_layers=2, num_heads=2)  # fmt: skip
IMAGES = DVAEConfig(image_size=8, width=4, num_groups=2, blocks_per_group=1, decoder_stem=4, codebook_size=8)
PAIRS = RankerConfig(
    image_size=16, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2, text_width=16, text_layers=1,
    text_heads=2, embed_dim=16, text_length=12, text_vocab=256,
)  # fmt: skip
TEXT = torch.tensor([[1, 2, 12, 13], [3, 4, 5, 6]])
SEEDS = torch.tensor([[5, 6], [7, 8]])
RATE = LearningRate(peak=1e-3, warmup_steps=2, decay="constant")
ROUNDING = 1e-5
GUARD = Wait("read", "dalle_zoo/training/finite.py: agreed")
"""The one wait of a step: the weights must not change if the loss or a gradient is not finite."""
SKIP = Wait("read", "dalle_zoo/training/precision.py: prepare")
"""Whether a step is skipped, read next to `GUARD`."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGPU]:
    with simulated_gpu(monkeypatch) as gpu:
        yield gpu


# ------------------------------------------------------------ the simulation itself


def test_the_simulation_refuses_what_a_gpu_refuses(gpu: SimulatedGPU) -> None:
    x = torch.arange(6.0).view(2, 3).cuda()
    assert x.is_cuda
    assert torch.zeros_like(x).device == torch.empty(3, device="cuda").device == torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="to be on the same device"):
        x + torch.ones(2, 3)
    assert torch.equal((x * torch.tensor(2.0)).cpu(), 2.0 * torch.arange(6.0).view(2, 3))
    weight = torch.nn.Parameter(x)
    (weight * weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad.cpu(), 2 * x.cpu())
    with (
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        x.sum().item()


def test_the_simulation_notes_every_wait(gpu: SimulatedGPU) -> None:
    x = torch.arange(6.0).cuda()
    for what, work in {
        "read": lambda: float(x.sum()),
        "nonzero": lambda: x.nonzero(),
        "index": lambda: x[x > 2],
        "copy to the host": lambda: x.cpu(),
        "copy to the device": lambda: x.new_tensor([1.0]),
    }.items():
        with gpu.new_waits() as waits:
            work()
        assert [wait.what for wait in waits] == [what]
    with gpu.new_waits() as waits:
        x[1:3] = x.index_select(0, torch.zeros(2, dtype=torch.long, device="cuda"))
        x.masked_fill_(x > 2, 0.0)
        torch.ones(2).to("cuda", non_blocking=True)
    assert not waits


# ------------------------------------------------------------ training


class Recorder(Callback):
    """Waits of every step, without those before the first."""

    def __init__(self, gpu: SimulatedGPU) -> None:
        self.gpu, self.starts = gpu, list[int]()

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        self.starts.append(len(self.gpu.waits))
        assert {parameter.device.type for parameter in pl_module.parameters()} == {"cuda"}

    @property
    def steps(self) -> list[list[Wait]]:
        """Waits of each step but the last, in whose end results are read."""
        return [self.gpu.waits[a:b] for a, b in zip(self.starts, self.starts[1:], strict=False)]


def fit(gpu: SimulatedGPU, module: LightningModule, batch: dict[str, Any], precision: str = "32-true") -> Recorder:
    """Trains for four steps as a run does, with everything that happens in a step."""
    recorder = Recorder(gpu)
    trainer = ZooTrainer(
        precision=precision, accelerator="cuda", devices=1, max_steps=4, gradient_clip_val=1.0, logger=False,
        callbacks=[FiniteGuard(), recorder, WeightEMA(decay=0.9), RunProgress(shown=False)],
        enable_checkpointing=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch] * 4, batch_size=None))  # type: ignore[arg-type]
    return recorder


@pytest.mark.parametrize(
    ("precision", "muon", "expected"),
    [
        ("bf16-mixed", None, [GUARD]),
        pytest.param("32-true", MuonConfig(), [GUARD], marks=pytest.mark.slow),
        ("16-resblock", None, [GUARD, SKIP]),
    ],
)
def test_a_step_of_the_prior_waits_once(
    gpu: SimulatedGPU, precision: str, muon: MuonConfig | None, expected: list[Wait]
) -> None:
    torch.manual_seed(0)
    batch = {"text": TEXT, "codes": torch.randint(7, (2, 2, 2))}
    recorder = fit(gpu, PriorModule(SIZES, learning_rate=RATE, muon=muon), batch, precision)
    assert all(sorted(waits) == sorted(expected) for waits in recorder.steps[1:]), recorder.steps


def test_a_step_of_the_dvae_waits_once(gpu: SimulatedGPU) -> None:
    torch.manual_seed(0)
    recorder = fit(gpu, DVAEModule(IMAGES, learning_rate=RATE), {"image": torch.rand(2, 3, 8, 8)}, "16-mixed")
    scaler = Wait("read", "dalle_zoo/training/dvae_module.py: optimizer_step")  # PyTorch's, whether to skip the step
    assert all(sorted(waits) == sorted([GUARD, scaler]) for waits in recorder.steps[1:]), recorder.steps


def test_a_step_of_the_ranker_waits_once(gpu: SimulatedGPU, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ByteTokenizer().save(tmp_path)
    batch = {"image": torch.rand(2, 3, 16, 16), "caption": ["red", "blue"]}
    recorder = fit(gpu, RankerModule(PAIRS, str(tmp_path), learning_rate=RATE), batch)
    assert all(waits == [GUARD] for waits in recorder.steps[1:]), recorder.steps


def test_gradients_equal_those_of_the_cpu(gpu: SimulatedGPU, random_prior: Maker) -> None:
    codes = torch.randint(7, (2, 3, 4))
    found = []
    for device in ("cpu", "cuda"):
        prior = random_prior(backend="lines", masks="row, column, conv, full").to(device)
        prior.loss(TEXT.to(device), codes.to(device)).total.backward()
        found.append({name: parameter.grad.cpu() for name, parameter in prior.named_parameters()})  # type: ignore[union-attr]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", ["row", "column", "conv"])
def test_lines_by_the_kernels_of_a_gpu_agree_with_the_reference(
    gpu: SimulatedGPU, spec: str, dtype: torch.dtype
) -> None:
    mask = Mask.from_spec(spec, TextImageLayout(5, 6, 7))
    assert disagreement(attention.lines, mask, torch.device("cuda", 0), dtype, 8) is None
    assert attention.choice.fused.supported(torch.device("cuda", 0), dtype)


# ------------------------------------------------------------ sampling and scoring


@pytest.mark.parametrize(
    "options",
    [pytest.param(SamplingOptions(), marks=pytest.mark.slow), SamplingOptions(top_k=5, top_p=0.9, guidance_scale=2.0)],
    ids=str,
)
def test_sampling_replays_one_graph_and_never_waits(
    gpu: SimulatedGPU, random_prior: Maker, options: SamplingOptions
) -> None:
    prior, starts = random_prior(masks="paper", num_layers=4), list[int]()
    expected = sample_codes(prior, TEXT, SEEDS, options)
    prior.cuda()
    codes = sample_codes(prior, TEXT.cuda(), SEEDS.cuda(), options, callback=lambda _: starts.append(len(gpu.waits)))
    (graph,) = gpu.graphs
    assert graph.replays == prior.config.image_length - 1
    assert starts[1] == starts[-1], gpu.waits[starts[1] :]
    assert torch.equal(codes.cpu(), expected)


def test_a_window_waits_once_per_pass(gpu: SimulatedGPU, random_prior: Maker) -> None:
    prior, passes = random_prior(), list[object]()
    expected = sample_codes(prior, TEXT, SEEDS)
    prior.cuda()
    text, seeds = TEXT.cuda(), SEEDS.cuda()
    for _ in range(2):  # the second time, slots are cached
        passes.clear()
        with gpu.new_waits() as waits:
            codes = sample_codes(prior, text, seeds, window=3, callback=passes.append)
    assert torch.equal(codes.cpu(), expected)
    assert waits == [Wait("read", "dalle_zoo/sampling/jacobi.py: sample_windows")] * len(passes)


def test_scores_and_likelihoods_are_read_once(gpu: SimulatedGPU, random_prior: Maker) -> None:
    prior, codes = random_prior(), torch.randint(7, (2, 3, 4))
    expected = token_log_likelihood(prior, TEXT, codes)
    torch.testing.assert_close(token_log_likelihood(prior.cuda(), TEXT, codes), expected, atol=ROUNDING, rtol=0)
    torch.manual_seed(0)
    ranker, pixels = Ranker.create(PAIRS, ByteTokenizer()).requires_grad_(False), torch.rand(2, 3, 16, 16)
    expected = ranker.scores(pixels, ["red", "blue"])
    ranker.cuda()
    pixels = pixels.cuda()
    with gpu.new_waits() as waits:
        scores = ranker.scores(pixels, ["red", "blue"])
    torch.testing.assert_close(scores.cpu(), expected, atol=1e-3, rtol=0)
    assert waits == [Wait("read", "dalle_zoo/models/ranker.py: scores")]


def test_images_are_encoded_and_decoded_with_one_check_of_the_codes(gpu: SimulatedGPU) -> None:
    torch.manual_seed(0)
    net, images = DVAE(IMAGES).requires_grad_(False), torch.rand(3, 3, 8, 8)
    codes = net.encode(images)
    decoded = net.decode(codes)
    net.cuda()
    images, on_gpu = images.cuda(), codes.cuda()
    with torch.no_grad():
        net.encode(images)  # nothing is cached, but the first call could
        with gpu.new_waits() as waits:
            encoded, pixels = net.encode(images), net.decode(on_gpu)
    assert waits == [Wait("copy to the host", "dalle_zoo/models/tokenizer.py: check_codes")]
    assert torch.equal(encoded.cpu(), codes)
    torch.testing.assert_close(pixels.cpu(), decoded, atol=ROUNDING, rtol=0)


def test_an_extractor_copies_images_in_and_features_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    save_ranker(Ranker.create(PAIRS, ByteTokenizer()), tmp_path)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    extractor = load_extractor("clip", tmp_path, torch.device("cpu"))
    expected = extractor(images)["features"]
    with simulated_gpu(monkeypatch) as gpu:
        extractor.ranker.cuda()  # type: ignore[attr-defined]
        with gpu.new_waits() as waits:
            features = extractor(images)["features"]
    torch.testing.assert_close(features, expected, atol=ROUNDING, rtol=0)
    assert [wait.what for wait in waits] == ["copy to the device", "copy to the host"]


# ------------------------------------------------------------ the paper's size


def test_the_shapes_of_twelve_billion_parameters() -> None:
    config = PriorConfig()
    with shapes_only():
        prior = Prior(config, "sdpa")
        assert sum(parameter.numel() for parameter in prior.parameters()) == sum(config.count_parameters().values())
        prior.layers = prior.layers[-4:]  # one of each kind; all have the same shapes
        text, codes = torch.empty(1, 256, dtype=torch.long), torch.empty(1, 32, 32, dtype=torch.long)
        with torch.no_grad():
            logits = prior(text, codes)
            decoder = prior.decoding(text, 2)
            step = decoder.step(0, None)
    assert (logits.text.shape, logits.image.shape) == ((1, 256, 16384), (1, 1024, 8192))
    assert step.shape == (1, 2, 8192)
    keys = {cache.key.shape[3] for cache in decoder.caches}
    assert min(keys) == 33, "a row layer holds one row and one key"
